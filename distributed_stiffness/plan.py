"""What a study will cost, and how its tiles are computed within a memory budget. Pure.

A replica fills most of its budget with the rows of one panel and streams blocks of columns against
it. Where the budget holds all rows (networks whose gradients are kept as factors), nothing is
computed twice; with K panels every gradient is made (K + 1)/2 times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from distributed_stiffness.errors import StudyError
from distributed_stiffness.tiling import Tiling, default_tile

# Shares of a replica's budget. The rest is for the network, the tile being written, and the
# interpreter with its libraries.
ROWS_SHARE = 0.6
BLOCK_SHARE = 0.15
BATCH_SHARE = 0.15
LARGEST_BLOCK = 2048  # columns streamed at a time; wide enough for any GEMM
SMALLEST_BLOCK = 8
SMALLEST_BATCH = 2
# A pass over more examples than fill these many bytes, and a few, is not faster on a CPU.
BATCH_BYTES = 64 * 2**20
FEW = 64
LARGEST_PANEL = 4  # row chunks of one task: what is lost with a replica stays small


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the tiles of a study are computed. The same plan gives the same bits."""

    n_examples: int
    n_checkpoints: int
    tile: int
    block: int  # columns streamed at a time
    batch: int  # examples differentiated at a time
    panel_rows: int  # rows held at a time: whole tiles, or a strip of one
    row_bytes: int  # of one example's gradient as it is held
    memory: int  # bytes, the budget of a replica
    factored: tuple[str, ...] = ()  # weights whose gradients are kept as factors
    making_work: int = 0  # multiply-adds of one gradient
    pair_work: int = 0  # multiply-adds of the product of two
    sums_bytes: int = 0  # of one example against one tile's columns, where no pairs are kept
    checked_share: float = 0.1  # of each batch that is compared with plain autograd
    checked_work: float = 0.0  # of that, as a share of the whole work
    sample: int = 96  # examples that are computed again for the error bound
    allow_error: bool = False  # whether a bound above what is allowed is let pass

    @property
    def tiling(self) -> Tiling:
        """Of every matrix."""
        return Tiling(n_examples=self.n_examples, tile=self.tile)

    @property
    def n_tiles(self) -> int:
        """Tiles of all matrices, the input distances' included where they are kept."""
        return self.tiling.n_chunks**2 * (self.n_checkpoints + (not self.sums_bytes))

    @property
    def panel_chunks(self) -> int:
        """Row chunks of one task's panel."""
        return min(max(1, self.panel_rows // self.tile), LARGEST_PANEL)

    @property
    def holds_all(self) -> bool:
        """Whether a replica holds the rows of all examples, so that none is made twice."""
        return self.panel_rows >= self.n_examples

    @property
    def strip(self) -> int:
        """Rows of one product: a whole tile, or less where a tile's rows do not fit."""
        return min(self.tile, self.panel_rows)

    @property
    def gradients_per_example(self) -> float:
        """How often each gradient is made, (K + 1)/2 for K panels."""
        return (math.ceil(self.n_examples / min(self.panel_rows, self.n_examples)) + 1) / 2

    def halved(self) -> Plan:
        """Return what takes less memory: fewer rows held, then smaller blocks.

        As long as whole tiles of rows are held, every product keeps its shape, and so its bits.

        Raises:
            StudyError: it is the smallest already.
        """
        needed = math.ceil(self.panel_rows * self.row_bytes / ROWS_SHARE)
        if self.memory > 2 * needed:
            return replace(self, memory=needed)  # no rows of other panels beside these
        if self.panel_rows > self.tile:
            rows = max(self.tile, self.panel_rows // 2 // self.tile * self.tile)
            return replace(self, memory=self.memory // 2, panel_rows=rows)
        block = _power_of_two(max(1, self.block // 2))
        if block < min(SMALLEST_BLOCK, self.tile):
            raise StudyError(
                f"{self.block} gradients of {in_words(self.row_bytes)} do not fit into a replica's"
                " memory: give fewer --max-replicas or machines with more"
            )
        return replace(
            self,
            memory=self.memory // 2,
            block=block,
            batch=max(1, min(self.batch // 2, block)),
            panel_rows=max(block, self.panel_rows // 2 // block * block),
        )

    @property
    def sample_memory(self) -> int:
        """Bytes that float64 gradients of the sample may take, in place of rows and blocks."""
        return int((ROWS_SHARE + BLOCK_SHARE) * self.memory)

    @property
    def store_bytes(self) -> int:
        """Of all matrices, before compression (which saves about a tenth), or of all sums."""
        if self.sums_bytes:
            return self.sums_bytes * self.n_examples * self.tiling.n_chunks * self.n_checkpoints
        return 4 * self.n_examples**2 * (self.n_checkpoints + 1)

    def describe(self) -> str:
        """One line for people."""
        held = min(self.panel_rows, self.n_examples)
        made = self.gradients_per_example
        return (
            f"plan: {self.n_checkpoints} checkpoints × {self.n_examples:,}² pairs and the input"
            f" distances{', of which sums are kept' if self.sums_bytes else ''},"
            f" {self.n_tiles:,} tiles of up to {self.tile:,}²;"
            f" {in_words(self.row_bytes)} a gradient, {held:,} held at a time"
            f" ({in_words(held * self.row_bytes)} of {in_words(self.memory)} a replica)"
            + (f", each made {made:.1f} times" if made > 1 else "")
            + f"; {self.described_checks()}; up to {in_words(self.store_bytes)} on disk, and the"
            " checkpoints"
        )

    def described_checks(self) -> str:
        """Say what the check of every batch, and the sample, compare."""
        return (
            f"{100 * self.checked_share:.2g}% of each batch compared with plain autograd"
            f" ({self.checked_work:.1%} of the work), a sample of"
            f" {min(self.sample, self.n_examples)} with float64"
        )

    def to_json(self) -> dict[str, Any]:
        """For the store's attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """Return the plan that a store was begun with."""
        return cls(**{**stored, "factored": tuple(stored["factored"])})


def make_plan(
    *,
    n_examples: int,
    n_checkpoints: int,
    row_bytes: int,
    making_bytes: int,
    memory: int,
    making_work: int = 0,
    pair_work: int = 0,
    tile: int | None = None,
    factored: Sequence[str] = (),
    batch_bytes: int = BATCH_BYTES,
) -> Plan:
    """Fit batches, blocks and panels into the budget.

    Args:
        n_examples: N.
        n_checkpoints: matrices wanted.
        row_bytes: bytes of one example's gradient as it is held (`Rows.nbytes`).
        making_bytes: bytes that one example takes beside its row while its gradient is made.
        memory: budget of a replica in bytes.
        making_work: multiply-adds of one gradient.
        pair_work: multiply-adds of the product of two.
        tile: edge of a tile; None chooses.
        factored: weights whose gradients are kept as factors.
        batch_bytes: beyond which a batch is not faster.

    Raises:
        StudyError: the budget does not hold even the smallest block, or the tile does not fit.
    """
    tile = min(tile or default_tile(n_examples), n_examples)
    block, batch = int(BLOCK_SHARE * memory) // row_bytes, int(BATCH_SHARE * memory) // making_bytes
    if block < min(SMALLEST_BLOCK, n_examples) or batch < min(SMALLEST_BATCH, n_examples):
        # A thousandth more, and rounded up: who gives what the message shows gives enough.
        least = max(
            SMALLEST_BLOCK * row_bytes / BLOCK_SHARE, SMALLEST_BATCH * making_bytes / BATCH_SHARE
        )
        needed = _three_digits_up(math.ceil(1.001 * least))
        raise StudyError(
            f"a memory budget of {in_words(memory)} is too small: {SMALLEST_BLOCK} gradients of"
            f" this network, or {SMALLEST_BATCH} examples in work, need {in_words(needed)}; give"
            f" that or more (--memory {in_words(needed)}), or have fewer replicas"
        )
    block = min(_power_of_two(block), LARGEST_BLOCK, tile)
    batch = min(_power_of_two(batch), _power_of_two(max(FEW, batch_bytes // making_bytes)))
    # A row that is held and one that is streamed are made in the same batches: the same bits.
    batch = min(batch, block)
    rows = max(block, int(ROWS_SHARE * memory) // row_bytes)
    panel_rows = rows // tile * tile if rows >= tile else rows // block * block
    return Plan(
        n_examples=n_examples,
        n_checkpoints=n_checkpoints,
        tile=tile,
        block=block,
        batch=batch,
        panel_rows=min(panel_rows, math.ceil(n_examples / tile) * tile),
        row_bytes=row_bytes,
        memory=memory,
        factored=tuple(factored),
        making_work=making_work,
        pair_work=pair_work,
    )


def _power_of_two(n: int) -> int:
    """Return the largest that is at most n."""
    return int(2 ** int(math.log2(n)))


def _three_digits_up(n: int) -> int:
    """Round up to a number that `_size` shows as it is."""
    power = int(10 ** max(0, len(str(n)) - 3))
    return math.ceil(n / power) * power


def in_words(n_bytes: float) -> str:
    """Return a number of bytes for people, such as 3.2 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
