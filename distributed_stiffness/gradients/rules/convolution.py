"""Convolutions: ∂L/∂W = Σ_t D_t ⊗ patch_t over the output positions t, for every example at once.

Patches are laid out with channels last and multiplied in one batched product. Where the first
dimension of the kernel moves by one place, only its other dimensions are laid out: its own steps
are products with the same matrix, begun some rows further down, so that a k×k kernel copies its
input k times and not k². Of few channels, as an image has, patches would be copied a few numbers at
a time: there each place under the kernel is laid out as a plane. Any stride, dilation, padding,
number of groups; a transposed convolution is the same with input and D changed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_stiffness.gradients.rules.rule import Call, Positions, Rule, Seen

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}

# From so many positions on copying less pays, below it one large product does. Measured over the
# shapes of ResNet-20 and ResNet-18 (docs/design/0004-layers.md). A rule by shape, not by a clock:
# the same bits again.
_POSITIONS_FOR_STEPS = 128
_CHANNELS_FOR_PLANES = 4


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
        return self._way(call, image, D)(call, image, D)

    def _way(
        self, call: Call, image: Tensor, D: Tensor
    ) -> Callable[[Call, Tensor, Tensor], Tensor]:
        settings = call.settings
        if settings["groups"] > 1 or D.is_cuda:
            return self._by_patches
        if image.shape[1] <= _CHANNELS_FOR_PLANES:
            return self._by_planes
        is_long = D.shape[2:].numel() >= _POSITIONS_FOR_STEPS
        return self._by_steps if is_long and settings["stride"][0] == 1 else self._by_patches

    def covers_positions(self, call: Call) -> bool:
        """Groups would each have positions of their own."""
        return bool(call.settings["groups"] == 1)

    def positions(self, call: Call, grad_output: Tensor) -> Positions:
        """Return D and patches; of one group only."""
        image, D = self._image_and_grad(call, grad_output)
        patches = self._patches(call, self._padded(call, image), D)
        return Positions(D.flatten(2).transpose(1, 2), patches.flatten(2))

    def scratch(self, role: str, call: Call, grad_output: Tensor) -> int:
        """Patches are copies."""
        if role == "bias":
            return 0
        image, D = self._image_and_grad(call, grad_output)
        first, *others = call.parameters["weight"].shape[2:]
        takes_steps = self._way(call, image, D) == self._by_steps
        copies = math.prod(others) * (1 if takes_steps else first)
        return D.shape[2:].numel() * copies * image.shape[1]

    def making_work(self, role: str, call: Call, output: Sequence[int]) -> int:
        """T·p·d·k an example for the weight."""
        if role == "bias":
            return math.prod(output)
        weight = call.parameters["weight"]
        return self._places(call, output) * weight.numel()

    def _places(self, call: Call, output: Sequence[int]) -> int:  # noqa: ARG002
        """Return how often the kernel is laid down, over all examples."""
        return int(output[0]) * math.prod(output[2:])

    def _image_and_grad(self, call: Call, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the kernel slides over, and what it is multiplied with."""
        assert call.input is not None
        return call.input, grad_output

    def _by_patches(self, call: Call, image: Tensor, D: Tensor) -> Tensor:
        weight, groups = call.parameters["weight"], call.settings["groups"]
        n, kernel = len(D), weight.shape[2:]
        D_NgpT = D.flatten(2).reshape(n, groups, -1, D.shape[2:].numel())
        patches = self._patches(call, self._padded(call, image), D)  # (N, T, kernel, channels)
        if groups > 1:
            patches = patches.reshape(*patches.shape[:-1], groups, -1).movedim(-2, 1)
        patches_NgTk = patches.reshape(n, groups, D_NgpT.shape[-1], -1)
        grad = torch.matmul(D_NgpT, patches_NgTk)
        return grad.reshape(n, weight.shape[0], *kernel, weight.shape[1]).movedim(-1, 2)

    def _by_planes(self, call: Call, image: Tensor, D: Tensor) -> Tensor:
        (n, p), (d, *kernel) = D.shape[:2], call.parameters["weight"].shape[1:]
        padded = F.pad(image.contiguous(), self._margins(call))
        batch, channel, *spatial = padded.stride()
        planes = padded.as_strided(
            (n, d, *kernel, *D.shape[2:]),
            (batch, channel, *self._strides(call, spatial, "dilation", "stride")),
        ).reshape(n, d * math.prod(kernel), -1)
        grad = torch.bmm(planes, D.flatten(2).transpose(1, 2))
        return grad.reshape(n, d, *kernel, p).movedim(-1, 1)

    def _by_steps(self, call: Call, image: Tensor, D: Tensor) -> Tensor:
        weight = call.parameters["weight"]
        n, p, kernel, d = len(D), weight.shape[0], weight.shape[2:], image.shape[1]
        D_NpT, width = D.flatten(2), math.prod(D.shape[3:])
        grad = D.new_empty(n, p, kernel[0], math.prod(kernel[1:]) * d)
        # Of the first dimension every line is there: it moves by products further down.
        lines = self._padded(call, image)
        patches = self._patches(call, lines, D, first=(lines.shape[1], 1))
        patches_NTk = patches.reshape(n, -1, grad.shape[-1])
        for step in range(kernel[0]):
            first = step * call.settings["dilation"][0] * width
            some = patches_NTk[:, first : first + D_NpT.shape[2]]
            torch.bmm(D_NpT, some, out=grad[:, :, step])
        return grad.reshape(n, p, *kernel, d).movedim(-1, 2)

    def _patches(
        self, call: Call, padded: Tensor, D: Tensor, first: tuple[int, int] | None = None
    ) -> Tensor:
        """Return the part of an image under the kernel at each position: (N, T, *kernel, d).

        `first`: positions and kernel size along the first dimension, if not D's and the kernel's.
        """
        kernel = list(call.parameters["weight"].shape[2:])
        places = list(D.shape[2:])
        if first is not None:
            places[0], kernel[0] = first
        batch, *spatial, last = padded.stride()
        windows = padded.as_strided(
            (len(padded), *places, *kernel, padded.shape[-1]),
            (batch, *self._strides(call, spatial, "stride", "dilation"), last),
        )
        return windows.reshape(len(padded), math.prod(places), *kernel, padded.shape[-1])

    def _padded(self, call: Call, image: Tensor) -> Tensor:
        """Return the image with its margins, channels last."""
        return F.pad(image.movedim(1, -1), (0, 0, *self._margins(call))).contiguous()

    def _margins(self, call: Call) -> list[int]:
        """Return what `F.pad` adds, the last dimension first."""
        return [side for p in reversed(call.settings["padding"]) for side in (p, p)]

    def _strides(self, call: Call, spatial: Sequence[int], *settings: str) -> list[int]:
        """Return the strides of windows: from one place to the next, or within the kernel."""
        return [
            stride * step
            for setting in settings
            for stride, step in zip(spatial, call.settings[setting], strict=True)
        ]

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
        """Take apart `conv_transposeNd(input, weight, bias, stride, padding, …)`."""
        arguments = (*_ARGUMENTS[:5], "output_padding", "groups", "dilation")
        named = _DEFAULTS | seen.named(arguments)
        if named["input"].dim() != self.spatial_dims + 2:
            return None
        settings = {key: self._each_dim(named[key]) for key in ("stride", "padding", "dilation")}
        return Call(named["input"], _roles(named), settings | {"groups": named["groups"]})

    def _places(self, call: Call, output: Sequence[int]) -> int:  # noqa: ARG002
        assert call.input is not None
        return super()._places(call, call.input.shape)

    def _image_and_grad(self, call: Call, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        assert call.input is not None
        return grad_output, call.input


def _roles(named: dict[str, Any]) -> dict[str, Tensor]:
    return {role: named[role] for role in ("weight", "bias") if named.get(role) is not None}
