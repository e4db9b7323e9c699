"""Which examples float32 may put on the wrong side of a kink.

A ReLU passes a gradient on or not, a maximum passes it to one input or another. Where the argument
lies within rounding of the kink, float32 may take the other side than the network's real numbers
would: the gradient of a neighbour, exact in itself, whose cosines differ by up to 1e-2 in a deep
network (docs/design/0002-numbers.md). Few units are so near, and fewer are on the wrong side, but a
bound measured on a sample of pairs does not see them.

So the forward pass is watched: `Kinks` notes the units that are near a kink, and which side they
are on; `KinksAgain` looks at the same units of the same examples in a float64 pass, and says in
which examples any is on another side (mending.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distributed_stiffness.gradients.nearest import (
    Nearest,
    is_for_loops,
    nearest,
    nearest_pairs,
)

# A unit is near a kink if it is no farther than so many times what rounding has moved units like it
# by, both root mean squares: of normal errors 1 in 1,000 that change a side come from farther, and
# none of 66 that were seen came from farther than 1.9 (DenseNet-121 and ResNet-18). Near ones cost
# a forward pass in float64, of 2 to 15 % of the examples.
FARTHEST = 3.0
# What rounding moves units by is measured, as a share of their size: 1e-7 in the first layer of a
# network, 7e-7 in the last of ResNet-20, 3e-6 in that of ResNet-18.
_LEAST = 6e-8  # it is never taken to be less: half of a float32's last place
_FEW_UNITS = 16  # of which all may be near a kink: their size alone says nothing of rounding


@dataclass(frozen=True)
class Sides:
    """The arguments of a call, seen from its kink."""

    x: Tensor  # (N, ...), whose size says what rounding is
    shape: Sequence[int]  # of the units of an example
    nearest: Callable[[Tensor], Nearest]  # weight of each unit -> of all examples
    distance: Callable[[Tensor], Tensor]  # examples (k,) -> of each of their units, (k, ...)
    of: Callable[[Tensor], Tensor]  # examples (k,) -> the side of each of their units, (k, units)


@dataclass(frozen=True)
class Moved:
    """What rounding moves the units of a call by, as a share of their size.

    Channels differ by their normalisation, and places by what lies around them: of 66 units that
    were on the wrong side in DenseNet-121 and ResNet-18 some came from farther than twice the root
    mean square of their call, none from farther than 1.9 times that of their channel, row or
    column, whichever is most.
    """

    most: float  # of the unit that it moves most
    weight: Tensor  # (...), how many times less it moves each

    def of_units(self, shape: Sequence[int]) -> Tensor:
        """Return the weights of units (...), 1 where others were measured."""
        is_theirs = tuple(self.weight.shape) == tuple(shape)
        return self.weight if is_theirs else self.weight.new_ones(())

    @staticmethod
    def between(rounded: Tensor, true: Tensor, size: float) -> Moved:
        """Compare the units of some examples, (n, ...), of a root mean square `size`.

        A unit moves by what units of its channel do, or of its row, or column: whichever is most,
        and never by less than all of them together. Units that did not move say nothing: most
        windows of what a ReLU has cut off are 0 in every precision.
        """
        square = (rounded - true).square().nan_to_num(0.0, 0.0)
        if not size > 0 or not square.any():
            return Moved(_LEAST, torch.ones(()))

        is_moved = square > 0

        def mean(axes: list[int]) -> Tensor:
            n_moved = is_moved.sum(axes, keepdim=True).clamp(min=1)
            found: Tensor = square.sum(axes, keepdim=True) / n_moved
            return found[0]

        axes = list(range(square.dim()))
        moved = mean(axes).expand(square.shape[1:])
        for axis in axes[1:]:
            moved = torch.maximum(moved, mean([k for k in axes if k != axis]))
        share = (moved.sqrt() / size).clamp(min=_LEAST)
        return Moved(float(share.max()), (share.max() / share).float())


_TYPICAL = Moved(2.5e-7, torch.ones(()))  # where it was not measured


@dataclass(frozen=True)
class Near:
    """Units of one call that are near a kink, on the CPU."""

    shape: tuple[int, ...]  # of the units of an example
    examples: Tensor  # (k,) int64
    units: Tensor  # (k,) int64, of an example, flattened
    sides: Tensor  # (k,) int64


@dataclass(eq=False)
class Kinks(TorchFunctionMode):
    """Note what is near a kink while the mode is active.

    Calls whose result does not have the examples in front are not watched.

    Args:
        n: examples.
        rounding: what rounding moves the units of each call by, as `Rounding` measures it.
    """

    n: int
    rounding: Sequence[Moved] = ()
    calls: list[Near | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the arguments of a call with a kink; make the call."""
        kwargs = kwargs or {}
        if func in _KINKS:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                for sides in _KINKS[func](*args, **kwargs):
                    self._look(sides)
        return func(*args, **kwargs)

    def _look(self, sides: Sides) -> None:
        is_known = len(self.calls) < len(self.rounding)
        moved = self.rounding[len(self.calls)] if is_known else _TYPICAL
        self.calls.append(near(sides, moved) if self._is_watched(sides.x) else None)

    def _is_watched(self, x: Tensor) -> bool:
        return x.dim() > 1 and len(x) == self.n and x.is_floating_point()

    def examples(self) -> Tensor:
        """Return the examples with a unit near a kink, (k,) int64, ascending."""
        return _all([call.examples for call in self.calls if call is not None])


