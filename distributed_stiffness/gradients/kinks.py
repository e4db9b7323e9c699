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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distributed_stiffness.gradients.sides import KINKS, Sides

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
        if func in KINKS:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                for sides in KINKS[func](*args, **kwargs):
                    self._look(sides)
        return func(*args, **kwargs)

    def _look(self, sides: Sides) -> None:
        is_known = len(self.calls) < len(self.rounding)
        moved = self.rounding[len(self.calls)] if is_known else _TYPICAL
        self.calls.append(near(sides, moved) if self._is_watched(sides.x) else None)

    def _is_watched(self, x: Tensor) -> bool:
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False  # its numbers cannot be read
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
        noted: of the examples of this pass, call by call.
        n: examples.
    """

    def __init__(self, noted: Sequence[Near | None], n: int) -> None:
        super().__init__(n)
        self._noted = list(noted)
        self._seen: list[tuple[int, ...] | None] = []  # the units of each call; None: not watched
        self._changed: list[Tensor] = []
        some = (k for k, near in enumerate(noted) if near is not None and len(near.examples))
        self._last = max(some, default=-1)  # call of which any was noted
        self._is_cut_short = False

    @property
    def _is_behind(self) -> bool:
        return len(self._seen) > self._last

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make the call; of a layer behind the last unit that was noted, zeros."""
        is_layer = func in _LAYERS and bool(args) and isinstance(args[0], Tensor)
        if is_layer and self._is_behind and self._is_watched(args[0]):
            one = func(args[0][:1], *args[1:], **(kwargs or {}))
            return one.new_zeros(self.n, *one.shape[1:])
        return super().__torch_function__(func, types, args, kwargs)

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> bool:
        """Leave the mode. An error that zeros may have led to is none."""
        super().__exit__(kind, *raised)  # type: ignore[no-untyped-call]
        self._is_cut_short = kind is not None and issubclass(kind, Exception) and self._is_behind
        return self._is_cut_short

    def _look(self, sides: Sides) -> None:
        number = len(self._seen)
        self._seen.append(tuple(sides.shape) if self._is_watched(sides.x) else None)
        noted = self._noted[number] if number < len(self._noted) else None
        if noted is not None and noted.shape == self._seen[number] and len(noted.examples):
            of_each, where = torch.unique(noted.examples, return_inverse=True)
            now = sides.of(of_each).cpu()[where, noted.units]
            self._changed.append(noted.examples[now != noted.sides])

    def examples(self) -> Tensor:
        """Return the examples in which a unit is on another side than was noted, ascending.

        All of them where this pass made other calls: whose units these were is not known.
        """
        expected = [near.shape if near is not None else None for near in self._noted]
        if self._seen != (expected[: len(self._seen)] if self._is_cut_short else expected):
            return _all([near.examples for near in self._noted if near is not None])
        return _all(self._changed)


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
