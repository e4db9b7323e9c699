"""Structured rules, by the torch function that they differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from distributed_stiffness.gradients.rules.convolution import Convolution
from distributed_stiffness.gradients.rules.embedding import Embedding
from distributed_stiffness.gradients.rules.linear import Linear
from distributed_stiffness.gradients.rules.normalisation import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from distributed_stiffness.gradients.rules.rule import Call, Rule

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Linear(),
    torch.conv1d: Convolution(1),
    torch.conv2d: Convolution(2),
    torch.conv3d: Convolution(3),
    F.batch_norm: BatchNorm(),
    F.layer_norm: LayerNorm(),
    F.group_norm: GroupNorm(),
    F.instance_norm: InstanceNorm(),
    F.rms_norm: RMSNorm(),
    F.embedding: Embedding(),
}

__all__ = ["RULES", "Call", "Linear", "Rule"]
