"""The paper's CNN (v3): three 3×3 convolutions, each with 2×2 max-pooling, then one linear layer.

The activation is not named in the sources at hand; ReLU is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from distributed_stiffness.errors import ModelError


def cnn(
    input_shape: Sequence[int], n_classes: int, *, channels: Sequence[int] = (16, 32, 32)
) -> nn.Sequential:
    """Build the network for images (channels, height, width).

    Raises:
        ModelError: the inputs are not images, or too small to be halved once a convolution.
    """
    halvings = len(channels)
    if len(input_shape) != 3 or min(input_shape[1:]) < 2**halvings:
        raise ModelError(
            f"the CNN needs images (channels, height, width) of at least {2**halvings} pixels a"
            f" side, got inputs of shape {tuple(input_shape)}; use fully_connected"
        )
    sizes = [input_shape[0], *channels]
    layers: list[nn.Module] = []
    for d, p in itertools.pairwise(sizes):
        layers += [nn.Conv2d(d, p, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    height, width = (side >> halvings for side in input_shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * height * width, n_classes))
