"""Whether the numbers of a chunk can be what they say they are. Pure.

Axis letters: N rows and M columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from distributed_stiffness.engine.whole_matrix import allowed_difference
from distributed_stiffness.verify.faults import Kind

LIMITS: Mapping[str, tuple[float, float]] = {
    "cosine": (-1.0, 1.0),
    "distance": (0.0, 2.0),
    "gradient_norm": (0.0, math.inf),
    "loss": (0.0, math.inf),
    "train_loss": (0.0, math.inf),
    "validation_loss": (0.0, math.inf),
    "train_accuracy": (0.0, 1.0),
    "validation_accuracy": (0.0, 1.0),
    "error_bound": (0.0, math.inf),
    "undecided": (0.0, math.inf),
}
# A loss of the user's own may be below 0.
LIMITS_OF_ANY_LOSS = {
    name: (-math.inf, high) if "loss" in name else (low, high)
    for name, (low, high) in LIMITS.items()
}
# A unit row times itself, in float32 or coarser: 2e-7 was seen, and the error bound is added.
DIAGONAL = 1e-5
# A bound that was measured on wrong cosines is no excuse for them.
LARGEST_BOUND = 0.05
# Of an error bound: a count of pairs below it is taken for right if it is so within this.
_ROUNDING = 1e-6

Wrong = tuple[Kind, str]


def wrong_numbers(
    name: str,
    values: np.ndarray,
    first: tuple[int, ...],
    *,
    limits: Mapping[str, tuple[float, float]] = LIMITS,
) -> Wrong | None:
    """Look for numbers that are not finite or out of the array's range.

    Args:
        name: of the array.
        values: of one chunk.
        first: place in the matrix, or among the examples, of the first of them; () for a number
            that a checkpoint has one of.
        limits: of every array.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        return "not finite", f"{_how_many(bad)} not finite, the first {_where(bad, first)}"
    low, high = limits[name]
    bad = (values < low) | (values > high)
    if bad.any():
        value = values[bad][0]
        return "out of range", (
            f"{_how_many(bad)} outside [{low:g}, {high:g}], the first, {value:g},"
            f" {_where(bad, first)}"
        )
    return None


def tolerance(bound: float) -> float:
    """Return how far beyond 1 a cosine may be under an error bound; NaN: not known."""
    return DIAGONAL if np.isnan(bound) else max(DIAGONAL, min(bound, LARGEST_BOUND))


def wrong_tile(
    name: str,
    tile: np.ndarray,
    first: tuple[int, int],
    *,
    norms: tuple[np.ndarray, np.ndarray],
    tolerance: float = DIAGONAL,
) -> Wrong | None:
    """Look for numbers that a tile of cosines or distances cannot hold.

    Args:
        name: "cosine" or "distance".
        tile: (N, M).
        first: row and column of its first number in the matrix; the same for a diagonal tile.
        norms: gradient norms of its rows and columns, (N,) and (M,); NaN: not known.
        tolerance: of a diagonal.

    Returns:
        The kind of fault and a sentence, or None.
    """
    wrong = wrong_numbers(name, tile, first)
    if wrong is None and name == "cosine":
        wrong = _wrong_zeros(tile, first, *norms)
    if wrong is None and first[0] == first[1]:
        wrong = _wrong_diagonal(name, tile, first, norms[0], tolerance)
    return wrong


def _wrong_zeros(
    tile: np.ndarray, first: tuple[int, int], row_norms: np.ndarray, column_norms: np.ndarray
) -> Wrong | None:
    if row_norms.all() and column_norms.all():
        return None
    bad = ((row_norms[:, None] == 0) | (column_norms == 0)) & (tile != 0)
    if not bad.any():
        return None
    return "zero gradient", (
        f"{_how_many(bad)} not 0 though a gradient_norm is, the first {_where(bad, first)}"
    )


