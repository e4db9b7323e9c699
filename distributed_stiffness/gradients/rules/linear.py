"""Linear layers: y = x Wᵀ + b.

For one example with T positions, ∂L/∂W = Σ_t D_t ⊗ A_t and ∂L/∂b = Σ_t D_t, with A (T, d) the
layer's inputs and D (T, p) the gradients of its outputs. With T = 1 the gradient of a pair needs no
matrix at all: g_i·g_j = (A_i·A_j + 1)(D_i·D_j); see `gram.Factors`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distributed_stiffness.gradients.rules.rule import Call, Rule


class Linear(Rule):
    """`torch.nn.functional.linear` on any number of leading dimensions."""

    name = "linear"

    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Take apart `linear(input, weight, bias=None)`."""
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        roles = {role: named[role] for role in ("weight", "bias") if named.get(role) is not None}
        return Call(named["input"], roles)

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Σ_t D_t ⊗ A_t for the weight, Σ_t D_t for the bias."""
        D_NTp = grad_output.flatten(1, -2) if grad_output.dim() > 2 else grad_output.unsqueeze(1)
        if role == "bias":
            return D_NTp.sum(1)
        A_NTd = call.input.flatten(1, -2) if call.input.dim() > 2 else call.input.unsqueeze(1)
        return torch.einsum("ntp,ntd->npd", D_NTp, A_NTd)
