"""Compiled loops that look at each example for the argument that is nearest to a kink.

They read what a pass has just made once, where torch would read and write it several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from distributed_stiffness.threads import in_threads

# So many units of an example may be exactly at a kink by chance, as where a sum cancels; more are
# so by construction, in every precision: a region that is black, a channel that is dead.
FEW = 8
_WORTH_A_THREAD = 2**21  # numbers
_TINY = np.finfo(np.float32).tiny


class Nearest(NamedTuple):
    """How near the units of each example come to a kink.

    Where more than `FEW` of them are on it, these do not count.
    """

    distance: Tensor  # (N,) the smallest weighted one; infinite where none counts
    size: Tensor  # (N,) root mean square of the units, which says what rounding is


def is_for_loops(x: Tensor) -> bool:
    """Whether the compiled loops can read a tensor; a network may cast on its way."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.is_neg()


def nearest(x: Tensor, distance: Tensor, weight: Tensor) -> Nearest:
    """Look at distances (N, …), in any memory format, each times the weight of its unit (…).

    `x` are the units that they are the distances of; the same tensor where the kink is at 0.
    """
    if not is_for_loops(distance):
        weighted = (distance.abs() * weight).flatten(1)
        on_it = weighted == 0
        many = on_it.sum(1, keepdim=True) > FEW
        return Nearest(weighted.masked_fill(on_it & many, math.inf).amin(1), _size(x))
    # Flattened as they lie: no copy is made.
    order = sorted(range(1, distance.dim()), key=distance.stride, reverse=True)
    units = distance.detach().permute(0, *order).flatten(1).numpy()
    in_order = weight.expand(distance.shape[1:]).permute([axis - 1 for axis in order])
    weights = in_order.flatten().numpy()
    found = _found(units, lambda some, *into: _nearest(units[some], weights, *into))
    return found if x is distance else Nearest(found.distance, _size(x))


