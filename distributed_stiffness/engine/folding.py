"""The compiled loop that folds a tile of cosines into sums, by class and by distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from distributed_stiffness.threads import in_threads

# Rows folded side by side, so that a tile is read along its memory whichever way it lies, and the
# sums that are worked on stay in the cache.
_SIDE = 4
_SHARE = 256  # rows that a thread takes at a time


@dataclass(frozen=True)
class Folded:
    """Sums over the pairs of each row's example, (n, …) float64."""

    by_class: np.ndarray  # (n, S, C, 4) of cosine, of sign, pairs with a cosine, pairs
    by_distance: np.ndarray  # (n, S, 2, K, 4) the same within a class (0) and between classes (1)
    weighted: np.ndarray  # (n, S, C) of cosine · norm of the other
    squares: np.ndarray  # (n, S, 2) of cosine², and of (cosine · norm of the other)²


def fold(
    cosine: np.ndarray,
    distance: np.ndarray,
    *,
    first: tuple[int, int],
    classes: np.ndarray,
    splits: np.ndarray,
    norms: np.ndarray,
    edges: np.ndarray,
    n_splits: int,
    n_classes: int,
) -> Folded:
    """Add up the pairs of each row's example, over the columns by class and by distance bin.

    Bins are equal; what lies beyond the outermost edges is counted in the outermost bins. A pair
    with a zero gradient counts as a pair, not as one with a cosine; self-pairs do not count.

    Args:
        cosine: (n, m) float32, of any memory layout.
        distance: (n, m) float32.
        first: the examples of the first row and the first column.
        classes: of all examples, (N,) int64.
        splits: of all examples, counted from 0, (N,) int64.
        norms: of all examples' gradients, at true scale, (N,) float64; only those of rows and
            columns are looked at.
        edges: of the bins, (K + 1,).
        n_splits: S.
        n_classes: C.
    """
    n, bins = len(cosine), len(edges) - 1
    # Of cosine, sign and cosine · norm, and of the squares of the first and the third.
    by_group = np.zeros((n, n_splits, n_classes, 5))
    by_distance = np.zeros((n, n_splits, 2, bins, 4))
    scale = bins / float(edges[-1] - edges[0])

    def some(part: slice) -> None:
        _fold(
            cosine[part],
            distance[part],
            (first[0] + part.start, first[1]),
            classes,
            splits,
            norms,
            np.float32(edges[0]),
            np.float32(scale),
            by_group[part],
            by_distance[part],
        )

    in_threads(some, n, at_most=_SHARE)
    by_class = np.empty((n, n_splits, n_classes, 4))
    by_class[..., :2] = by_group[..., :2]
    rows, columns = (slice(k, k + length) for k, length in zip(first, cosine.shape, strict=True))
    groups = splits[columns] * n_classes + classes[columns]
    nonzero = [norms[part] != 0 for part in (rows, columns)]
    everyone = [np.ones_like(of) for of in nonzero]
    for k, (of_rows, of_columns) in ((2, nonzero), (3, everyone)):
        _count_pairs(by_class[..., k], of_rows, of_columns, groups, first=first[0] - first[1])
    squares = np.stack([by_group[..., k].sum(-1) for k in (3, 4)], axis=-1)
    return Folded(by_class, by_distance, by_group[..., 2], squares)


def count_exponents(cosine: np.ndarray, *, diagonal: bool) -> np.ndarray:
    """Count pairs by the exponent of their cosine, (256,) int64: 126 stands for [1/2, 1).

    Cosines of exactly 0 are left out, and so is, of a tile on the diagonal, all but what lies above
    its diagonal.
    """
    bits = cosine.view(np.int32)
    counts: list[np.ndarray] = []

    def some(part: slice) -> None:
        of_part = np.zeros(256, dtype=np.int64)
        _count(bits[part], part.start if diagonal else -len(bits), of_part)
        counts.append(of_part)

    in_threads(some, len(bits), at_most=_SHARE)
    total: np.ndarray = np.sum(counts, axis=0)
    return total


def _count_pairs(
    pairs: np.ndarray, rows: np.ndarray, columns: np.ndarray, groups: np.ndarray, *, first: int
) -> None:
    """Count the pairs of each row with the columns of each split and class.

    Labels say how many there are, so that the loop over pairs need not count.

    Args:
        pairs: where they are written, (n, S, C) float64.
        rows: which of them count, (n,) bool.
        columns: which of them count, (m,) bool.
        groups: split · C + class of the columns, (m,).
        first: which column is the example of the first row; it may be none.
    """
    n_classes = pairs.shape[2]
    of_group = np.bincount(groups[columns], minlength=pairs[0].size).reshape(pairs.shape[1:])
    np.multiply(rows[:, None, None], of_group, out=pairs)
    both = np.arange(max(0, -first), min(len(rows), len(columns) - first))
    split, label = np.divmod(groups[both + first], n_classes)
    pairs[both, split, label] -= rows[both]  # self-pairs


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fold(
    cosine: np.ndarray,
    distance: np.ndarray,
    first: tuple[int, int],
    classes: np.ndarray,
    splits: np.ndarray,
    norms: np.ndarray,
    low: np.float32,
    scale: np.float32,
    by_group: np.ndarray,
    by_distance: np.ndarray,
) -> None:
    n, m = cosine.shape
    bins = by_distance.shape[3]
    for start in range(0, n, _SIDE):
        stop = min(start + _SIDE, n)
        for j in range(m):
            column = first[1] + j
            split, label, norm = splits[column], classes[column], norms[column]
            for i in range(start, stop):
                row = first[0] + i
                if row == column:
                    continue
                k = min(max(np.int64((distance[i, j] - low) * scale), 0), bins - 1)
                relation = 0 if classes[row] == label else 1
                known = 0.0 if norm == 0 or norms[row] == 0 else 1.0
                value = known * np.float64(cosine[i, j])
                sign = np.float64(value > 0) - np.float64(value < 0)
                weighted = value * norm
                # Side by side, for they are in one line of the cache.
                by_group[i, split, label, 0] += value
                by_group[i, split, label, 1] += sign
                by_group[i, split, label, 2] += weighted
                by_group[i, split, label, 3] += value * value
                by_group[i, split, label, 4] += weighted * weighted
                by_distance[i, split, relation, k, 0] += value
                by_distance[i, split, relation, k, 1] += sign
                by_distance[i, split, relation, k, 2] += known
                by_distance[i, split, relation, k, 3] += 1.0


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _count(bits: np.ndarray, first: int, counts: np.ndarray) -> None:
    n, m = bits.shape
    for i in range(n):
        for j in range(max(0, first + i + 1), m):
            size = bits[i, j] & 0x7FFFFFFF
            if size:
                counts[size >> 23] += 1
