"""Networks that tests name as `networks:factory`."""

from __future__ import annotations

import math

from torch import nn


def three_outputs(input_shape: tuple[int, ...]) -> nn.Module:
    """A network for three classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 3))


def few_units(input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Three ReLUs without biases: where all are shut, the whole gradient is 0."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), 3, bias=False),
        nn.ReLU(),
        nn.Linear(3, n_classes, bias=False),
    )
