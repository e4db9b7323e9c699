"""Inputs as the network sees them: standardised, then each on the unit sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from distributed_stiffness.data.examples import Split
from distributed_stiffness.errors import DataError

BLOCK = 1024  # examples in float64 at a time: bounds memory, changes no value
CONSTANT = 1e-12  # a standard deviation below this share of the mean is rounding, not variation


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Standardise with statistics of the training split, then scale each example to unit norm.

    The paper (v3) gives inputs zero mean and unit variance and puts each image on the unit
    sphere. Whether it takes mean and variance from each image, each pixel or the data set was not
    seen. We take them from the **whole training split, per channel**: images (n, C, H, W) have C
    means and standard deviations, any other inputs (n, ...) have one of each, since one for each
    feature would change the angles between examples.

    This matters for the critical length ξ, which is a cosine distance between inputs: what all
    examples share pulls them together. Median distance of 1,000 validation images:

    ============= ==== =========== =========
    data set      raw  per channel per pixel
    ============= ==== =========== =========
    MNIST         0.62 0.73        1.00
    Fashion-MNIST 0.39 0.71        1.04
    CIFAR-10      0.16 0.98        1.00
    ============= ==== =========== =========

    A ξ can be compared with another only under the same preprocessing.

    Inputs of dtype uint8 are first divided by 255, others are taken as they are; standardising
    makes that scale irrelevant, but means and standard deviations are then the familiar ones.
    An example that is zero once standardised has no direction, and is left at zero.
    """

    mean: tuple[float, ...]  # by channel
    std: tuple[float, ...]  # by channel
    unit_norm: bool = True

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise DataError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations: expected one of"
                " each a channel"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise DataError(
                f"mean {self.mean}, standard deviation {self.std}: expected finite numbers, and"
                " standard deviations above 0"
            )

    @classmethod
    def fit(cls, train: Split, unit_norm: bool = True) -> Self:
        """Take the statistics from a training split.

        A channel that never varies is only centred.

        Raises:
            DataError: no channel varies.
        """
        x_NCD = _by_channel(train.inputs)
        exact = x_NCD.dtype == np.uint8
        mean, std = _exact_statistics(x_NCD) if exact else _statistics(x_NCD)
        varies = [s > CONSTANT * abs(m) for m, s in zip(mean, std, strict=True)]
        if not any(varies):
            raise DataError(
                f"every training input is the same (mean {mean}): expected inputs that vary"
            )
        return cls(
            mean=mean,
            std=tuple(s if v else 1.0 for s, v in zip(std, varies, strict=True)),
            unit_norm=unit_norm,
        )

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Return raw inputs (n, ...) as float32 of the same shape; each depends on itself alone.

        Raises:
            DataError: the inputs have another number of channels.
        """
        x_NCD = _by_channel(raw)
        if x_NCD.shape[1] != len(self.mean):
            raise DataError(
                f"inputs of shape {raw.shape} have {x_NCD.shape[1]} channels: expected"
                f" {len(self.mean)}, as in the training split"
            )
        out = np.empty(x_NCD.shape, dtype=np.float32)
        for start in range(0, len(raw), BLOCK):
            out[start : start + BLOCK] = self._block(x_NCD[start : start + BLOCK])
        return out.reshape(raw.shape)

    def describe(self) -> str:
        """One sentence for the attributes of a store."""
        mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        sentence = (
            "uint8 divided by 255, then standardised per channel over the training split"
            f" (mean {mean}; standard deviation {std})"
        )
        return sentence + (", then each example scaled to unit norm" if self.unit_norm else "")

    def _block(self, raw_NCD: np.ndarray) -> np.ndarray:
        x_NCD = raw_NCD.astype(np.float64)
        if raw_NCD.dtype == np.uint8:
            x_NCD /= 255
        x_NCD -= np.array(self.mean)[:, None]
        x_NCD /= np.array(self.std)[:, None]
        if self.unit_norm:
            norm_N11 = np.sqrt(np.square(x_NCD).reshape(len(x_NCD), -1).sum(axis=1))[:, None, None]
            np.divide(x_NCD, norm_N11, out=x_NCD, where=norm_N11 > 0)
        return x_NCD


@dataclass(frozen=True)
class AsGiven:
    """Nothing is done: the network's owner knows what it takes.

    Floating-point inputs become float32; whole numbers (tokens, masks, bytes) stay what they are.
    """

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Return a copy: a network may write into its inputs."""
        return raw.astype(np.float32 if raw.dtype.kind == "f" else raw.dtype)

    def describe(self) -> str:
        """One sentence for the attributes of a store."""
        return "none: as they were given"


def _by_channel(inputs: np.ndarray) -> np.ndarray:
    """View images (n, C, H, W) as (n, C, H·W), anything else as one channel."""
    channels = inputs.shape[1] if inputs.ndim == 4 else 1
    return inputs.reshape(len(inputs), channels, math.prod(inputs.shape[1:]) // channels)


def _exact_statistics(x_NCD: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of uint8 / 255, from counts: the same bits on every machine."""
    counts = np.zeros((x_NCD.shape[1], 256), dtype=np.int64)
    for start in range(0, len(x_NCD), BLOCK):
        for channel, values in enumerate(np.moveaxis(x_NCD[start : start + BLOCK], 1, 0)):
            counts[channel] += np.bincount(values.reshape(-1), minlength=256)
    mean, std = [], []
    for row in counts.tolist():  # Python integers: products of sums do not overflow
        n = sum(row)
        total = sum(count * value for value, count in enumerate(row))
        squares = sum(count * value**2 for value, count in enumerate(row))
        mean.append(total / (255 * n))
        std.append(math.sqrt((n * squares - total**2) / (255 * n) ** 2))
    return tuple(mean), tuple(std)


def _statistics(x_NCD: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation in two passes: one pass cancels where the mean is large."""
    starts = range(0, len(x_NCD), BLOCK)
    n = len(x_NCD) * x_NCD.shape[2]
    blocks = (x_NCD[start : start + BLOCK].astype(np.float64) for start in starts)
    mean_C = sum(block.sum(axis=(0, 2)) for block in blocks) / n
    blocks = (x_NCD[start : start + BLOCK].astype(np.float64) for start in starts)
    squares_C = sum(np.square(block - mean_C[:, None]).sum(axis=(0, 2)) for block in blocks)
    std_C = np.sqrt(squares_C / n)
    return tuple(map(float, mean_C)), tuple(map(float, std_C))