def nearest_pairs(
    x: Tensor, weight: Tensor, size: tuple[int, int], step: tuple[int, int]
) -> Nearest:
    """Look at the largest of each window of images (N, C, H, W) against the second; see `gap`.

    Only of what `is_for_loops`, and windows within the image. Windows whose largest is 0 are on
    the kink if the second is 0 too; any other tie is at the smallest distance that there is.
    `weight` is of each window, (C, h, w) or what can be expanded to it.
    """
    images = x.detach().permute(0, 2, 3, 1).contiguous().numpy()
    windows = [(x.shape[2 + k] - size[k]) // step[k] + 1 for k in (0, 1)]
    # Of every column: where no window begins the distance is infinite, or no number.
    weights = np.full((windows[0], x.shape[3], x.shape[1]), np.inf, np.float32)
    begin = slice(0, windows[1] * step[1], step[1])
    weights[:, begin] = weight.expand(x.shape[1], *windows).permute(1, 2, 0).numpy()
    return _found(
        images, lambda some, *into: _nearest_pairs(images[some], weights, *size, step[0], *into)
    )


def _found(examples: np.ndarray, look: Callable[..., None]) -> Nearest:
    """Look at all; `look` writes the bits of the smallest distance, and the sum of squares."""
    n, numbers = len(examples), examples[:1].size
    bits, square = np.empty(n, np.uint32), np.empty(n, np.float64)
    at_least = max(1, _WORTH_A_THREAD // max(1, numbers))
    in_threads(lambda some: look(some, bits[some], square[some]), n, at_least=at_least)
    size = np.sqrt(square / max(1, numbers)).astype(np.float32)
    return Nearest(torch.from_numpy(bits.view(np.float32)), torch.from_numpy(size))


def _size(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))
    size: Tensor = norm / max(1, math.prod(x.shape[1:])) ** 0.5
    return size


# Sizes of float32 numbers are ordered as their bits are, without the sign. Less 1, a 0 becomes the
# largest of all and infinity stays below it: smallest numbers are found among integers, several
# at a time, which the rules of floating point forbid.
_SIZE, _ONE, _NONE = np.uint32(0x7FFFFFFF), np.uint32(1), np.uint32(0xFFFFFFFF)
_INFINITY = np.uint32(0x7F800000)


_BLOCK = 2048  # weighted distances that stay in the first cache until they are compared


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest(
    units: np.ndarray, weight: np.ndarray, smallest: np.ndarray, square: np.ndarray
) -> None:
    weighted = np.empty(_BLOCK, np.float32)
    bits = weighted.view(np.uint32)
    for i in range(units.shape[0]):
        row, least, zeros, total = units[i], _NONE, np.uint32(0), 0.0
        for start in range(0, row.shape[0], _BLOCK):
            # Slices: an index that is a sum may be negative, and then nothing is done in parallel.
            some, weights = row[start : start + _BLOCK], weight[start : start + _BLOCK]
            for j in range(some.shape[0]):
                weighted[j] = some[j] * weights[j]
            least, zeros = _least(bits[: some.shape[0]], least, zeros)
            total += _sum_of_squares(some)
        smallest[i], square[i] = _distance(least, zeros), total


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest_pairs(
    images: np.ndarray,
    weight: np.ndarray,
    height: int,
    width: int,
    down: int,
    smallest: np.ndarray,
    square: np.ndarray,
) -> None:
    n, H, W, C = images.shape
    length = W * C
    lines, weights = images.reshape(n, H, length), weight.reshape(-1, length)
    # Of a line of windows, of which one begins at every column: the largest and the second of what
    # lies under each column, then of each window but for its last column.
    tops = np.zeros(length + width * C, np.float32)
    seconds = np.zeros_like(tops)
    top, second = tops, seconds
    if width > 2:
        top, second = np.empty(length, np.float32), np.empty(length, np.float32)
    nothing = np.full(length, np.float32(-np.inf))
    gaps = np.empty(length, np.float32)
    bits = gaps.view(np.uint32)
    for i in range(n):
        least, zeros, total = _NONE, np.uint32(0), 0.0
        for y in range(H):
            total += _sum_of_squares(lines[i, y])
        for y in range(weights.shape[0]):
            line = lines[i, y * down]
            other = lines[i, y * down + 1] if height > 1 else nothing
            for j in range(length):
                is_larger = line[j] > other[j]
                tops[j] = line[j] if is_larger else other[j]
                seconds[j] = other[j] if is_larger else line[j]
            for k in range(2, height):
                _add(lines[i, y * down + k], nothing, tops, seconds)
            if width > 2:
                for j in range(length):  # several times as fast as to assign a slice
                    top[j], second[j] = tops[j], seconds[j]
                for k in range(1, width - 1):
                    _add(tops[k * C :][:length], seconds[k * C :], top, second)
            last_tops = tops[(width - 1) * C :] if width > 1 else nothing
            last_seconds = seconds[(width - 1) * C :] if width > 1 else nothing
            _gaps(top, second, last_tops, last_seconds, weights[y], gaps)
            least, zeros = _least(bits, least, zeros)
        smallest[i], square[i] = _distance(least, zeros), total


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _add(more: np.ndarray, more_seconds: np.ndarray, tops: np.ndarray, seconds: np.ndarray) -> None:
    """Bring in the largest of more numbers, and the second of them."""
    for j in range(more.shape[0]):
        tops[j], seconds[j] = _two_largest(more[j], more_seconds[j], tops[j], seconds[j])


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _gaps(
    tops: np.ndarray,
    seconds: np.ndarray,
    more: np.ndarray,
    more_seconds: np.ndarray,
    weights: np.ndarray,
    gaps: np.ndarray,
) -> None:
    """As `_add`; but write the weighted difference."""
    for j in range(gaps.shape[0]):
        top, second = _two_largest(more[j], more_seconds[j], tops[j], seconds[j])
        gap = (top - second) * weights[j]
        gaps[j] = _TINY if (gap == 0) & (top != 0) else gap


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _two_largest(value: float, below: float, top: float, second: float) -> tuple[float, float]:
    """Return the two largest of two pairs, the larger of each first."""
    other = value if value < top else top
    second = below if below > second else second
    return value if value > top else top, other if other > second else second


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _least(bits: np.ndarray, least: np.uint32, zeros: np.uint32) -> tuple[np.uint32, np.uint32]:
    """Return the bits of the smallest size so far, less 1, and how many sizes were 0."""
    for j in range(bits.shape[0]):
        size = bits[j] & _SIZE
        zeros += np.uint32(size == 0)
        least = min(least, np.uint32(size - _ONE))
    return least, zeros


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _distance(least: np.uint32, zeros: np.uint32) -> np.uint32:
    """Return the bits of the distance that counts."""
    if 0 < zeros <= FEW:
        return np.uint32(0)
    return np.uint32(least + _ONE) if least < _INFINITY else _INFINITY


# Several sums at a time, which the order of floating point forbids.
@njit(nogil=True, fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _sum_of_squares(numbers: np.ndarray) -> np.float32:
    total = np.float32(0)
    for j in range(numbers.shape[0]):
        total += numbers[j] * numbers[j]
    return total
