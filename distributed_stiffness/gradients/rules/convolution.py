"""Convolutions: the weight gradient of each example, by the faster of two exact ways.

For an example with T output positions ∂L/∂W = Σ_t D_t ⊗ patch_t. Either the patches are laid out,
channels last, and multiplied in one batched product; or N examples are made N groups of one grouped
convolution, whose own weight-gradient kernel yields all N. Any stride, dilation, padding, number of
groups; a transposed convolution is the same with input and D changed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_stiffness.gradients.rules.rule import Call, Positions, Rule, Seen

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}

# On a CPU the grouped convolution wins where images are large, for it copies no patch (k² times
# the input); patches win below, and where channels are few. Measured over the shapes of ResNet-20
# and ResNet-18 (docs/design/0004-layers.md). A rule by shape, not by a clock: the same bits again.
_GROUPED_POSITIONS = 256
_GROUPED_CHANNELS = 8


class Convolution(Rule):
    """`torch.conv1d`, `conv2d` and `conv3d`."""

    has_positions = True

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims
        self.name = f"convolution{spatial_dims}d"

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `convNd(input, weight, bias, stride, padding, dilation, groups)`."""
        named = _DEFAULTS | seen.named(_ARGUMENTS)
        if named["input"].dim() != self.spatial_dims + 2:
            return None  # an image without a batch dimension
        image, kernel = named["input"], named["weight"].shape[2:]
        dilation = self._each_dim(named["dilation"])
        if named["padding"] == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            # An odd total pads the end one more; F.pad counts dimensions from the last.
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            image, padding = F.pad(image, sides), [0] * self.spatial_dims
        else:
            padding = self._each_dim(0 if named["padding"] == "valid" else named["padding"])
        settings = {
            "stride": self._each_dim(named["stride"]),
            "padding": padding,
            "dilation": dilation,
            "groups": named["groups"],
        }
        return Call(image, _roles(named), settings)

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Σ_t D_t ⊗ patch_t for the weight, Σ_t D_t for the bias."""
        if role == "bias":
            return grad_output.flatten(2).sum(2)
        image, D = self._image_and_grad(call, grad_output)
        by = self._by_patches if self._takes_patches(call, D) else self._by_groups
        return by(call, image, D)

    def _takes_patches(self, call: Call, D: Tensor) -> bool:
        few = D.shape[2:].numel() < _GROUPED_POSITIONS
        return few or D.is_cuda or call.parameters["weight"].shape[1] < _GROUPED_CHANNELS

    def covers_positions(self, call: Call) -> bool:
        """Groups would each have positions of their own."""
        return bool(call.settings["groups"] == 1)

    def positions(self, call: Call, grad_output: Tensor) -> Positions:
        """Return D and patches; of one group only."""
        image, D = self._image_and_grad(call, grad_output)
        return Positions(D.flatten(2).transpose(1, 2), self._patches(call, image, D).flatten(2))

    def scratch(self, call: Call, grad_output: Tensor) -> int:
        """Patches are copies."""
        image, D = self._image_and_grad(call, grad_output)
        kernel = call.parameters["weight"].shape[2:].numel()
        patches = D.shape[2:].numel() * kernel * image.shape[1]
        return patches if self._takes_patches(call, D) else 0

    def _image_and_grad(self, call: Call, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the kernel slides over, and what it is multiplied with."""
        assert call.input is not None
        return call.input, grad_output

    def _by_patches(self, call: Call, image: Tensor, D: Tensor) -> Tensor:
        weight, groups = call.parameters["weight"], call.settings["groups"]
        n, kernel = len(D), weight.shape[2:]
        D_NgpT = D.flatten(2).unflatten(1, (groups, -1))
        patches = self._patches(call, image, D)  # (N, T, kernel, channels)
        if groups > 1:
            patches = patches.unflatten(-1, (groups, -1)).movedim(-2, 1)
        patches_NgTk = patches.reshape(n, groups, D_NgpT.shape[-1], -1)
        grad = torch.matmul(D_NgpT, patches_NgTk)
        return grad.reshape(n, weight.shape[0], *kernel, weight.shape[1]).movedim(-1, 2)

    def _patches(self, call: Call, image: Tensor, D: Tensor) -> Tensor:
        """Return the part of the image under the kernel at each position: (N, T, *kernel, d)."""
        settings, kernel = call.settings, call.parameters["weight"].shape[2:]
        sides = [side for p in reversed(settings["padding"]) for side in (p, p)]
        padded = F.pad(image.movedim(1, -1), (0, 0, *sides)).contiguous()
        first, *spatial, last = padded.stride()
        windows = padded.as_strided(
            (len(padded), *D.shape[2:], *kernel, padded.shape[-1]),
            (
                first,
                *(s * step for s, step in zip(spatial, settings["stride"], strict=True)),
                *(s * gap for s, gap in zip(spatial, settings["dilation"], strict=True)),
                last,
            ),
        )
        return windows.reshape(len(padded), math.prod(D.shape[2:]), *kernel, padded.shape[-1])

    def _by_groups(self, call: Call, image: Tensor, D: Tensor) -> Tensor:
        weight, n = call.parameters["weight"], len(D)
        grad: Tensor = torch.ops.aten.convolution_backward(
            D.flatten(0, 1).unsqueeze(0),
            image.flatten(0, 1).unsqueeze(0),
            weight.detach().new_empty(1).expand(n * weight.shape[0], *weight.shape[1:]),
            None,
            call.settings["stride"],
            call.settings["padding"],
            call.settings["dilation"],
            False,
            [0] * self.spatial_dims,
            n * call.settings["groups"],
            [False, True, False],
        )[1]
        return grad.reshape(n, *weight.shape)

    def _each_dim(self, value: int | Sequence[int]) -> list[int]:
        return [value] * self.spatial_dims if isinstance(value, int) else list(value)


class TransposedConvolution(Convolution):
    """`torch.conv_transpose1d`, `2d` and `3d`: the kernel slides over the output."""

    grad_is_left = False
    joins_bias = False

    def __init__(self, spatial_dims: int) -> None:
        super().__init__(spatial_dims)
        self.name = f"transposed_convolution{spatial_dims}d"

    def parse(self, seen: Seen) -> Call | None:
        """Take apart `conv_transposeNd(input, weight, bias, stride, padding, output_padding, …)`."""
        arguments = (*_ARGUMENTS[:5], "output_padding", "groups", "dilation")
        named = _DEFAULTS | seen.named(arguments)
        if named["input"].dim() != self.spatial_dims + 2:
            return None
        settings = {key: self._each_dim(named[key]) for key in ("stride", "padding", "dilation")}
        return Call(named["input"], _roles(named), settings | {"groups": named["groups"]})

    def _image_and_grad(self, call: Call, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        assert call.input is not None
        return grad_output, call.input


def _roles(named: dict[str, Any]) -> dict[str, Tensor]:
    return {role: named[role] for role in ("weight", "bias") if named.get(role) is not None}