class KinksAgain(Kinks):
    """Look again, in another pass, at units that were noted.

    Behind the last of them what the network computes is of no use: there its layers, of which one
    example tells the shape, give zeros. (To end the pass there would leave a network untidy that
    tidies up at its end.)

    Args:
        calls: what was noted of the examples of this pass.
        n: examples.
    """

    def __init__(self, calls: Sequence[Near | None], n: int) -> None:
        super().__init__(n)
        self._noted = list(calls)
        while self._noted and (self._noted[-1] is None or not len(self._noted[-1].examples)):
            self._noted.pop()
        self._noted.reverse()  # the next one last
        self._changed: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make the call; of a layer behind the last unit that was noted, zeros."""
        is_behind = not self._noted and func in _LAYERS and bool(args)
        if is_behind and isinstance(args[0], Tensor) and self._is_watched(args[0]):
            one = func(args[0][:1], *args[1:], **(kwargs or {}))
            return one.new_zeros(self.n, *one.shape[1:])
        return super().__torch_function__(func, types, args, kwargs)

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> bool:
        """Leave the mode. An error that zeros may have led to is none."""
        super().__exit__(kind, *raised)  # type: ignore[no-untyped-call]
        return kind is not None and issubclass(kind, Exception) and not self._noted

    def _look(self, sides: Sides) -> None:
        noted = self._noted.pop() if self._noted else None
        if noted is None:
            return
        if not self._is_watched(sides.x) or tuple(sides.shape) != noted.shape:
            self._changed.append(noted.examples)  # another call: what became of them is not known
            return
        of_each, where = torch.unique(noted.examples, return_inverse=True)
        now = sides.of(of_each).cpu()[where, noted.units]
        self._changed.append(noted.examples[now != noted.sides])

    def examples(self) -> Tensor:
        """Return the examples in which a unit is on another side than was noted, ascending.

        Or may be: those of calls that were not made again are among them.
        """
        missed = [noted.examples for noted in self._noted if noted is not None]
        return _all([*self._changed, *missed])


class Rounded(Kinks):
    """Keep how far the units of some examples are from their kinks, call by call.

    Args:
        n: examples.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.distances: list[Tensor | None] = []  # (n, ...); None of a call that is not watched

    def _look(self, sides: Sides) -> None:
        self.distances.append(_distances(sides) if self._is_watched(sides.x) else None)


