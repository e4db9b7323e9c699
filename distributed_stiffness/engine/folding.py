"""The compiled loop that folds a tile of cosines into sums, by class and by distance."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit

# Rows folded side by side, so that a tile is read along its memory whichever way it lies, and the
# sums that are worked on stay in the cache.
_SIDE = 4
_SHARE = 256  # rows that a thread takes at a time


def fold(
    cosine: np.ndarray,
    distance: np.ndarray,
    *,
    first: tuple[int, int],
    classes: np.ndarray,
    splits: np.ndarray,
    zero: np.ndarray,
    edges: np.ndarray,
    n_splits: int,
    n_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Add up the pairs of each row's example, over the columns by class and by distance bin.

    Bins are equal; what lies beyond the outermost edges is counted in the outermost bins. A pair
    with a zero gradient counts as a pair, not as one with a cosine; self-pairs do not count.

    Args:
        cosine: (n, m) float32, of any memory layout.
        distance: (n, m) float32.
        first: the examples of the first row and the first column.
        classes: of all examples, (N,) int64.
        splits: of all examples, counted from 0, (N,) int64.
        zero: whether an example has no gradient, (N,).
        edges: of the bins, (K + 1,).
        n_splits: S.
        n_classes: C.

    Returns:
        (n, S, C, 4) and (n, S, 2, K, 4) float64; relation 0 is within a class, 1 between classes;
        the four are sums of cosine, of sign, pairs with a cosine, pairs.
    """
    n, bins = len(cosine), len(edges) - 1
    by_class = np.zeros((n, n_splits, n_classes, 4))
    by_distance = np.zeros((n, n_splits, 2, bins, 4))
    scale = bins / float(edges[-1] - edges[0])

    def some(start: int) -> None:
        part = slice(start, min(start + _SHARE, n))
        _fold(
            cosine[part],
            distance[part],
            (first[0] + start, first[1]),
            classes,
            splits,
            zero,
            np.float32(edges[0]),
            np.float32(scale),
            by_class[part],
            by_distance[part],
        )

    _in_threads(some, range(0, n, _SHARE))
    return by_class, by_distance


def count_exponents(cosine: np.ndarray, *, diagonal: bool) -> np.ndarray:
    """Count pairs by the exponent of their cosine, (256,) int64: 126 stands for [1/2, 1).

    Cosines of exactly 0 are left out, and so is, of a tile on the diagonal, all but what lies above
    its diagonal.
    """
    bits = cosine.view(np.int32)
    starts = range(0, len(bits), _SHARE)
    counts = np.zeros((len(starts), 256), dtype=np.int64)

    def some(start: int) -> None:
        first = start if diagonal else -len(bits)
        _count(bits[start : start + _SHARE], first, counts[start // _SHARE])

    _in_threads(some, starts)
    total: np.ndarray = counts.sum(0)
    return total


def _in_threads(work: Callable[[int], None], starts: range) -> None:
    """Run a compiled loop, which holds no lock, on as many threads as torch has."""
    threads = min(torch.get_num_threads(), len(starts))
    if threads < 2:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, starts))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fold(
    cosine: np.ndarray,
    distance: np.ndarray,
    first: tuple[int, int],
    classes: np.ndarray,
    splits: np.ndarray,
    zero: np.ndarray,
    low: np.float32,
    scale: np.float32,
    by_class: np.ndarray,
    by_distance: np.ndarray,
) -> None:
    n, m = cosine.shape
    bins = by_distance.shape[3]
    for start in range(0, n, _SIDE):
        stop = min(start + _SIDE, n)
        for j in range(m):
            column = first[1] + j
            split, label, column_zero = splits[column], classes[column], zero[column]
            for i in range(start, stop):
                row = first[0] + i
                if row == column:
                    continue
                k = min(max(np.int64((distance[i, j] - low) * scale), 0), bins - 1)
                relation = 0 if classes[row] == label else 1
                known = 0.0 if column_zero or zero[row] else 1.0
                value = known * np.float64(cosine[i, j])
                sign = np.float64(value > 0) - np.float64(value < 0)
                by_class[i, split, label, 0] += value
                by_class[i, split, label, 1] += sign
                by_class[i, split, label, 2] += known
                by_class[i, split, label, 3] += 1.0
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
