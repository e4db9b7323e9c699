"""The paper's fully connected network (v3): ReLU, input → 500 → 300 → 100 → classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn


def fully_connected(
    input_shape: Sequence[int], n_classes: int, *, widths: Sequence[int] = (500, 300, 100)
) -> nn.Sequential:
    """Build a ReLU network on flattened inputs; `widths` are those of the hidden layers."""
    sizes = [math.prod(input_shape), *widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for d, p in itertools.pairwise(sizes):
        layers += [nn.Linear(d, p), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))
