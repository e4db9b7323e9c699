"""Parameters that meet the network's values element by element: y = x + w, x w, x / w, and copies.

Each gradient is Σ c D over the elements that share an element of w, with c = 1, x, … free of D.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distributed_stiffness.gradients.rules.rule import Call, Rule, Seen


class _Elementwise(Rule):
    """∂L/∂w = Σ c D."""

    any_leading = True

    def parse(self, seen: Seen) -> Call | None:
        """Take apart a call of two operands, one of them a parameter."""
        named = seen.named(("input", "other"))
        if len(seen.args) > 2 or not named.keys() >= {"input", "other"} or "out" in named:
            return None
        found = self.operands(named["input"], named["other"], seen)
        return None if found is None else self.call(*found, seen.output)

    def call(
        self, weight: Tensor, coefficient: Tensor | None, sign: float, output: Tensor
    ) -> Call | None:
        """Lay the weight's shape beside the output's, dimension by dimension."""
        missing = output.dim() - weight.dim()
        if missing < 0:
            return None
        shape = (1,) * missing + tuple(weight.shape)
        return Call(
            None if coefficient is None else coefficient.detach().expand(output.shape),
            {"weight": weight},
            {"beside": {"weight": shape}, "sign": sign},
        )

    @abstractmethod
    def operands(
        self, left: Any, right: Any, seen: Seen
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Return the weight, c without its sign (None: 1), and its sign or constant factor."""

    def row_dims(self, call: Call, output: Sequence[int]) -> tuple[int, ...]:  # noqa: ARG002
        """Those along which the weight is repeated."""
        (shape,) = call.settings["beside"].values()
        return tuple(k for k, size in enumerate(shape) if size == 1)

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Sum c D over every dimension along which the weight was repeated."""
        grad = grad_output if call.input is None else grad_output * call.input
        shape = call.settings["beside"][role]
        repeated = [i + 1 for i, size in enumerate(shape) if size == 1 and grad.shape[i + 1] != 1]
        if repeated:
            grad = grad.sum(repeated)
        weight = call.parameters[role]
        grad = grad.reshape(len(grad), *weight.shape)
        sign: float = call.settings["sign"]
        return grad if sign == 1.0 else sign * grad


class Sum(_Elementwise):
    """`w + x` and `x + alpha w`."""

    name = "add"

    def operands(
        self, left: Any, right: Any, seen: Seen
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Return c = 1, or the factor alpha of the second operand."""
        is_left = seen.is_source(left)
        return (left, None, 1.0) if is_left else (right, None, float(seen.kwargs.get("alpha", 1)))


class Difference(_Elementwise):
    """`w - x` and `x - alpha w`; reversed for `rsub`."""

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse
        self.name = "rsub" if reverse else "sub"

    def operands(
        self, left: Any, right: Any, seen: Seen
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Return c = 1 with the sign of the operand."""
        is_left = seen.is_source(left)
        weight = left if is_left else right
        alpha = float(seen.kwargs.get("alpha", 1))
        return weight, None, (1.0 if is_left != self.reverse else -alpha)


class Product(_Elementwise):
    """`x w`."""

    name = "mul"

    def operands(
        self, left: Any, right: Any, seen: Seen
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Return c = x."""
        weight, other = (left, right) if seen.is_source(left) else (right, left)
        if isinstance(other, Tensor):
            return weight, other, 1.0
        return (weight, None, float(other)) if seen.output.shape == weight.shape else None


class Quotient(_Elementwise):
    """`x / w` and `w / x`."""

    name = "div"

    def operands(
        self, left: Any, right: Any, seen: Seen
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Return c = 1/x, or −y/w where w divides."""
        if seen.kwargs.get("rounding_mode") is not None or not isinstance(left, Tensor):
            return None
        is_left = seen.is_source(left)
        if not is_left:
            return right, seen.output.detach() / right.detach(), -1.0
        return (left, 1 / right.detach(), 1.0) if isinstance(right, Tensor) else None


class Copies(_Elementwise):
    """`expand`, `expand_as`, `broadcast_to`, and `repeat` along dimensions of size 1."""

    name = "expand"

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `expand(w, …)`."""
        weight, output = seen.args[0], seen.output
        shape = (1,) * (output.dim() - weight.dim()) + tuple(weight.shape)
        if any(size not in (1, whole) for size, whole in zip(shape, output.shape, strict=True)):
            return None  # `repeat` lays whole copies side by side
        return self.call(weight, None, 1.0, output)

    def operands(
        self, left: Any, right: Any, seen: Seen
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Copies have no second operand."""
        raise NotImplementedError(self.name)


class PReLU(_Elementwise):
    """`prelu(x, w)` = max(x, 0) + w min(x, 0), with one slope or one a channel."""

    name = "prelu"

    def operands(
        self,
        left: Any,
        right: Any,
        seen: Seen,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None, float] | None:
        """Return c = min(x, 0)."""
        return right, left.detach().clamp(max=0), 1.0

    def call(
        self, weight: Tensor, coefficient: Tensor | None, sign: float, output: Tensor
    ) -> Call | None:
        """Lay the slopes along the channels, dimension 1."""
        if weight.dim() != 1 or output.dim() < 2:
            return None
        shape = (1, len(weight)) + (1,) * (output.dim() - 2)
        assert coefficient is not None
        return Call(coefficient, {"weight": weight}, {"beside": {"weight": shape}, "sign": sign})


def elementwise_rules() -> dict[Any, Rule]:
    """By torch function: every spelling of each operation."""
    T = torch.Tensor
    add, sub, rsub, mul, div = Sum(), Difference(), Difference(reverse=True), Product(), Quotient()
    copies = Copies()
    return {
        **dict.fromkeys((torch.add, T.add, T.__add__, T.__radd__, T.add_, T.__iadd__), add),
        **dict.fromkeys((torch.sub, T.sub, T.__sub__, T.sub_, T.__isub__), sub),
        **dict.fromkeys((torch.subtract, T.subtract), sub),
        **dict.fromkeys((torch.rsub, T.__rsub__), rsub),
        **dict.fromkeys((torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply), mul),
        **dict.fromkeys((torch.div, T.div, T.__truediv__, torch.divide, T.divide), div),
        **dict.fromkeys((T.expand, T.expand_as, T.broadcast_to, T.repeat), copies),
        torch.broadcast_to: copies,
        torch.prelu: PReLU(),
    }
