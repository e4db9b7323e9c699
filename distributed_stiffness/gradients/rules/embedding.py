"""Embeddings: y_t = W[index_t]; ∂L/∂W has D_t added to row index_t."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distributed_stiffness.gradients.rules.rule import Call, Rule

_ARGUMENTS = (
    "input",
    "weight",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)


class Embedding(Rule):
    """`torch.nn.functional.embedding` on index arrays of any shape, N first."""

    name = "embedding"

    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Take apart `embedding(input, weight, padding_idx=None, …)`."""
        named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        # max_norm writes to the weight; frequencies are counted over the whole batch.
        if named.get("max_norm") is not None or named.get("scale_grad_by_freq"):
            return None
        padding = named.get("padding_idx")
        if padding is not None and padding < 0:
            padding += named["weight"].shape[0]
        return Call(named["input"], {"weight": named["weight"]}, {"padding_idx": padding})

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Scatter-add the gradients of the outputs into the rows that were looked up."""
        weight = call.parameters[role]
        n, width = grad_output.shape[0], weight.shape[1]
        index = call.input.reshape(n, -1, 1).expand(-1, -1, width)
        D_NTd = grad_output.reshape(n, -1, width)
        if call.settings["padding_idx"] is not None:
            D_NTd = D_NTd.masked_fill(index == call.settings["padding_idx"], 0)
        grad = torch.zeros(n, *weight.shape, dtype=grad_output.dtype, device=grad_output.device)
        return grad.scatter_add_(1, index, D_NTd)
