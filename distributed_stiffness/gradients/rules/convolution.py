"""Convolutions: the weight gradient of each example by one grouped convolution.

N examples are made N groups of one example, so that the library's own weight-gradient kernel
yields all per-example gradients at once. Any stride, dilation, padding and number of groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distributed_stiffness.gradients.rules.rule import Call, Rule

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class Convolution(Rule):
    """`torch.conv1d`, `conv2d` and `conv3d`."""

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims
        self.name = f"convolution{spatial_dims}d"

    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Take apart `convNd(input, weight, bias, stride, padding, dilation, groups)`."""
        named = _DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if named["input"].dim() != self.spatial_dims + 2:
            return None  # an image without a batch dimension
        kernel = named["weight"].shape[2:]
        dilation = self._each_dim(named["dilation"])
        padding = self._padding(named["padding"], kernel, dilation)
        if padding is None:
            return None
        roles = {role: named[role] for role in ("weight", "bias") if named.get(role) is not None}
        settings = {
            "stride": self._each_dim(named["stride"]),
            "padding": padding,
            "dilation": dilation,
            "groups": named["groups"],
        }
        return Call(named["input"], roles, settings)

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Σ over positions of D ⊗ patch for the weight, Σ of D for the bias."""
        if role == "bias":
            return grad_output.flatten(2).sum(2)
        weight, n = call.parameters["weight"], grad_output.shape[0]
        groups = call.settings["groups"]
        stacked = weight.detach().expand(n, *weight.shape).flatten(0, 1)
        grad: Tensor = torch.ops.aten.convolution_backward(
            grad_output.flatten(0, 1).unsqueeze(0),
            call.input.flatten(0, 1).unsqueeze(0),
            stacked,
            None,
            call.settings["stride"],
            call.settings["padding"],
            call.settings["dilation"],
            False,
            [0] * self.spatial_dims,
            n * groups,
            [False, True, False],
        )[1]
        return grad.reshape(n, *weight.shape)

    def _each_dim(self, value: Any) -> list[int]:
        return [value] * self.spatial_dims if isinstance(value, int) else list(value)

    def _padding(self, padding: Any, kernel: torch.Size, dilation: list[int]) -> list[int] | None:
        if padding == "valid":
            return [0] * self.spatial_dims
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            # An odd total pads one side more than the other, which this kernel cannot say.
            return [t // 2 for t in total] if all(t % 2 == 0 for t in total) else None
        return self._each_dim(padding)
