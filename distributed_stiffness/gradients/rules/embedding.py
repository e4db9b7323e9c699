"""Embeddings: y_t = W[index_t]; ∂L/∂W has D_t added to row index_t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_stiffness.gradients.rules.rule import Call, Positions, Rule, Seen

_ARGUMENTS = (
    "input",
    "weight",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)


_BAG_ARGUMENTS = (
    *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode"),
    *("sparse", "per_sample_weights", "include_last_offset", "padding_idx"),
)


class Embedding(Rule):
    """`torch.nn.functional.embedding` on index arrays of any shape."""

    name = "embedding"
    any_leading = True
    has_positions = True

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `embedding(input, weight, padding_idx=None, …)`."""
        named = seen.named(_ARGUMENTS)
        # max_norm writes to the weight; frequencies are counted over the whole batch.
        if named.get("max_norm") is not None or named.get("scale_grad_by_freq"):
            return None
        return Call(
            named["input"],
            {"weight": named["weight"]},
            {"padding_idx": _from_start(named.get("padding_idx"), named["weight"])},
        )

    def row_dims(self, call: Call, output: Sequence[int]) -> tuple[int, ...]:  # noqa: ARG002
        """All but the last."""
        return tuple(range(len(output) - 1))

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Scatter-add the gradients of the outputs into the rows that were looked up."""
        return scattered(self.positions(call, grad_output), call.parameters[role])

    def positions(self, call: Call, grad_output: Tensor) -> Positions:
        """Return indices and gradients of the outputs; padding gets none."""
        assert call.input is not None
        n, width = grad_output.shape[0], grad_output.shape[-1]
        index_NT = call.input.reshape(n, -1)
        D_NTd = grad_output.reshape(n, -1, width)
        padding = call.settings["padding_idx"]
        if padding is not None:
            D_NTd = D_NTd.masked_fill((index_NT == padding).unsqueeze(2), 0)
        return Positions(index_NT, D_NTd)


class EmbeddingBag(Rule):
    """`torch.nn.functional.embedding_bag` on index arrays (N, bag), mean or sum."""

    name = "embedding_bag"
    has_positions = True

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `embedding_bag(input, weight, offsets=None, …, mode="mean", …)`."""
        named = seen.named(_BAG_ARGUMENTS)
        weights = named.get("per_sample_weights")
        if (
            named["input"].dim() != 2
            or named.get("max_norm") is not None
            or named.get("scale_grad_by_freq")
            or named.get("mode", "mean") == "max"
            or (weights is not None and weights.requires_grad)
        ):
            return None
        padding = _from_start(named.get("padding_idx"), named["weight"])
        index = named["input"]
        share = torch.ones_like(index, dtype=seen.output.dtype) if weights is None else weights
        if padding is not None:
            share = share * (index != padding)
        if named.get("mode", "mean") == "mean":
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        # Shares stand beside the indices, so that both are cut into blocks as one input.
        return Call(
            torch.stack([index.double(), share.detach().double()], 2),
            {"weight": named["weight"]},
        )

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Scatter-add each bag's gradient into the rows that were looked up."""
        return scattered(self.positions(call, grad_output), call.parameters[role])

    def positions(self, call: Call, grad_output: Tensor) -> Positions:
        """Return indices, and the bag's gradient times the share of each."""
        assert call.input is not None
        index_NT, share_NT = call.input.unbind(2)
        return Positions(
            index_NT.long(), share_NT.to(grad_output.dtype).unsqueeze(2) * grad_output.unsqueeze(1)
        )


def scattered(found: Positions, weight: Tensor) -> Tensor:
    """Σ_t unit vector of index_t ⊗ right_t, (N, *weight.shape)."""
    index_NTd = found.left_NTp.unsqueeze(2).expand_as(found.right_NTd)
    D_NTd = found.right_NTd
    return D_NTd.new_zeros(len(D_NTd), *weight.shape).scatter_add_(1, index_NTd, D_NTd)


def _from_start(padding: int | None, weight: Tensor) -> int | None:
    return padding + len(weight) if padding is not None and padding < 0 else padding
