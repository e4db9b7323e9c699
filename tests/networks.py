"""Networks that tests name as `networks:factory`."""

from __future__ import annotations

import math

from torch import nn


def three_outputs(input_shape: tuple[int, ...]) -> nn.Module:
    """A network for three classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 3))
