"""How images lie in memory: channels last, or channel by channel."""

from __future__ import annotations

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
from distributed_stiffness.gradients.network import Network


def lay_out_for_a_cpu(network: Network, few: Nest) -> torch.memory_format:
    """Lay the images of a network out in memory as is best, and return how that is.

    A CPU's convolutions like channels last. Where groups of channels are normalised they lie
    channel by channel: torch takes the variance of others as E[x²] − E[x]², of which flat images
    leave three digits (docs/design/0002-numbers.md). As they are where it has no such layers, or
    takes images that lie channel by channel alone (`view`).

    Args:
        network: float32, on a CPU.
        few: inputs of a few examples.
    """
    if not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in network.module.modules()):
        return torch.preserve_format
    _lay_out(network, torch.channels_last)
    few = prepare(take(few, slice(3)), torch.float32, torch.device("cpu"))
    few = map_tensors(torch.clone, few)  # a network may write into its inputs
    args, kwargs = arguments(map_tensors(lambda t: image_in(torch.channels_last, t), few))
    try:
        with torch.no_grad(), _Calls() as calls, network.running() as module:
            module(*args, **kwargs)
    except Exception:  # whatever a network's own code raises
        _lay_out(network, torch.contiguous_format)
        return torch.preserve_format
    if calls.seen & {F.group_norm, torch.group_norm}:
        _lay_out(network, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _lay_out(network: Network, memory_format: torch.memory_format) -> None:
    """Lay the kernels of images out so; torch's own `to` refuses where there are others too."""
    for p in network.module.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=memory_format)


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
