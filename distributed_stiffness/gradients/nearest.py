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
    top, second, gap = np.empty(C, np.float32), np.empty(C, np.float32), np.empty(C, np.float32)
    bits = gap.view(np.uint32)
    for i in range(n):
        least, zeros = _NONE, np.uint32(0)
        for y in range(0, H - height + 1, down):
            for x in range(0, W - width + 1, right):
                top[:] = images[i, y, x]
                second[:] = -np.inf
                for place in range(1, height * width):
                    one = images[i, y + place // width, x + place % width]
                    for c in range(C):
                        value, largest = one[c], top[c]
                        other = value if value < largest else largest
                        second[c] = other if other > second[c] else second[c]
                        top[c] = value if value > largest else largest
                weights = weight[y // down, x // right]
                for c in range(C):
                    difference = (top[c] - second[c]) * weights[c]
                    gap[c] = _TINY if (difference == 0) & (top[c] != 0) else difference
                for c in range(C):
                    zeros += np.uint32(bits[c] == 0)
                    least = min(least, np.uint32(bits[c] - _ONE))
        smallest[i], on_it[i] = least, zeros
