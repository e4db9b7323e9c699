"""How much the checks at the end of a study compute, in numbers of gradients and of pairs. Pure.

Of every checkpoint a sample of pairs is made again in float64, one example at a time, and undecided
signs are counted; of the last one the whole matrix is compared with sums of gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distributed_stiffness.engine.whole_matrix import classes_to_check
from distributed_stiffness.gradients.reference import gradients_made, held_and_streamed
from distributed_stiffness.plan import BLOCK_SHARE, Plan

# Of a study's work, for the check of a whole matrix; and multiply-adds that take a second or two.
WHOLE_SHARE, _ALWAYS = 0.03, 1e11


@dataclass(frozen=True)
class SampleWork:
    """What a sample makes in float64."""

    gradients: int
    pairs: int  # products of two


def sample_work(plan: Plan, n_parameters: int) -> SampleWork:
    """Return what `Reference.cosines` makes of a sample: each block meets itself and all after."""
    n = min(plan.sample, plan.n_examples)
    held, _ = held_and_streamed(n, n_parameters, memory=plan.sample_memory)
    pairs = sum(min(held, left) * left for left in range(n, 0, -held))
    return SampleWork(gradients=gradients_made(n, held), pairs=pairs)


def remade_gradients(plan: Plan) -> int:
    """Return how many gradients are made again to draw a sample, where no pairs are stored.

    A half of the sample meets all examples, batch by batch on both sides.
    """
    if not plan.sums_bytes:
        return 0
    n, rows = plan.n_examples, min(plan.sample // 2, plan.n_examples)
    return n * math.ceil(rows / plan.batch) + rows * math.ceil(n / plan.batch)


def read_pairs(plan: Plan) -> int:
    """Return how many stored pairs are read to count undecided signs: half of them, by tiles."""
    if plan.sums_bytes:
        return 0
    sizes = [plan.tiling.size(chunk) for chunk in range(plan.tiling.n_chunks)]
    return (sum(sizes) ** 2 + sum(size**2 for size in sizes)) // 2


def classes_of_whole_matrix(plan: Plan, labels: np.ndarray, n_parameters: int) -> np.ndarray:
    """Return the classes whose mean cosines are compared with those from sums of gradients."""
    return classes_to_check(
        labels,
        n_parameters=n_parameters,
        n_checkpoints=plan.n_checkpoints,
        memory=int(BLOCK_SHARE * plan.memory),
        affordable=_affordable(plan),
    )


def _affordable(plan: Plan) -> int:
    """Return of how many examples float64 sums take their share of the study's work."""
    making = plan.n_examples * plan.gradients_per_example * plan.making_work
    total = plan.n_checkpoints * (making + plan.n_examples**2 / 2 * plan.pair_work)
    # A pass in float64, with the parameters' gradients, against the same in float32.
    return int(max(WHOLE_SHARE * total, _ALWAYS) / max(1, 2 * plan.making_work))


def n_undecided(tile: np.ndarray, bound: float, *, diagonal: bool) -> int:
    """Count the pairs of a tile whose cosine is nearer to 0 than a bound, and is not 0.

    Of a tile on the diagonal each pair is counted once, and self-pairs are not.
    """
    below = (np.abs(tile) < bound) & (tile != 0)  # exactly 0: a gradient is zero
    return int(np.triu(below, 1).sum() if diagonal else below.sum())
