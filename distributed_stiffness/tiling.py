"""Tiles, panels and tasks: which part of which matrix is computed together. Pure.

The matrix of a checkpoint is cut into square tiles of `tile` examples; a tile is one Zarr chunk.
The matrix is symmetric, so a task computes the tiles (I, J) with I ≤ J of one column of tiles, for
the rows I of one row panel, and writes the transposed tiles too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Tile = tuple[int, int]  # row and column, counted in tiles


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """N examples cut into chunks of `tile`; the last one may be shorter."""

    n_examples: int
    tile: int

    def __post_init__(self) -> None:
        if not 1 <= self.tile <= self.n_examples:
            raise ValueError(f"tile must be in 1..{self.n_examples} examples, got {self.tile}")

    @property
    def n_chunks(self) -> int:
        """Chunks along each side."""
        return math.ceil(self.n_examples / self.tile)

    def examples(self, chunk: int) -> slice:
        """Return the examples of a chunk."""
        return slice(chunk * self.tile, min((chunk + 1) * self.tile, self.n_examples))

    def size(self, chunk: int) -> int:
        """Return how many examples a chunk has."""
        examples = self.examples(chunk)
        return int(examples.stop - examples.start)

    def chunks(self, first: int, last: int) -> range:
        """Return the chunks that hold examples first to last - 1."""
        return range(first // self.tile, min(self.n_chunks, math.ceil(last / self.tile)))

    def n_tiles(self, rows: range | None = None) -> int:
        """Return how many tiles make these rows, and by symmetry these columns, whole."""
        wanted = self.n_chunks if rows is None else len(rows)
        return self.n_chunks**2 - (self.n_chunks - wanted) ** 2

    def upper(self) -> Iterator[Tile]:
        """Tiles on and above the diagonal."""
        return ((i, j) for j in range(self.n_chunks) for i in range(j + 1))


class TileSet(Collection[Tile]):
    """Tiles that are there; a byte each, so that a store of millions can be looked through."""

    def __init__(self, n_chunks: int) -> None:
        self._there = np.zeros((n_chunks, n_chunks), dtype=bool)

    def add(self, tile: Tile) -> None:
        """Note that a tile is there; one outside the matrix is none of it."""
        if max(tile) < len(self._there):
            self._there[tile] = True

    def __contains__(self, tile: object) -> bool:
        return isinstance(tile, tuple) and bool(self._there[tile])

    def __iter__(self) -> Iterator[Tile]:
        return ((int(i), int(j)) for i, j in zip(*self._there.nonzero(), strict=True))

    def __len__(self) -> int:
        return int(self._there.sum())


def default_tile(n_examples: int) -> int:
    """Return a tile edge near 1,250 that cuts N evenly: tiles of 4 to 8 MB."""
    return math.ceil(n_examples / math.ceil(n_examples / 1250))


def default_tile_of_sums(n_examples: int) -> int:
    """Return a larger edge where only sums of a tile are kept: they take less in fewer tiles."""
    return max(default_tile(n_examples), min(math.ceil(n_examples / 6), 4096))


def pieces(examples: slice, size: int) -> Iterator[slice]:
    """Cut a run of examples into runs of `size`; the last one may be shorter."""
    for start in range(examples.start, examples.stop, size):
        yield slice(start, min(start + size, examples.stop))


@dataclass(frozen=True, order=True)
class Checkpoint:
    """Where a checkpoint lies in the store's arrays."""

    learning_rate: int
    seed: int
    iteration: int


def all_checkpoints(learning_rates: int, seeds: int, iterations: int) -> list[Checkpoint]:
    """Return every checkpoint of a study; early iterations first, as training writes them."""
    return [
        Checkpoint(rate, seed, iteration)
        for iteration in range(iterations)
        for rate in range(learning_rates)
        for seed in range(seeds)
    ]


Kind = Literal["distance", "pairs", "check"]
Panel = tuple[Checkpoint | None, int]  # of one matrix: where its rows begin


@dataclass(frozen=True)
class Task:
    """What a replica computes at a time; doing it twice is harmless.

    `pairs`: the tiles (I, column) for I in rows of a checkpoint. `distance`: the same of the input
    distances. `check`: the error bound of a finished checkpoint.
    """

    kind: Kind
    checkpoint: Checkpoint | None = None
    rows: tuple[int, ...] = ()
    column: int = 0
    first_row: int = -1  # of the panel, whatever an earlier run left of it

    @property
    def panel(self) -> Panel:
        """Tasks with the same panel use the same rows, so that one replica should do them."""
        return self.checkpoint, self.first_row

    @property
    def n_tiles(self) -> int:
        """How many tiles are written."""
        return len(self.tiles)

    @property
    def size(self) -> int:
        """Tiles computed, or 1 for a check: what the time of a task goes with."""
        return max(1, len(self.rows))

    @property
    def tiles(self) -> list[Tile]:
        """Tiles written, both triangles."""
        pairs = [(row, self.column) for row in self.rows]
        return [*pairs, *((j, i) for i, j in pairs if i != j)]

    def split(self, size: int, *, first: Collection[int] = ()) -> tuple[Task, Task]:
        """Cut into a task of `size` rows, those in `first` before others, and the rest."""
        preferred = sorted(self.rows, key=lambda row: (row not in first, row))
        chosen, rest = sorted(preferred[:size]), sorted(preferred[size:])
        return replace(self, rows=tuple(chosen)), replace(self, rows=tuple(rest))

    def __str__(self) -> str:
        where = f" of checkpoint {self.checkpoint}" if self.checkpoint else ""
        return f"{self.kind}{where}, rows {list(self.rows)}, column {self.column}"


def tasks(
    kind: Literal["distance", "pairs"],
    checkpoint: Checkpoint | None,
    tiling: Tiling,
    *,
    panel_chunks: int,
    done: Collection[Tile],
    rows: range | None = None,
) -> list[Task]:
    """Return what is missing of one matrix, panel by panel.

    Args:
        kind: of the matrix.
        checkpoint: None for the input distances.
        tiling: of the matrix.
        panel_chunks: row chunks whose gradients a replica can hold at a time.
        done: tiles that the store has; (I, J) counts only with (J, I).
        rows: chunks whose rows are wanted, each with all columns; None: all.
    """
    wanted = range(tiling.n_chunks) if rows is None else rows
    found = []
    for first in range(0, tiling.n_chunks, panel_chunks):
        for column in range(first, tiling.n_chunks):
            missing = tuple(
                row
                for row in range(first, min(first + panel_chunks, column + 1))
                if (row in wanted or column in wanted)
                and not ((row, column) in done and (column, row) in done)
            )
            if missing:
                found.append(Task(kind, checkpoint, missing, column, first))
    return found
