"""Tiles and tasks: every pair once, and nothing that is there already."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_stiffness.tiling import Checkpoint, Task, Tiling, default_tile, pieces, tasks

CHECKPOINT = Checkpoint(0, 1, 2)
# Cheap enough for many examples.
thorough = settings(max_examples=200)
chunks = st.integers(1, 9)


@st.composite
def tilings(draw) -> Tiling:
    tile, whole_chunks = draw(st.integers(1, 7)), draw(st.integers(0, 8))
    rest = draw(st.integers(0 if whole_chunks else tile, tile))
    return Tiling(n_examples=tile * whole_chunks + rest, tile=tile)


@st.composite
def unfinished(draw) -> tuple[Tiling, set[tuple[int, int]]]:
    """A tiling, and tiles that an earlier run wrote."""
    tiling = draw(tilings())
    every = [(i, j) for i in range(tiling.n_chunks) for j in range(tiling.n_chunks)]
    return tiling, draw(st.sets(st.sampled_from(every)))


def missing(tiling, done, *, panel_chunks, kind="pairs", checkpoint=CHECKPOINT):
    return tasks(kind, checkpoint, tiling, panel_chunks=panel_chunks, done=done)


def computed(found):
    """Tiles that tasks compute, (row, column)."""
    return [(row, task.column) for task in found for row in task.rows]


class TestTiling:
    @thorough
    @given(tilings())
    def test_chunks_cover_the_examples_once(self, tiling):
        """Side by side, none left out, only the last one shorter."""
        parts = [tiling.examples(chunk) for chunk in range(tiling.n_chunks)]

        assert [i for part in parts for i in range(part.start, part.stop)] == list(
            range(tiling.n_examples)
        )
        assert all(tiling.size(chunk) == tiling.tile for chunk in range(tiling.n_chunks - 1))
        assert 1 <= tiling.size(tiling.n_chunks - 1) <= tiling.tile

    @thorough
    @given(tilings())
    def test_upper_tiles_and_their_transposes_are_the_matrix(self, tiling):
        """Each unordered pair of chunks once."""
        upper = list(tiling.upper())

        assert all(i <= j for i, j in upper)
        assert len(upper) == len(set(upper))
        assert len({*upper, *((j, i) for i, j in upper)}) == tiling.n_chunks**2

    @pytest.mark.parametrize("tile", [0, -1, 11])
    def test_tiles_that_do_not_fit(self, tile):
        """The message holds the range and the value."""
        with pytest.raises(ValueError, match=f"1..10 examples, got {tile}"):
            Tiling(n_examples=10, tile=tile)

    @thorough
    @given(st.integers(1, 10**6))
    def test_default_tile(self, n):
        """Whole for small N; else 1,000 to 2,048 examples, cut evenly."""
        tile = default_tile(n)

        assert tile <= n
        assert tile == n if n <= 1250 else 600 < tile <= 1250
        last = n - (-(-n // tile) - 1) * tile
        assert tile - last < -(-n // tile)

    @thorough
    @given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
    def test_pieces(self, start, length, size):
        """A run is cut into runs of a size, in order, the last one shorter."""
        found = list(pieces(slice(start, start + length), size))

        assert [i for piece in found for i in range(piece.start, piece.stop)] == list(
            range(start, start + length)
        )
        assert all(piece.stop - piece.start == size for piece in found[:-1])


class TestTasks:
    @thorough
    @given(tilings(), chunks)
    def test_every_pair_of_examples_is_computed_once(self, tiling, panel_chunks):
        """With the transposes, each element of the matrix is written exactly once."""
        written = np.zeros((tiling.n_examples, tiling.n_examples), dtype=int)
        for i, j in computed(missing(tiling, (), panel_chunks=panel_chunks)):
            written[tiling.examples(i), tiling.examples(j)] += 1
            if i != j:
                written[tiling.examples(j), tiling.examples(i)] += 1

        assert (written == 1).all()

    @thorough
    @given(unfinished(), chunks)
    def test_what_is_left_is_the_difference(self, case, panel_chunks):
        """A continued run computes the upper tiles that are missing, or miss their transpose."""
        tiling, done = case
        found = computed(missing(tiling, done, panel_chunks=panel_chunks))

        assert len(found) == len(set(found))
        assert set(found) == {
            (i, j) for i, j in tiling.upper() if (i, j) not in done or (j, i) not in done
        }

    @thorough
    @given(unfinished(), chunks)
    def test_tasks_fit_into_a_panel(self, case, panel_chunks):
        """The rows of a task are chunks of one panel, none below the diagonal."""
        tiling, done = case
        for task in missing(tiling, done, panel_chunks=panel_chunks):
            assert len({row // panel_chunks for row in task.rows}) == 1
            assert list(task.rows) == sorted(set(task.rows))
            assert max(task.rows) <= task.column < tiling.n_chunks

    @thorough
    @given(unfinished(), chunks)
    def test_tasks_of_one_panel_know_it(self, case, panel_chunks):
        """Tasks of one panel have one `panel`, whatever an earlier run left of them."""
        tiling, done = case
        found = missing(tiling, done, panel_chunks=panel_chunks)

        panels = {(task.rows[0] // panel_chunks, task.panel) for task in found}
        assert len(panels) == len({number for number, _ in panels})
        assert len(panels) == len({panel for _, panel in panels})

    @thorough
    @given(unfinished(), chunks)
    def test_panels_come_one_after_the_other(self, case, panel_chunks):
        """So that a replica sweeps the columns of the rows it holds."""
        tiling, done = case
        order = [task.panel for task in missing(tiling, done, panel_chunks=panel_chunks)]

        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert changes == max(0, len(set(order)) - 1)

    @thorough
    @given(unfinished(), chunks)
    def test_a_task_counts_its_tiles(self, case, panel_chunks):
        """Both triangles: what progress counts adds up to the matrix."""
        tiling, done = case
        found = missing(tiling, done, panel_chunks=panel_chunks)

        assert sum(task.n_tiles for task in found) == sum(
            1 if i == j else 2 for i, j in computed(found)
        )
        everything = missing(tiling, (), panel_chunks=panel_chunks)
        assert sum(task.n_tiles for task in everything) == tiling.n_chunks**2

    @thorough
    @given(tilings(), chunks)
    def test_nothing_is_left_of_a_whole_matrix(self, tiling, panel_chunks):
        """A finished store is not computed again."""
        done = {(i, j) for i in range(tiling.n_chunks) for j in range(tiling.n_chunks)}

        assert missing(tiling, done, panel_chunks=panel_chunks) == []

    def test_panels_of_different_checkpoints_differ(self):
        """Rows of one checkpoint are of no use to another, nor to the distances."""
        tiling = Tiling(n_examples=4, tile=2)
        found = {
            task.panel
            for checkpoint in (CHECKPOINT, Checkpoint(0, 1, 3), None)
            for task in missing(tiling, (), panel_chunks=2, checkpoint=checkpoint)
        }

        assert len(found) == 3

    def test_a_task_can_be_named(self):
        """Failures and logs name what was computed."""
        text = str(Task("pairs", CHECKPOINT, (1, 2), 5))

        assert "pairs" in text
        assert str(CHECKPOINT) in text
        assert "rows [1, 2], column 5" in text
