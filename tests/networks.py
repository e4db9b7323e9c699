"""Networks of the tests; some are named as `networks:factory`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class Cancelling(nn.Module):
    """Its first unit is 2e-9 in real numbers and -1e-9 in float32, whatever its weights are.

    But for inputs whose sum is beyond a number: there it is near 1.

    Args:
        far_beyond: that number.
        kink: what its units go through, (N, 64) -> (N, 64).
    """

    def __init__(
        self, far_beyond: float = math.inf, kink: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 3)
        self.far_beyond, self.kink = far_beyond, kink

    def forward(self, x: Tensor) -> Tensor:
        z, big = self.first(x), x.sum(1, keepdim=True)
        lost = (big + 3e-9) - big  # 0 in float32
        unit = z[:, :1] - z[:, :1].detach() + lost - 1e-9 + (big > self.far_beyond)
        return self.last(self.kink(torch.cat([unit, z[:, 1:]], 1)))
