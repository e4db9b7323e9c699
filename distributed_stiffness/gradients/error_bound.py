"""How far the stored cosines of a checkpoint can be from the truth, measured on a sample of pairs.

48 examples are drawn at random, and the 48 others whose cosines with those are nearest zero on
average: 4,560 pairs in all, of which the 2,304 between the two halves are the ones whose signs are
most in danger. Each pair is recomputed by `Reference`, which shares no code with the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from distributed_stiffness.gradients.batches import Nest
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.reference import Reference

HALF = 48
# The bound is the largest difference seen, times this: a sample of pairs does not hold the worst.
# On an over-fitted net all 499,500 pairs held one 3.7 times as large (docs/design/0002-numbers.md).
MARGIN = 5.0
# No float32 cosine is claimed to be better than this (half a unit in the last place at 1).
FLOOR = 6e-8


@dataclass(frozen=True)
class Sample:
    """Examples, ascending, and their stored cosines with each other."""

    examples: np.ndarray  # (n,) int64
    cosines: np.ndarray  # (n, n) float32


def sample_examples(
    n_examples: int, read: Callable[[np.ndarray, np.ndarray], np.ndarray], *, seed: Sequence[int]
) -> Sample:
    """Draw the sample.

    Args:
        n_examples: N.
        read: returns the stored cosines of given rows and columns, ascending.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    n = min(HALF, n_examples)
    drawn = np.sort(random.choice(n_examples, size=n, replace=False))
    nearness = np.abs(read(drawn, np.arange(n_examples))).mean(0)
    nearness[drawn] = np.inf
    nearness[nearness == 0] = 2.0  # a zero gradient goes last: nothing to go wrong
    near_zero = np.argsort(nearness, kind="stable")[: min(HALF, n_examples - n)]
    examples = np.sort(np.concatenate([drawn, near_zero]))
    return Sample(examples, read(examples, examples))


def error_bound(
    model: nn.Module,
    loss: Loss,
    inputs: Nest,
    targets: Nest,
    cosines: np.ndarray,
    *,
    names: Sequence[str],
    memory: int,
) -> float:
    """Return the largest |stored − float64| over the sample's pairs, times the margin.

    Args:
        model: of the checkpoint, in evaluation mode.
        loss: as in `PerExampleGradients`.
        inputs: the sample's, N first.
        targets: the sample's.
        cosines: stored, (N, N).
        names: parameters in play.
        memory: bytes that float64 gradients may take.
    """
    truth = Reference(model, loss, names).cosines(inputs, targets, memory=memory)
    pairs = np.triu_indices(len(cosines), 1)
    difference = np.abs(torch.from_numpy(cosines).double().numpy() - truth.numpy())[pairs]
    # As float32: the last digits of float64 sums depend on how many examples the memory holds.
    worst = float(np.float32(difference.max())) if difference.size else 0.0
    return max(MARGIN * worst, FLOOR)
