"""From what a pass has caught to per-example gradients, parameter by parameter.

Axis letters: N examples, P parameters, T positions that share a weight.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_stiffness.gradients.capture import Captured, Source
from distributed_stiffness.gradients.gram import Factors
from distributed_stiffness.gradients.reading import Pass
from distributed_stiffness.gradients.recipe import Layer, joined_bias, laid_out, numbers_of
from distributed_stiffness.gradients.rules import Linear, Positions
from distributed_stiffness.tiling import pieces

# A part of the gradients is made for so many examples at a time that it stays in the cache until
# it is in its place.
_BYTES_AT_A_TIME = {"cpu": 4 * 2**20, "cuda": 2**28}
# Squares of float32 numbers are summed in float32 while their sum lies between these.
_SQUARES = 1e-20, 1e30


@dataclass(frozen=True)
class Parts:
    """A batch of examples, differentiated."""

    done: Pass
    parameters: Mapping[str, Tensor]
    captured: Mapping[str, Sequence[tuple[str, Captured]]]  # source -> (role, use)
    functions: Mapping[str, Tensor]  # what torch.func made, or autograd one by one: (N, *shape)
    through: Mapping[str, Sequence[str]]  # parameter -> tensors made of it that calls take
    unbatched: set[str]  # calls whose derivatives are not written for batches; kept for later ones

    @property
    def n(self) -> int:
        """N."""
        return self.done.n

    def whole(self, name: str) -> Tensor:
        """Return the gradient of one parameter for all examples, (N, *shape)."""
        made = [self.part(name, rows) for rows in pieces(slice(0, self.n), self._at_a_time(name))]
        return made[0] if len(made) == 1 else torch.cat(made)

    def dense(
        self, names: Sequence[str], dtype: torch.dtype, into: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of parameters side by side, (N, P), and |row|² in float64."""
        sizes = [numbers_of(self.parameters[name]) for name in names]
        device = self.done.head.scale.device
        dense = (
            into
            if into is not None and into.dtype == dtype
            else torch.empty(self.n, sum(sizes), dtype=dtype, device=device)
        )
        square = torch.zeros(self.n, dtype=torch.float64, device=device)
        for name, place in zip(names, torch.split(dense, sizes, 1), strict=True):
            for rows in pieces(slice(0, self.n), self._at_a_time(name)):
                part = laid_out(self.part(name, rows))
                square[rows] += _squares(part)
                place[rows] = part
        return dense, square

    def factors(self, layer: Layer) -> Factors | None:
        """Return the gradients of a weight (and bias) as factors; None: these uses have none."""
        uses = self.captured.get(layer.weight, ())
        if not uses:
            return self._no_factors(layer)
        bias = joined_bias(layer.weight, self.captured)
        if (
            any(name in self.functions for name in layer.names)
            or self.through.get(layer.weight)
            or (layer.bias is not None and bias != layer.bias)
            or not all(role == "weight" and u.rule.covers_positions(u.call) for role, u in uses)
        ):
            return None
        positions = [one.positions() for _, one in uses]
        if any(found.by_index != layer.by_index for found in positions):
            return None
        left, right = _joined(positions)
        if layer.is_transposed:
            left, right = right, left
        has_bias = float(layer.bias is not None)
        made = Factors(right, left, right.new_full(right.shape[:2], has_bias))
        return made.centred() if layer.is_centred else made

    def _no_factors(self, layer: Layer) -> Factors:
        weight = self.parameters[layer.weight]
        A = weight.new_zeros(self.n, 1, layer.outputs if layer.is_transposed else layer.inputs)
        D = weight.new_zeros(self.n, 1, layer.inputs if layer.is_transposed else layer.outputs)
        if layer.by_index:
            D = torch.zeros(self.n, 1, dtype=torch.int64, device=weight.device)
        return Factors(A.detach(), D.detach(), weight.new_zeros(self.n, 1))

    def part(self, name: str, rows: slice) -> Tensor:
        """Return the gradient of one parameter for some examples, (n, *shape)."""
        if name in self.functions:
            return self.functions[name][rows]
        parameter, n = self.parameters[name], rows.stop - rows.start
        # The uses of a shared parameter add up before anything is multiplied.
        terms = self._direct(self.captured.get(name, ()), rows)
        for through in self.through.get(name, ()):
            grads = functools.reduce(
                torch.add, self._direct(self.captured[through], rows)
            ).contiguous()
            back = self._through(self.done.capture.derived[through], name, grads)
            if back is not None:
                terms.append(back.contiguous())
        if not terms:
            return parameter.detach().new_zeros(n, *parameter.shape)
        return functools.reduce(torch.add, terms).reshape(n, *parameter.shape)

    def uses(self, name: str) -> bool:
        """Whether the batch uses a parameter."""
        return name in self.functions or next(self._uses(name), None) is not None

    def _uses(self, name: str) -> Iterator[tuple[str, Captured]]:
        """Yield every role and use of a parameter, direct or through a tensor made of it."""
        for source in (name, *self.through.get(name, ())):
            yield from self.captured.get(source, ())

    def _at_a_time(self, name: str) -> int:
        """Examples whose gradients of one parameter are made together."""
        numbers = numbers_of(self.parameters[name])
        numbers += sum(
            one.fold * one.rule.scratch(role, one.call, one.grad_output)
            for role, one in self._uses(name)
        )
        parameter = self.parameters[name]
        room = _BYTES_AT_A_TIME["cuda" if parameter.is_cuda else "cpu"]
        most = max(1, room // max(1, numbers * parameter.dtype.itemsize))
        return math.ceil(self.n / math.ceil(self.n / most))

    def _direct(self, uses: Sequence[tuple[str, Captured]], rows: slice) -> list[Tensor]:
        is_all = rows == slice(0, self.n)
        chosen = [(role, one if is_all else one.take(rows)) for role, one in uses]
        linear = [one for role, one in chosen if role == "weight" and isinstance(one.rule, Linear)]
        if 1 < len(linear) == len(chosen):
            # Many uses (every step of a recurrent network): one product over all positions.
            left_NTp, right_NTd = _joined([one.positions() for one in linear])
            return [torch.bmm(left_NTp.transpose(1, 2), right_NTd)]
        return [one.per_example(role) for role, one in chosen]

    def _through(self, source: Source, name: str, grads: Tensor) -> Tensor | None:
        """Send gradients of a tensor made of parameters back to one of them, for each example."""
        parameter = self.parameters[name]
        if source.call not in self.unbatched:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", "There is a performance drop")
                    (back,) = torch.autograd.grad(
                        source.tensor,
                        parameter,
                        grads,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                return back
            except (RuntimeError, UserWarning):
                self.unbatched.add(source.call)
        found = [
            torch.autograd.grad(
                source.tensor, parameter, grad, retain_graph=True, allow_unused=True
            )[0]
            for grad in grads
        ]
        return None if found[0] is None else torch.stack(found)


def _joined(positions: Sequence[Positions]) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([p.left_NTp for p in positions], 1),
        torch.cat([p.right_NTd for p in positions], 1),
    )


def _squares(part: Tensor) -> Tensor:
    """Return the sum of squares of each row, (n,) float64."""
    if part.dtype == torch.float32 and not part.is_cuda and part.numel():
        # Several times as fast as one float64 norm, which copies; short sums keep the digits.
        length = _divisor(part.shape[1])
        norms: Tensor = torch.linalg.vector_norm(part.reshape(len(part), -1, length), dim=2)
        square = norms.double().square().sum(1)
        if _SQUARES[0] < float(square.min()) and float(square.max()) < _SQUARES[1]:
            return square
    norm: Tensor = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
    return norm.square()


@functools.cache
def _divisor(n: int, most: int = 1024) -> int:
    """Return the largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
