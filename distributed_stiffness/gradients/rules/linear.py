"""Linear layers: y = x Wᵀ + b, and products with a matrix of parameters, y = x M.

For one example with T positions, ∂L/∂W = Σ_t D_t ⊗ A_t and ∂L/∂b = Σ_t D_t, with A (T, d) the
layer's inputs and D (T, p) the gradients of its outputs. A pair then needs no gradient at all:
g_i·g_j = Σ_ts (A_it·A_js + 1)(D_it·D_js); see `gram.Factors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_stiffness.gradients.rules.rule import (
    Call,
    Positions,
    Rule,
    Seen,
    each_position,
)


class Linear(Rule):
    """`torch.nn.functional.linear` on any number of leading dimensions."""

    name = "linear"
    any_leading = True
    has_positions = True

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `linear(input, weight, bias=None)`."""
        named = seen.named(("input", "weight", "bias"))
        roles = {role: named[role] for role in ("weight", "bias") if named.get(role) is not None}
        return Call(named["input"], roles) if seen.output.dim() >= 2 else None

    def row_dims(self, call: Call, output: Sequence[int]) -> tuple[int, ...]:  # noqa: ARG002
        """All but the last."""
        return tuple(range(len(output) - 1))

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Σ_t D_t ⊗ A_t for the weight, Σ_t D_t for the bias."""
        if role == "bias":
            return each_position(grad_output).sum(1)
        found = self.positions(call, grad_output)
        return torch.bmm(found.left_NTp.transpose(1, 2), found.right_NTd)

    def positions(self, call: Call, grad_output: Tensor) -> Positions:
        """Return D and A; A and D where the weight is (d, p)."""
        assert call.input is not None
        D_NTp, A_NTd = each_position(grad_output), each_position(call.input)
        return Positions(D_NTp, A_NTd) if self.grad_is_left else Positions(A_NTd, D_NTp)

    def making_work(self, role: str, call: Call, output: Sequence[int]) -> int:
        """T·p·d an example for the weight."""
        each = 1 if role == "bias" else call.parameters["weight"].numel() // max(1, output[-1])
        return math.prod(output) * each


class MatMul(Linear):
    """`x @ M`, with M (d, p) a parameter."""

    name = "matmul"
    grad_is_left = False

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `matmul(x, M)`, however it is spelt."""
        operands = [*seen.args, *seen.kwargs.values()]
        if len(operands) != 2 or operands[1].dim() != 2 or operands[0].dim() < 2:
            return None
        return Call(operands[0], {"weight": operands[1]})


class AddMM(MatMul):
    """`addmm(b, x, M)` = b + x M, as GPT-2 writes its layers."""

    name = "addmm"

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `addmm(b, x, M)` with factors of 1."""
        factors = [seen.kwargs.get(key, 1) for key in ("beta", "alpha")]
        if len(seen.args) != 3 or factors != [1, 1]:
            return None
        bias, x, weight = seen.args
        if bias.shape != seen.output.shape[-1:]:
            return None
        return Call(x, {"weight": weight, "bias": bias})
