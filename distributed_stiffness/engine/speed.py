"""How fast a replica is, measured in a second or two before its first task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distributed_stiffness.engine.prediction import Speed
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.plan import Plan
from distributed_stiffness.tiling import pieces

# So many multiply-adds, and rows of a product, show nearly the full speed.
_WORK, _ROWS = {"cpu": 2e10, "cuda": 2e12}, 512


def measure(gradients: PerExampleGradients, examples: tuple[Tensor, Tensor], plan: Plan) -> Speed:
    """Measure what one batch of gradients takes, and one product.

    Args:
        gradients: with any weights.
        examples: inputs and targets of one batch, (batch, …) and (batch,).
        plan: whose batches and strips are measured.
    """
    made = gradients.rows(*examples)
    making = _seconds(lambda: gradients.rows(*examples), gradients.device)
    enough = math.isqrt(int(_WORK[gradients.device.type] / max(1, plan.pair_work)))
    rows = made.empty(min(plan.strip, _ROWS, max(len(made), enough)))
    for part in pieces(slice(0, len(rows)), len(made)):
        rows[part].copy_(made[: part.stop - part.start])
    columns = rows[:]  # another object: a block with itself is half the work
    multiplying = _seconds(lambda: cosine(rows, columns, gradients.precision), gradients.device)
    return Speed(making / len(made), multiplying / len(rows) ** 2)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time a call that has been warmed up by another one."""
    function()
    _synchronise(device)
    started = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