class Rounding(Kinks):
    """Measure what rounding has moved units by, in a float64 pass over the same examples.

    Args:
        rounded: of the float32 pass.
    """

    def __init__(self, rounded: Rounded) -> None:
        super().__init__(rounded.n)
        self._rounded = rounded.distances
        self._moved: list[Moved] = []

    def _look(self, sides: Sides) -> None:
        place = len(self._moved)
        units = self._rounded[place] if place < len(self._rounded) else None
        self._moved.append(_TYPICAL)
        if units is None or not self._is_watched(sides.x):
            return
        self._rounded[place] = None  # call by call: all of both passes would be many numbers
        true = _distances(sides)
        if true.shape == units.shape:
            norm = torch.linalg.vector_norm(sides.x, dtype=torch.float64)
            size = float(norm) / max(1, sides.x.numel()) ** 0.5
            self._moved[place] = Moved.between(units.double(), true.double(), size)

    def moved(self) -> tuple[Moved, ...]:
        """Return what rounding has moved the units of each call by.

        Nothing where the two passes made different calls: whose they were is not known.
        """
        return tuple(self._moved) if len(self._moved) == len(self._rounded) else ()


_LAYERS = (F.linear, F.batch_norm, *(getattr(torch, f"conv{k}d") for k in (1, 2, 3)))


def _distances(sides: Sides) -> Tensor:
    """Return those of all examples, which may be overwritten afterwards."""
    return sides.distance(torch.arange(len(sides.x), device=sides.x.device))


def _all(parts: Sequence[Tensor]) -> Tensor:
    """Return what is in any of the parts, once each, ascending."""
    if not parts:
        return torch.empty(0, dtype=torch.int64)
    found: Tensor = torch.unique(torch.cat(list(parts)))
    return found


def near(sides: Sides, moved: Moved) -> Near:
    """Return the units of a call that are near its kink.

    The size that `moved` is a share of is the root mean square of the units of an example; of a few
    units, which all may be near the kink, at least that of all examples.
    """
    shape, weight = tuple(sides.shape), moved.of_units(sides.shape)
    distance, size = sides.nearest(weight)
    if math.prod(sides.x.shape[1:]) < _FEW_UNITS:
        size = size.clamp(min=float(size.square().mean().sqrt()))
    limit = FARTHEST * moved.most * size
    rows = (distance < limit).nonzero().flatten()
    if not len(rows):
        return Near(shape, *(torch.empty(0, dtype=torch.int64) for _ in range(3)))
    part = (sides.distance(rows).abs() * weight).flatten(1)
    by_chance = distance[rows, None] == 0
    is_near = (part < limit[rows, None]) & ((part > 0) | by_chance)
    row, units = is_near.nonzero().unbind(1)
    return Near(shape, *(t.cpu() for t in (rows[row], units, sides.of(rows)[row, units])))


# The kinks of torch's functions.


def _at(kink: float | Tensor, x: Tensor) -> Sides:
    distance = x - kink if isinstance(kink, Tensor) or kink else x
    return Sides(
        x,
        distance.shape[1:],
        lambda weight: nearest(x, distance, weight),
        lambda rows: distance[rows],
        lambda rows: (distance[rows] > 0).long().flatten(1),
    )


def _at_zero(x: Tensor, *_: Any, **__: Any) -> list[Sides]:
    return [_at(0.0, x)]


def _at_both(low: float, high: float) -> Callable[..., list[Sides]]:
    return lambda x, *_, **__: [_at(low, x), _at(high, x)]


def _clamp(x: Tensor, min: Any = None, max: Any = None, **_: Any) -> list[Sides]:
    return [_at(float(kink), x) for kink in (min, max) if isinstance(kink, int | float)]


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, *_: Any, **__: Any) -> Any:
    return _at_both(min_val, max_val)(x)


def _larger(x: Tensor, y: Tensor, **_: Any) -> list[Sides]:
    return [_at(y, x)] if isinstance(y, Tensor) and x.shape == y.shape else []


def _largest(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *_: Any,
    **__: Any,
) -> list[Sides]:
    """The largest of each window of an image against the second."""
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


_KINKS: dict[Callable[..., Any], Callable[..., list[Sides]]] = {
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
