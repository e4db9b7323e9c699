"""Residual networks for small images (He et al. 2016): ResNet-20 and ResNet-18.

The paper (v3) uses ResNet-20 v1 in the form of the Keras example, **without** batch normalisation,
so that is ResNet-20's default here; ResNet-18 has batch normalisation unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.errors import ModelError

_NORMALISATIONS = ("none", "batch")


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where sizes change."""

    def __init__(self, d: int, p: int, stride: int, normalisation: str) -> None:
        super().__init__()
        self.conv1 = _convolution(d, p, 3, stride, normalisation)
        self.norm1 = _normalisation(p, normalisation)
        self.conv2 = _convolution(p, p, 3, 1, normalisation)
        self.norm2 = _normalisation(p, normalisation)
        self.shortcut = (
            nn.Identity() if d == p and stride == 1 else _convolution(d, p, 1, stride, "none")
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, d, H, W) -> (N, p, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3×3 stem, stages of blocks (each stage but the first halves the image), mean, linear."""

    def __init__(
        self,
        input_shape: Sequence[int],
        n_classes: int,
        *,
        widths: Sequence[int],
        blocks: Sequence[int],
        normalisation: str,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ModelError(
                f"a ResNet needs images (channels, height, width), got inputs of shape"
                f" {tuple(input_shape)}; use fully_connected"
            )
        if normalisation not in _NORMALISATIONS:
            raise ModelError(
                f"unknown normalisation {normalisation!r}: expected one of"
                f" {', '.join(_NORMALISATIONS)}"
            )
        self.stem = _convolution(input_shape[0], widths[0], 3, 1, normalisation)
        self.stem_norm = _normalisation(widths[0], normalisation)
        stages: list[nn.Module] = []
        d = widths[0]
        for stage, (p, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stages.append(Block(d, p, 2 if stage and not block else 1, normalisation))
                d = p
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(d, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, classes)."""
        x = self.stages(F.relu(self.stem_norm(self.stem(x))))
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


def resnet20(input_shape: Sequence[int], n_classes: int, *, normalisation: str = "none") -> ResNet:
    """ResNet-20 v1 (0.27 million parameters)."""
    return ResNet(
        input_shape, n_classes, widths=(16, 32, 64), blocks=(3, 3, 3), normalisation=normalisation
    )


def resnet18(input_shape: Sequence[int], n_classes: int, *, normalisation: str = "batch") -> ResNet:
    """ResNet-18 with a 3×3 stem and no first pooling (11.2 million parameters)."""
    return ResNet(
        input_shape,
        n_classes,
        widths=(64, 128, 256, 512),
        blocks=(2, 2, 2, 2),
        normalisation=normalisation,
    )


def _convolution(d: int, p: int, kernel: int, stride: int, normalisation: str) -> nn.Conv2d:
    # Batch normalisation subtracts any bias again.
    return nn.Conv2d(d, p, kernel, stride, padding=kernel // 2, bias=normalisation == "none")


def _normalisation(channels: int, normalisation: str) -> nn.Module:
    return nn.BatchNorm2d(channels) if normalisation == "batch" else nn.Identity()
