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

_WORTH_A_THREAD = 2**20  # numbers
_TINY = np.finfo(np.float32).tiny


class Nearest(NamedTuple):
    """How near the units of each example come to a kink, but for those that are on it."""

    distance: Tensor  # (N,) the smallest weighted one that is not 0; infinite where there is none
    on_it: Tensor  # (N,) int32, units


def is_for_loops(x: Tensor) -> bool:
    """Whether the compiled loops can read a tensor; a network may cast on its way."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def nearest(distance: Tensor, weight: Tensor) -> Nearest:
    """Look at distances (N, …), in any memory format, each times the weight of its unit (…)."""
    if not is_for_loops(distance):
        size = (distance.abs() * weight).flatten(1)
        on_it = size == 0
        return Nearest(size.masked_fill(on_it, math.inf).amin(1), on_it.sum(1, dtype=torch.int32))
    units = in_memory_order(distance.detach()).numpy()
    order = [axis - 1 for axis in _memory_order(distance)]
    weights = weight.expand(distance.shape[1:]).permute(order).flatten().numpy()
    return _found(units, lambda some, *found: _nearest(units[some], weights, *found))


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
    weights = weight.expand(x.shape[1], *windows).permute(1, 2, 0).contiguous().numpy()
    return _found(
        images, lambda some, *found: _nearest_pairs(images[some], weights, *size, *step, *found)
    )


def _found(examples: np.ndarray, look: Callable[..., None]) -> Nearest:
    """Look at all; `look` writes the bits of the smallest distance, less 1, and how many are 0."""
    n = len(examples)
    smallest, on_it = np.empty(n, np.uint32), np.empty(n, np.uint32)
    at_least = max(1, _WORTH_A_THREAD // max(1, examples[:1].size))
    in_threads(lambda some: look(some, smallest[some], on_it[some]), n, at_least=at_least)
    distance = np.where(smallest == _NONE, np.float32(np.inf), (smallest + _ONE).view(np.float32))
    return Nearest(torch.from_numpy(distance), torch.from_numpy(on_it.astype(np.int32)))


def in_memory_order(units: Tensor) -> Tensor:
    """Flatten the units of each example, in the order in which they lie: no copy is made."""
    return units.permute(0, *_memory_order(units)).flatten(1)


def _memory_order(units: Tensor) -> list[int]:
    return sorted(range(1, units.dim()), key=units.stride, reverse=True)


# Sizes of float32 numbers are ordered as their bits are, without the sign. Less 1, a 0 becomes the
# largest of all and infinity stays below it: smallest numbers are found among integers, several
# at a time, which the rules of floating point forbid.
_SIZE, _ONE, _NONE = np.uint32(0x7FFFFFFF), np.uint32(1), np.uint32(0xFFFFFFFF)


_BLOCK = 2048  # weighted distances that stay in the first cache until they are compared


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest(
    units: np.ndarray, weight: np.ndarray, smallest: np.ndarray, on_it: np.ndarray
) -> None:
    weighted = np.empty(_BLOCK, np.float32)
    bits = weighted.view(np.uint32)
    for i in range(units.shape[0]):
        row, least, zeros = units[i], _NONE, np.uint32(0)
        for start in range(0, row.shape[0], _BLOCK):
            # Slices: an index that is a sum may be negative, and then nothing is done in parallel.
            some, weights = row[start : start + _BLOCK], weight[start : start + _BLOCK]
            for j in range(some.shape[0]):
                weighted[j] = some[j] * weights[j]
            sizes = bits[: some.shape[0]]
            for j in range(sizes.shape[0]):
                size = sizes[j] & _SIZE
                zeros += np.uint32(size == 0)
                least = min(least, np.uint32(size - _ONE))
        smallest[i], on_it[i] = least, zeros


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest_pairs(
    images: np.ndarray,
    weight: np.ndarray,
    height: int,
    width: int,
    down: int,
    right: int,
    smallest: np.ndarray,
    on_it: np.ndarray,
) -> None:
    n, H, W, C = images.shape
    h, w = weight.shape[:2]
    lines, weights = images.reshape(n, H, W * C), weight.reshape(h, w * C)
    # The largest and the second of each column under a line of windows, then of each window. Loops
    # run over whole arrays that are made here: of a part of one, or of an argument, the compiler
    # does not know that it overlaps no other, and does one number at a time.
    tops, seconds = np.empty((W, C), np.float32), np.empty((W, C), np.float32)
    top, second = np.empty((w, C), np.float32), np.empty((w, C), np.float32)
    all_tops, all_seconds = tops.reshape(W * C), seconds.reshape(W * C)
    all_top, all_second = top.reshape(w * C), second.reshape(w * C)
    gap = np.empty(w * C, np.float32)
    bits = gap.view(np.uint32)
    for i in range(n):
        least, zeros = _NONE, np.uint32(0)
        for y in range(h):
            line, weights_of_line = lines[i, y * down], weights[y]
            for j in range(W * C):
                all_tops[j], all_seconds[j] = line[j], -np.inf
            for k in range(1, height):
                line = lines[i, y * down + k]
                for j in range(W * C):
                    value, largest = line[j], all_tops[j]
                    other = value if value < largest else largest
                    all_seconds[j] = other if other > all_seconds[j] else all_seconds[j]
                    all_tops[j] = value if value > largest else largest
            _across(tops, seconds, width, right, top, second)
            for j in range(w * C):
                difference = (all_top[j] - all_second[j]) * weights_of_line[j]
                gap[j] = _TINY if (difference == 0) & (all_top[j] != 0) else difference
            for j in range(w * C):
                zeros += np.uint32(bits[j] == 0)
                least = min(least, np.uint32(bits[j] - _ONE))
        smallest[i], on_it[i] = least, zeros


@njit(nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _across(
    tops: np.ndarray,
    seconds: np.ndarray,
    width: int,
    right: int,
    top: np.ndarray,
    second: np.ndarray,
) -> None:
    for x in range(top.shape[0]):
        first = x * right
        for c in range(top.shape[1]):
            top[x, c] = tops[first, c]
            second[x, c] = seconds[first, c]
        for k in range(1, width):
            for c in range(top.shape[1]):
                value, largest = tops[first + k, c], top[x, c]
                other = value if value < largest else largest
                below = seconds[first + k, c]
                below = below if below > second[x, c] else second[x, c]
                second[x, c] = other if other > below else below
                top[x, c] = value if value > largest else largest
