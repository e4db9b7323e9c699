"""Inputs of a network: a tensor, a tuple of tensors, or a dict of tensors, examples first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply `function` to every tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(function(value) for value in inputs)


def count_examples(inputs: Inputs) -> int:
    """Return N."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    return len(next(iter(inputs.values() if isinstance(inputs, dict) else inputs)))


def take(inputs: Inputs, rows: slice | Tensor) -> Inputs:
    """Select examples."""
    return map_inputs(lambda t: t[rows], inputs)


def prepare(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Move to the device; floating tensors (not indices) are cast to `dtype`."""
    return map_inputs(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run the network on its inputs: as one argument, several, or by name."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
