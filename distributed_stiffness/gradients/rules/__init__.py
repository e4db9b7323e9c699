"""Structured rules, by the torch function that they differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from distributed_stiffness.gradients.rules.convolution import Convolution, TransposedConvolution
from distributed_stiffness.gradients.rules.elementwise import elementwise_rules
from distributed_stiffness.gradients.rules.embedding import Embedding, EmbeddingBag
from distributed_stiffness.gradients.rules.linear import AddMM, Linear, MatMul
from distributed_stiffness.gradients.rules.normalisation import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from distributed_stiffness.gradients.rules.rule import Call, Positions, Rule

_matmul, _addmm = MatMul(), AddMM()

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Linear(),
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.conv1d: Convolution(1),
    torch.conv2d: Convolution(2),
    torch.conv3d: Convolution(3),
    torch.conv_transpose1d: TransposedConvolution(1),
    torch.conv_transpose2d: TransposedConvolution(2),
    torch.conv_transpose3d: TransposedConvolution(3),
    F.batch_norm: BatchNorm(),
    F.layer_norm: LayerNorm(),
    F.group_norm: GroupNorm(),
    F.instance_norm: InstanceNorm(),
    F.rms_norm: RMSNorm(),
    F.embedding: Embedding(),
    F.embedding_bag: EmbeddingBag(),
    **elementwise_rules(),
}

__all__ = ["RULES", "Call", "Linear", "Positions", "Rule"]