def _wrong_diagonal(
    name: str, tile: np.ndarray, first: tuple[int, int], norms: np.ndarray, tolerance: float
) -> Wrong | None:
    diagonal = np.diagonal(tile)
    if name == "distance":
        bad = diagonal != 0
    else:
        # 0 where the norm is; either where it is not known.
        bad = (np.abs(diagonal - 1) > tolerance) & ((norms > 0) | (diagonal != 0))
    if bad.any():
        at = first[0] + int(np.argmax(bad))
        expected = 0 if name == "distance" else 1
        return "diagonal", (
            f"{_how_many(bad)} of the diagonal not {expected}, the first, {diagonal[bad][0]:g},"
            f" at example {at}"
        )
    return None


def asymmetry(tile: np.ndarray, transposed: np.ndarray, first: tuple[int, int]) -> Wrong | None:
    """Compare the float32 tiles (I, J), (N, M), and (J, I), (M, N), bit for bit."""
    bad = tile.view(np.uint32) != np.ascontiguousarray(transposed.T).view(np.uint32)
    if bad.any():
        return "asymmetric", (
            f"{_how_many(bad)} not those of the transposed tile, the first {_where(bad, first)}"
        )
    return None


def undecided(tile: np.ndarray, bound: float, *, is_diagonal: bool) -> np.ndarray:
    """Count the pairs i < j with 0 < |cosine| < bound: at least and at most, (2,) int64."""
    size = np.abs(tile)
    size[tile == 0] = np.inf
    if is_diagonal:
        size[np.tril_indices(len(size))] = np.inf
    return np.array(
        [np.count_nonzero(size < bound * (1 + side * _ROUNDING)) for side in (-1, 1)],
        dtype=np.int64,
    )


def impossible_correct(loss: np.ndarray, correct: np.ndarray, n_classes: int) -> Wrong | None:
    """Compare cross-entropies with whether the largest output is the label's, both (N,).

    If it is, the label has at least its share of the probability, 1/C; if not, at most 1/2.
    """
    slack = 1e-6
    bad = np.where(correct, loss > math.log(n_classes) + slack, loss < math.log(2) - slack)
    if bad.any():
        return "inconsistent", (
            f"{int(bad.sum())} of {bad.size} have a loss that an example classified"
            f" {'correctly' if correct[bad][0] else 'wrongly'} cannot have"
        )
    return None


def wrong_whole_matrix_check(
    said: Any, place: Mapping[str, float], *, bound: float, n_classes: int
) -> Wrong | None:
    """Look at the attribute `whole_matrix_check` of a finished store.

    Args:
        said: its value; None: it is not there.
        place: of the checkpoint that is checked as a whole.
        bound: its error bound; NaN: not known.
        n_classes: of the data.
    """
    if said is None:
        return "missing", "is not there in a finished store"
    try:
        at = {name: said[name] for name in place}
        difference, classes = float(said["largest_difference"]), int(said["classes"])
        norm_error = float(said.get("norm_error", 0.0))
    except (KeyError, TypeError, ValueError):
        return "inconsistent", f"is {said!r:.80}: expected a checkpoint and what was compared there"
    if at != place:
        return "inconsistent", f"is of {at}: expected the last checkpoint, {place}"
    if not 1 <= classes <= n_classes:
        return "inconsistent", f"compares {classes} classes of {n_classes}"
    allowed = math.inf if np.isnan(bound) else allowed_difference(bound, norm_error)
    if not 0 <= norm_error <= 1 or not 0 <= difference <= allowed:
        return "inconsistent", (
            f"two means differ by {difference:.2g}, which the error bound, {bound:.2g}, does not"
            " allow"
        )
    return None


def _how_many(bad: np.ndarray) -> str:
    n = int(bad.sum())
    return f"{n:,} of {bad.size:,} number{'s are' if n != 1 else ' is'}"


def _where(bad: np.ndarray, first: tuple[int, ...]) -> str:
    if not first:
        return "here"
    found = np.unravel_index(int(np.argmax(bad)), bad.shape)
    names = ("example", "other")
    return "at " + ", ".join(
        f"{name} {start + int(k)}" for name, start, k in zip(names, first, found, strict=False)
    )
