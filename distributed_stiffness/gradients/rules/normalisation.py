"""Normalisation layers: y = x̂ w + b, with x̂ free of the layer's parameters.

∂L/∂w = Σ x̂ D and ∂L/∂b = Σ D over the positions that share an element of w. What differs between
the layers is only how x̂ is made and which positions share.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_stiffness.gradients.rules.rule import Call, Rule, Seen


class _Affine(Rule):
    """The part that every normalisation shares."""

    arguments: tuple[str, ...]
    channels_first = True  # w has one element a channel (dim 1); else it spans the last dims

    def parse(self, seen: Seen) -> Call | None:
        """Take apart a call by the names of its arguments."""
        named = seen.named(self.arguments)
        if not self.covers(named):
            return None
        roles = {role: named[role] for role in ("weight", "bias") if named.get(role) is not None}
        settings = {k: v for k, v in named.items() if k not in ("input", "weight", "bias")}
        return Call(named["input"], roles, settings)

    def covers(self, named: dict[str, Any]) -> bool:
        """Whether the output of an example depends on that example alone."""
        return bool(named["input"].dim() >= 2)

    @abstractmethod
    def normalised(self, call: Call) -> Tensor:
        """Return x̂, of the shape of the input."""

    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Sum x̂ D (weight) or D (bias) over the positions that share an element."""
        grad = grad_output * self.normalised(call) if role == "weight" else grad_output
        if self.channels_first:
            return grad.flatten(2).sum(2) if grad.dim() > 2 else grad
        shared = grad.dim() - call.parameters[role].dim()
        return grad.flatten(1, shared - 1).sum(1) if shared > 1 else grad


class BatchNorm(_Affine):
    """Batch normalisation with its running statistics (evaluation mode)."""

    name = "batch_norm"
    arguments = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )

    def covers(self, named: dict[str, Any]) -> bool:
        """Batch statistics would make an example's gradient depend on its company."""
        return not named.get("training", False) and named["input"].dim() >= 2

    def normalised(self, call: Call) -> Tensor:
        """Return (x − running mean) / sqrt(running variance + eps)."""
        s = call.settings
        return F.batch_norm(
            _input(call), s["running_mean"], s["running_var"], eps=s.get("eps", 1e-5)
        )


class LayerNorm(_Affine):
    """Layer normalisation over the last dimensions."""

    name = "layer_norm"
    arguments: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
    channels_first = False
    any_leading = True

    def covers(self, named: dict[str, Any]) -> bool:
        """The first dimension must stay the examples'."""
        return bool(named["input"].dim() > len(named["normalized_shape"]))

    def row_dims(self, call: Call, output: Sequence[int]) -> tuple[int, ...]:
        """Those before the dimensions that are normalised."""
        return tuple(range(len(output) - len(call.settings["normalized_shape"])))

    def normalised(self, call: Call) -> Tensor:
        """Return the input with mean 0 and variance 1 over the last dimensions."""
        s = call.settings
        return F.layer_norm(_input(call), s["normalized_shape"], eps=s.get("eps", 1e-5))


class RMSNorm(LayerNorm):
    """Root-mean-square normalisation over the last dimensions."""

    name = "rms_norm"
    arguments = ("input", "normalized_shape", "weight", "eps")

    def normalised(self, call: Call) -> Tensor:
        """Return the input divided by its root mean square."""
        s = call.settings
        return F.rms_norm(_input(call), s["normalized_shape"], eps=s.get("eps"))


class GroupNorm(_Affine):
    """Group normalisation."""

    name = "group_norm"
    arguments = ("input", "num_groups", "weight", "bias", "eps")

    def normalised(self, call: Call) -> Tensor:
        """Return the input normalised in groups of channels."""
        s = call.settings
        return F.group_norm(_input(call), s["num_groups"], eps=s.get("eps", 1e-5))


class InstanceNorm(_Affine):
    """Instance normalisation, with each example's own statistics or the running ones."""

    name = "instance_norm"
    arguments = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "use_input_stats",
        "momentum",
        "eps",
    )

    def covers(self, named: dict[str, Any]) -> bool:
        """Statistics are over the positions of a channel."""
        return bool(named["input"].dim() >= 3)

    def normalised(self, call: Call) -> Tensor:
        """Return each channel of each example with mean 0 and variance 1, or as in training."""
        s = call.settings
        if not s.get("use_input_stats", True):
            return F.batch_norm(
                _input(call), s["running_mean"], s["running_var"], eps=s.get("eps", 1e-5)
            )
        return torch.instance_norm(
            _input(call), None, None, None, None, True, 0.0, s.get("eps", 1e-5), False
        )


def _input(call: Call) -> Tensor:
    assert call.input is not None
    return call.input
