"""What a replica keeps in memory."""

from __future__ import annotations

import torch

from distributed_stiffness.engine.replica import _HeldRows
from distributed_stiffness.gradients.gram import Rows
from distributed_stiffness.tiling import Checkpoint

ONE, TWO = Checkpoint(0, 0, 0), Checkpoint(0, 0, 1)


def rows(n: int) -> Rows:
    numbers = torch.ones(n)
    return Rows((), torch.zeros(n, 10), numbers, numbers.double(), numbers.double(), numbers > 0)


class TestHeldRows:
    """Room for two of forty bytes a row."""

    def rooms(self, *keys: tuple[str, Checkpoint, int]) -> list[Rows | None]:
        """Ask for rows of five examples each; return the rooms that were given to make them."""
        held, given = _HeldRows(2 * 5 * 40), []

        def make(room: Rows | None) -> Rows:
            given.append(room)
            return rows(5) if room is None else room

        for key in keys:
            held.get(key, make, length=5)
        return given

    def test_the_room_of_another_checkpoint_is_used_again(self) -> None:
        """
        What has to go is given to what comes, and is no longer held.
        """
        *before, room = self.rooms(("pairs", ONE, 0), ("pairs", ONE, 5), ("pairs", TWO, 0))

        assert before == [None, None]
        assert room is not None
        assert len(room) == 5

    def test_rows_of_the_same_checkpoint_are_never_written_over(self) -> None:
        """
        A task may still multiply them, though they are no longer held.
        """
        rooms = self.rooms(("pairs", ONE, 0), ("pairs", ONE, 5), ("pairs", ONE, 10))

        assert rooms == [None, None, None]

    def test_rows_of_another_kind_or_number_are_not_used(self) -> None:
        """
        Inputs are not gradients; the last strip of a panel may be shorter.
        """
        assert self.rooms(("distance", ONE, 0), ("distance", ONE, 5), ("pairs", TWO, 0))[-1] is None
        held = _HeldRows(5 * 40)
        held.get(("pairs", ONE, 0), lambda _: rows(5), length=5)
        given: list[Rows | None] = []

        def make(room: Rows | None) -> Rows:
            given.append(room)
            return rows(3)

        held.get(("pairs", TWO, 0), make, length=3)

        assert given == [None]
