"""How certain the numbers of a store are, in one line."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from distributed_stiffness.certainty import decides_nothing


@dataclass(frozen=True)
class Bound:
    """What the check of one checkpoint found."""

    checkpoint: str  # in words
    error: float  # bound on the error of a cosine
    undecided: int  # pairs i < j whose cosine is nearer to 0 than that, and is not 0


def describe_bounds(bounds: Collection[Bound], n_examples: int) -> str:
    """Say the largest error bound, and the most signs that are open, of all checkpoints.

    Args:
        bounds: of the checkpoints that were checked; one at least.
        n_examples: N, of their matrices.
    """
    pairs = n_examples * (n_examples - 1) // 2
    widest = max(bounds, key=lambda bound: bound.error)
    line = f"error bound of a cosine: at most {widest.error:.2g} ({widest.checkpoint})"
    most = max(bounds, key=lambda bound: bound.undecided)
    if not most.undecided:
        return line if decides_nothing(widest.error) else f"{line}; no sign is undecided"
    return (
        f"{line}; undecided signs: at most {most.undecided:,} of {pairs:,} pairs,"
        f" {most.undecided / pairs:.2g} of them ({most.checkpoint})"
    )
