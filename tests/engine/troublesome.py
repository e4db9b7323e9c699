"""Networks that make trouble where they are built or run, named by tests as `troublesome:factory`.

A study carries them into every process of a run, so that a replica on Ray is in the same trouble as
the serial engine, and nothing of the package is replaced.
"""

from __future__ import annotations

import math
import os
import resource
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from distributed_stiffness.models import fully_connected

FSYNC_SECONDS = "STIFFNESS_TEST_FSYNC_SECONDS"
SPARE_BYTES = "STIFFNESS_TEST_SPARE_BYTES"
fsync = os.fsync


def slow_disk(input_shape: Sequence[int], n_classes: int, *, widths: Sequence[int]) -> nn.Module:
    """The paper's network; where FSYNC_SECONDS says so, chunks of cosines are slow to be written.

    The file has its temporary name meanwhile.
    """
    seconds = float(os.environ.get(FSYNC_SECONDS, "0"))

    def slow_fsync(descriptor: int) -> None:
        if "/cosine/c/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            time.sleep(seconds)
        fsync(descriptor)

    if seconds:
        os.fsync = slow_fsync
    return fully_connected(input_shape, n_classes, widths=widths)


class _Wide(nn.Module):
    """One hidden layer of plain parameters, whose gradients are kept whole and not as factors."""

    def __init__(self, n_inputs: int, width: int, n_outputs: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, n_inputs) / n_inputs**0.5)
        self.outer = nn.Parameter(torch.randn(n_outputs, width) / width**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs.flatten(1) @ self.inner.T) @ self.outer.T


def cramped(input_shape: Sequence[int], n_classes: int, *, width: int) -> nn.Module:
    """A wide network; where SPARE_BYTES says so, a replica that has it gets no more than these.

    A replica is told from a process that only prepares or trains by its module.
    """
    spare = int(os.environ.get(SPARE_BYTES, "0"))
    if spare and _is_replica() and resource.getrlimit(resource.RLIMIT_AS)[0] < 0:
        most = psutil.Process().memory_info().vms + spare
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return _Wide(math.prod(input_shape), width, n_classes)


def _is_replica() -> bool:
    """Whether a replica builds the network: to measure its speed, or for a task."""
    names = {frame.filename for frame in traceback.extract_stack()}
    return any(name.endswith("engine/replica.py") for name in names)


class _Poisoned(nn.Module):
    """The paper's network, which never gives gradients where `poison` is among its inputs, or after
    so many training steps; it writes a line to `log` each time.
    """

    steps: Tensor

    def __init__(self, network: nn.Module, poison: float, after: int, log: str) -> None:
        super().__init__()
        self.network, self.poison, self.after, self.log = network, poison, after, log
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        elif torch.is_grad_enabled() and self._is_poisoned(inputs):
            with Path(self.log).open("a") as file:
                file.write("poison\n")
            raise RuntimeError("this cannot be computed: poison")
        return self.network(inputs)

    def _is_poisoned(self, inputs: Tensor) -> bool:
        sums = inputs.flatten(1).double().sum(1)
        return bool((sums - self.poison).abs().min() < 1e-5) or int(self.steps) == self.after


def poisoned(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    widths: Sequence[int],
    log: str,
    poison: float = math.inf,
    after: int = -1,
) -> nn.Module:
    """Build a network that raises for one example, by the sum of its pixels, or one checkpoint."""
    network = fully_connected(input_shape, n_classes, widths=widths)
    return _Poisoned(network, poison, after, log)
