"""How images lie in memory: channels last, or channel by channel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distributed_stiffness.gradients.batches import (
    Nest,
    arguments,
    map_tensors,
    prepare,
    take,
)


def laid_out_for_a_cpu(model: nn.Module, inputs: Nest) -> tuple[nn.Module, torch.memory_format]:
    """Return a copy whose images lie in memory as is best, and how.

    A CPU's convolutions like channels last. Where groups of channels are normalised they lie
    channel by channel: torch takes the variance of others as E[x²] − E[x]², of which flat images
    leave three digits (docs/design/0002-numbers.md). The model itself where it has no such layers,
    takes images that lie channel by channel alone (`view`), or cannot be copied.
    """
    if not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules()):
        return model, torch.preserve_format
    try:
        copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
        few = prepare(take(inputs, slice(3)), torch.float32, torch.device("cpu"))
        few = map_tensors(torch.clone, few)  # a network may write into its inputs
        args, kwargs = arguments(map_tensors(lambda t: image_in(torch.channels_last, t), few))
        with torch.no_grad(), _Calls() as calls:
            copied(*args, **kwargs)
    except Exception:  # whatever a network's own code raises
        return model, torch.preserve_format
    has_groups = bool(calls.seen & {F.group_norm, torch.group_norm})
    best = torch.contiguous_format if has_groups else torch.channels_last
    return copied.to(memory_format=best), best


def image_in(memory_format: torch.memory_format, t: Tensor) -> Tensor:
    """Return images (N, C, H, W) laid out so; any other tensor as it is."""
    if t.dim() != 4 or memory_format == torch.preserve_format:
        return t
    return t.contiguous(memory_format=memory_format)


class _Calls(TorchFunctionMode):
    """Note which functions a network calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Callable[..., Any]] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note it, and make the call."""
        self.seen.add(func)
        return func(*args, **(kwargs or {}))
