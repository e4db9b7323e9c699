"""How far cosines can be from the truth, measured on a sample of pairs, and what follows from that.

Examples are drawn at random, and as many others whose cosines with those are nearest zero on
average: of these pairs are the signs that are most in danger. Each pair is recomputed by
`Reference`, which shares no code with the rules. A bound above what is allowed is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distributed_stiffness.certainty import allowed_error
from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients.batches import Nest, take
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.reference import gradients_made, held_and_streamed

# Examples of a sample: at most, and where more would take long.
MOST, FEWEST = 96, 24
# What the checks of a sample may take of the time of what they check.
SHARE = 0.03
_ALWAYS = 1e8  # multiply-adds that are never grudged
# The bound is the largest difference seen, times this: a sample of pairs does not hold the worst.
# On an over-fitted net all 499,500 pairs held one 3.7 times as large as a sample of 96 examples
# (docs/design/0002-numbers.md); of 24 examples there are 17 times fewer pairs.
MARGIN = 5.0
_MARGIN_OF_FEW = 8.0
# No float32 cosine is claimed to be better than this (half a unit in the last place at 1).
FLOOR = 6e-8


@dataclass(frozen=True)
class Sample:
    """Examples, ascending, and their stored cosines with each other."""

    examples: np.ndarray  # (n,) int64
    cosines: np.ndarray  # (n, n) float32


def sample_size(*, passes: int, total: float, n_parameters: int, memory: int) -> int:
    """Return how many examples a sample has, by counted work.

    Args:
        passes: multiply-adds of a forward and backward pass over one example.
        total: multiply-adds of the matrix.
        n_parameters: P.
        memory: bytes that float64 gradients may take: where it holds few, each is made often.
    """
    # In float64, alone, and with the parameters' gradients: three times a half, four times as dear.
    affordable = max(SHARE * total, _ALWAYS) / (6 * max(1, passes))

    def made(n: int) -> int:
        return gradients_made(n, held_and_streamed(n, n_parameters, memory=memory)[0])

    return max((n for n in range(FEWEST, MOST + 1) if made(n) <= affordable), default=FEWEST)


def sample_examples(
    n_examples: int,
    read: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    seed: Sequence[int],
    size: int = MOST,
) -> Sample:
    """Draw the sample.

    Args:
        n_examples: N.
        read: returns the stored cosines of given rows and columns, ascending.
        seed: of the draw.
        size: of the sample.
    """
    order, everyone = np.random.default_rng(seed).permutation(n_examples), np.arange(n_examples)
    n = min(max(1, size // 2), n_examples)
    drawn, cosines = order[:n], np.empty(0)
    for start in range(0, n_examples, n):
        some = np.sort(order[start : start + n])
        cosines = np.abs(read(some, everyone))
        # Zero gradients, whose cosines are all 0, are nobody's evidence.
        has_gradient = (cosines != 0).any(0)
        if has_gradient.any():
            drawn = np.sort(order[has_gradient[order]][:n])
            cosines = cosines if np.array_equal(drawn, some) else np.abs(read(drawn, everyone))
            break
    nearness = cosines.mean(0)
    nearness[drawn] = np.inf
    nearness[nearness == 0] = 2.0  # a zero gradient goes last: nothing to go wrong
    near_zero = np.argsort(nearness, kind="stable")[
        : min(size - len(drawn), n_examples - len(drawn))
    ]
    examples = np.sort(np.concatenate([drawn, near_zero]))
    return Sample(examples, read(examples, examples))


def sample_columns(cosines: np.ndarray, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows and columns of a matrix of other columns than rows, (N, M), about `size` in all.

    Half of the columns are those whose cosines with the rows are nearest zero on average.
    """
    random, n = np.random.default_rng(0), size // 2
    alive = [np.flatnonzero((cosines != 0).any(axis)) for axis in (1, 0)]
    rows, columns = (
        random.permutation(found if len(found) else np.arange(length))
        for found, length in zip(alive, cosines.shape, strict=True)
    )
    rows = np.sort(rows[:n])
    nearness = np.abs(cosines[rows]).mean(0)
    chosen, others = columns[: (n + 1) // 2], columns[(n + 1) // 2 :]
    near_zero = others[np.argsort(nearness[others], kind="stable")[: n // 2]]
    return rows, np.sort(np.concatenate([chosen, near_zero]))


@dataclass(frozen=True)
class SampleBound:
    """The bound of some numbers, and the pair of the sample that is furthest off."""

    bound: float
    row: int
    column: int
    found: float
    true: float


def bound_of(found: np.ndarray, true: np.ndarray, *, symmetric: bool) -> SampleBound:
    """Return the bound of a sample's numbers.

    Args:
        found: (N, M), or (K, N, M) of groups.
        true: the same in float64.
        symmetric: whether rows and columns are the same examples: each pair counts once, and
            self-pairs do not.
    """
    difference = np.abs(np.asarray(found, dtype=np.float64) - true)
    n = difference.shape[-2]
    if symmetric:
        difference = np.where(np.triu(np.ones((n, n), dtype=bool), 1), difference, 0.0)
    if not difference.size:
        return SampleBound(FLOOR, 0, 0, 0.0, 0.0)
    place = np.unravel_index(np.argmax(difference), difference.shape)  # NaN is the largest
    # As float32: the last digits of float64 sums depend on how many examples the memory holds.
    worst = float(np.float32(difference[place]))
    margin = MARGIN if n >= MOST or n * difference.shape[-1] >= MOST**2 // 2 else _MARGIN_OF_FEW
    bound = margin * worst
    return SampleBound(
        bound if not bound < FLOOR else FLOOR,
        int(place[-2]),
        int(place[-1]),
        float(np.asarray(found)[place]),
        float(true[place]),
    )


def refuse_bound(
    bound: SampleBound,
    gradients: PerExampleGradients,
    rows: tuple[np.ndarray, tuple[Nest, Nest]],
    columns: tuple[np.ndarray, tuple[Nest, Nest]] | None = None,
    *,
    n_sample: int,
    what: str = "a cosine",
) -> None:
    """Refuse numbers whose bound is above what is allowed.

    Args:
        bound: of the sample.
        gradients: that made the numbers.
        rows: numbers of the sample's examples, and the examples.
        columns: of the columns, where they are others.
        n_sample: examples that were recomputed.
        what: the bound is of.

    Raises:
        GradientError: names the pair, the parameter if it can be told, and what to try.
    """
    allowed = allowed_error(gradients.precision.name)
    if bound.bound <= allowed:
        return
    numbers, examples = rows
    others, _ = columns or rows
    one = take(examples, slice(bound.row, bound.row + 1))
    differs = f"example {numbers[bound.row]} differs"
    if what == "a cosine":
        differs = f"examples {numbers[bound.row]} and {others[bound.column]} differ"
    raise GradientError(
        f"the error bound of {what} is {bound.bound:.2g}, above the {allowed:g} that is allowed: of"
        f" {n_sample} examples that were computed again one at a time in float64, {differs}"
        f" most (here {bound.found:.5g}, there {bound.true:.5g}){_where(gradients, one)}. With"
        " allow_error=True (--allow-error) the numbers are given all the same"
    )


def _where(gradients: PerExampleGradients, one: tuple[Nest, Nest]) -> str:
    """Say which parameter's gradient of an example is off when it is alone, and what to try."""
    everyone = torch.zeros(1, dtype=torch.int64, device="cpu")
    (found,), (true,) = (some.unit_of(*one, everyone) for some in (gradients, gradients.in_float64))
    sizes: Mapping[str, float] = {
        name: float(torch.linalg.vector_norm(found[name].to(g.dtype) - g))
        for name, g in true.items()
    }
    name = max(sizes, key=sizes.__getitem__)
    if not sizes[name] > 1e-4:
        return (
            "; alone that example's gradient is right, so that it is its company that moves it: the"
            " examples depend on each other, or rounding depends on their number (try"
            " precision='float64')"
        )
    module = name.rpartition(".")[0] or "the network"
    return (
        f"; most of it lies in {name!r} (in {module}). Try precision='float64', or a loss of"
        " (outputs, targets) in place of a WholeLoss"
    )
