"""The kinks of torch's functions, and on which side of them arguments lie.

Each function gives, for the arguments of a call, one `Sides` for every kink that it has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_stiffness.gradients.nearest import (
    Nearest,
    is_for_loops,
    nearest,
    nearest_pairs,
)


@dataclass(frozen=True)
class Sides:
    """The arguments of a call, seen from its kink."""

    x: Tensor  # (N, ...), whose size says what rounding is
    shape: Sequence[int]  # of the units of an example
    nearest: Callable[[Tensor], Nearest]  # weight of each unit -> of all examples
    distance: Callable[[Tensor], Tensor]  # examples (k,) -> of each of their units, (k, ...)
    of: Callable[[Tensor], Tensor]  # examples (k,) -> the side of each of their units, (k, units)


def _at(kink: float | Tensor, x: Tensor) -> Sides:
    if isinstance(kink, Tensor):
        units, distance = torch.maximum(x.abs(), kink.abs()), x - kink  # rounding moves either
    else:
        units, distance = x, x - kink if kink else x
    return Sides(
        units,
        distance.shape[1:],
        lambda weight: nearest(units, distance, weight),
        lambda rows: distance[rows],
        lambda rows: distance[rows].sign().long().flatten(1),
    )


# Their arguments have the names that torch gives them: a network may pass them by name.


def _at_zero(input: Tensor, *_: Any, **__: Any) -> list[Sides]:
    return [_at(0.0, input)]


def _at_both(low: float, high: float) -> Callable[..., list[Sides]]:
    return lambda input, *_, **__: [_at(low, input), _at(high, input)]


def _clamp(input: Tensor, min: Any = None, max: Any = None, **_: Any) -> list[Sides]:
    return [_at(kink, input) for kink in (min, max) if kink is not None]


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, *_: Any, **__: Any
) -> list[Sides]:
    return _at_both(min_val, max_val)(input)


def _larger(input: Tensor, other: Tensor, **_: Any) -> list[Sides]:
    return [_at(other, input)] if input.is_floating_point() else []


def _largest(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *_: Any,
    **__: Any,
) -> list[Sides]:
    """The largest of each window of an image against the second."""
    x = input
    if x.dim() != 4:
        return []
    size, step, room, spread = (
        (v, v) if isinstance(v, int) else tuple(v) * (2 // len(v))
        for v in (kernel_size, stride or kernel_size, padding, dilation)
    )
    settings = (size, step, room, spread, ceil_mode)
    places = torch._C._nn.max_pool2d_with_indices
    windows = _windows((x.shape[2], x.shape[3]), *settings)
    # The last window may reach beyond the image.
    reach = [
        (windows[k] - 1) * step[k] + (size[k] - 1) * spread[k] + 1 - x.shape[2 + k] for k in (0, 1)
    ]
    below, right = (max(0, reach[k] - room[k]) for k in (0, 1))
    margins = (room[1], right, room[0], below)

    def gap(image: Tensor) -> Tensor:
        if any(margins):
            image = F.pad(image, margins, value=-torch.inf)
        shape = (*image.shape[:2], *windows)
        top, second = (image.new_full((), -torch.inf).expand(shape) for _ in range(2))
        for i, j in itertools.product(range(size[0]), range(size[1])):
            one = image[:, :, i * spread[0] :: step[0], j * spread[1] :: step[1]]
            one = one[:, :, : windows[0], : windows[1]]
            second = torch.maximum(second, torch.minimum(top, one))
            top = torch.maximum(top, one)
        # A window with one element in the image has no second. What ReLU has cut off passes no
        # gradient on; any other tie may be one of this precision alone, however many there are.
        found = torch.where(second == -torch.inf, top.abs(), top - second)
        return found.masked_fill_((found == 0) & (top != 0), torch.finfo(x.dtype).tiny)

    def all_nearest(weight: Tensor) -> Nearest:
        if is_for_loops(x) and not any(margins) and spread == (1, 1) and size != (1, 1):
            return nearest_pairs(x, weight, size, step)
        return nearest(x, gap(x), weight)

    def which(rows: Tensor) -> Tensor:
        return places(x[rows], *settings)[1].flatten(1)

    return [Sides(x, (x.shape[1], *windows), all_nearest, lambda rows: gap(x[rows]), which)]


@functools.cache
def _windows(image: tuple[int, int], *settings: Any) -> tuple[int, int]:
    """Return how many windows of max-pooling an image has, down and right."""
    down, right = F.max_pool2d(torch.empty(1, 1, *image), *settings).shape[2:]
    return down, right


KINKS: dict[Callable[..., Any], Callable[..., list[Sides]]] = {
    **dict.fromkeys(
        (
            F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_,
            F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, Tensor.prelu, F.rrelu, F.selu,
            torch.selu, torch.abs, Tensor.abs,
        ),
        _at_zero,
    ),
    **dict.fromkeys((torch.clamp, Tensor.clamp, Tensor.clamp_), _clamp),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.relu6: _at_both(0.0, 6.0),
    **dict.fromkeys((F.hardswish, F.hardsigmoid), _at_both(-3.0, 3.0)),
    **dict.fromkeys((torch.maximum, torch.minimum), _larger),
    **dict.fromkeys((torch.max_pool2d, F.max_pool2d, F.max_pool2d_with_indices), _largest),
}  # fmt: skip
