"""Examples with units near a kink, looked at again in passes of their own.

Few of a batch are so near, and a float64 pass costs less by example the more there are. And it need
compute no more than what lies before the last unit that is looked at: those of examples whose last
comes early are looked at together. Both want examples of many batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_stiffness.gradients.batches import Nest, join, take
from distributed_stiffness.gradients.kinks import Kinks, KinksAgain, Near
from distributed_stiffness.tiling import pieces


@dataclass(frozen=True)
class Doubtful:
    """Examples that a pass may have put on the wrong side of a kink."""

    inputs: Nest  # of these alone
    targets: Nest
    places: Tensor  # (k,) int64, of each among all rows
    calls: tuple[Near | None, ...]  # of each call with a kink, counted among these

    @staticmethod
    def of(kinks: Kinks, inputs: Nest, targets: Nest, start: int) -> Doubtful:
        """Keep those that were near a kink in a pass over `inputs`, whose first row is `start`."""
        n = kinks.n
        everyone = torch.arange(start, start + n)
        return Doubtful(inputs, targets, everyone, tuple(kinks.calls)).take(kinks.examples())

    def __len__(self) -> int:
        return len(self.places)

    def take(self, chosen: Tensor) -> Doubtful:
        """Select examples, (k,) int64, ascending."""
        place = torch.full((len(self),), -1)
        place[chosen] = torch.arange(len(chosen))

        def of_chosen(near: Near) -> Near:
            if not len(near.examples):
                return near
            examples = place[near.examples]
            kept = examples >= 0
            return Near(near.shape, examples[kept], near.units[kept], near.sides[kept])

        return Doubtful(
            take(self.inputs, chosen),
            take(self.targets, chosen),
            self.places[chosen],
            tuple(near and of_chosen(near) for near in self.calls),
        )

    def last_calls(self) -> Tensor:
        """Return the last call in which each example is near a kink, (k,) int64."""
        last = torch.full((len(self),), -1)
        for number, near in enumerate(self.calls):
            if near is not None:
                last[near.examples] = number
        return last

    def on_the_wrong_side(self, run: Callable[[Nest, Nest], None]) -> Doubtful:
        """Return those that a pass without rounding, which `run` makes, puts on another side."""
        with KinksAgain(self.calls, len(self)) as again:
            run(self.inputs, self.targets)
        return self.take(again.examples())


def together(parts: Sequence[Doubtful], size: int) -> Iterator[Doubtful]:
    """Join examples of several passes, and cut them into new ones of at most `size`.

    Those that are near a kink early come first. Passes that made other calls are not joined.
    """
    alike: dict[tuple[tuple[int, ...] | None, ...], list[Doubtful]] = defaultdict(list)
    for part in parts:
        if len(part):
            alike[tuple(near.shape if near else None for near in part.calls)].append(part)
    for some in alike.values():
        joined = _joined(some)
        early_first = joined.last_calls().argsort(stable=True)
        for piece in pieces(slice(0, len(joined)), size):
            yield joined.take(early_first[piece].sort().values)


def _joined(parts: Sequence[Doubtful]) -> Doubtful:
    starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).tolist()
    calls: list[Near | None] = []
    for same in zip(*(part.calls for part in parts), strict=True):
        there = [(near, start) for near, start in zip(same, starts, strict=False) if near]
        calls.append(
            Near(
                there[0][0].shape,
                torch.cat([near.examples + start for near, start in there]),
                torch.cat([near.units for near, _ in there]),
                torch.cat([near.sides for near, _ in there]),
            )
            if there
            else None
        )
    return Doubtful(
        join([part.inputs for part in parts]),
        join([part.targets for part in parts]),
        torch.cat([part.places for part in parts]),
        tuple(calls),
    )
