"""How fast a replica is, measured in a second or two before its first task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distributed_stiffness.engine.checks import (
    classes_of_whole_matrix,
    n_undecided,
    read_pairs,
    remade_gradients,
    sample_work,
)
from distributed_stiffness.engine.prediction import CheckSeconds, Speed
from distributed_stiffness.engine.sums import Folding
from distributed_stiffness.gradients.batches import Nest, take
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.plan import Plan
from distributed_stiffness.store import chunk_in_memory
from distributed_stiffness.tiling import pieces

# So many multiply-adds, and rows of a product, show nearly the full speed.
_WORK, _ROWS = {"cpu": 2e10, "cuda": 2e12}, 512
_EDGE = 1024  # of a tile that is folded, or read
_FEW, _MANY = 4, 32  # float64 gradients made one by one, and added up by one backward pass
_LONG = 2.0  # seconds: such a call needs no other one to warm up
_CPU = torch.device("cpu")


def measure(
    gradients: PerExampleGradients,
    examples: tuple[Nest, Tensor],
    plan: Plan,
    folding: Folding | None = None,
) -> Speed:
    """Measure what one batch of gradients takes, one product, and the folding of one tile.

    Args:
        gradients: with any weights.
        examples: inputs and targets of one batch, (batch, …) and (batch,).
        plan: whose batches and strips are measured.
        folding: where sums are kept.
    """
    made = gradients.rows(*examples)
    making = _seconds(lambda: gradients.rows(*examples), gradients.device)
    enough = math.isqrt(int(_WORK[gradients.device.type] / max(1, plan.pair_work)))
    rows = made.empty(min(plan.strip, _ROWS, max(len(made), enough)))
    for part in pieces(slice(0, len(rows)), len(made)):
        rows.put(part, made[: part.stop - part.start])
    columns = rows[:]  # another object: a block with itself is half the work
    multiplying = _seconds(lambda: cosine(rows, columns, gradients.precision), gradients.device)
    fold = 0.0 if folding is None else _folding(folding, plan.n_examples)
    return Speed(making / len(made), multiplying / len(rows) ** 2, fold=fold)


def measure_checks(
    gradients: PerExampleGradients,
    examples: tuple[Nest, Tensor],
    plan: Plan,
    labels: np.ndarray,
    speed: Speed,
) -> CheckSeconds:
    """Measure what checks are made of, and say what those of a plan take.

    Args:
        gradients: with any weights.
        examples: inputs and targets of one batch, (batch, …) and (batch,).
        plan: whose checks are meant.
        labels: of all examples, (N,).
        speed: of the same process.
    """
    reference = gradients.in_float64.plain

    def alone(n: int) -> Tensor:
        return reference.unit_gradients(*_first(examples, n))

    def together(n: int) -> Tensor:
        return reference.unit_sum(*_first(examples, n), torch.ones(n, dtype=torch.float64))

    some = min(_FEW, len(examples[1]))
    gradient = _seconds_of_long(lambda: alone(some), gradients.device) / some
    units = alone(some)
    pair = _seconds(lambda: units @ units.T, gradients.device) / some**2
    many = max(1, min(_MANY, int(_LONG / gradient), len(examples[1])))
    summed = _seconds_of_long(lambda: together(many), gradients.device) / many
    sample = sample_work(plan, gradients.n_parameters)
    each = (
        gradient * sample.gradients
        + pair * sample.pairs
        + speed.gradient * remade_gradients(plan)
        + _reading(plan) * read_pairs(plan)
    )
    classes = classes_of_whole_matrix(plan, labels, gradients.n_parameters)
    return CheckSeconds(each=each, whole=summed * int(np.isin(labels, classes).sum()))


def _first(examples: tuple[Nest, Tensor], n: int) -> tuple[Nest, Tensor]:
    return take(examples[0], slice(0, n)), examples[1][:n]


def _folding(folding: Folding, n_examples: int) -> float:
    """Return the seconds that a pair takes until it is in the sums of both its examples."""
    edge = min(_EDGE, n_examples // 2)
    rows, columns = slice(0, edge), slice(edge, 2 * edge)
    norms = np.ones(n_examples)
    tile = _some_cosines(edge)
    return _seconds(lambda: folding.tile(rows, columns, tile, norms), _CPU) / edge**2


def _reading(plan: Plan) -> float:
    """Return the seconds that a stored pair takes to be read from memory and looked at."""
    edge = min(_EDGE, plan.tile)
    chunk = chunk_in_memory(_some_cosines(edge))
    return _seconds(lambda: n_undecided(chunk[...], 1e-6, diagonal=False), _CPU) / edge**2


def _some_cosines(edge: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.uniform(-1, 1, (edge, edge)).astype(np.float32)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time a call that has been warmed up by another one."""
    _once(function, device)
    return _once(function, device)


def _seconds_of_long(function: Callable[[], object], device: torch.device) -> float:
    """Time a call that nothing need be compiled for: the first counts, if it is a long one."""
    seconds = _once(function, device)
    return seconds if seconds > _LONG else _once(function, device)


def _once(function: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
