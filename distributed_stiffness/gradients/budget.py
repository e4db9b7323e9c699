"""Fit a network's gradients into a memory budget: which weights stay factors, how many rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import psutil

from distributed_stiffness.gradients.error_bound import sample_size
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.recipe import Layer, Work
from distributed_stiffness.plan import BATCH_BYTES, ROWS_SHARE, Plan, make_plan

# What the comparison of every batch with plain autograd may take of the work; and multiply-adds
# that are never grudged.
CHECKS_SHARE, _ALWAYS = 0.03, 1e8
# A GPU wants many examples at a time.
_BATCH_BYTES = {"cpu": BATCH_BYTES, "cuda": 4 * 2**30}


def fit(
    gradients: PerExampleGradients,
    *,
    n_examples: int,
    memory: int,
    n_checkpoints: int = 1,
    tile: int | None = None,
    device: str | None = None,
) -> tuple[PerExampleGradients, Plan]:
    """Choose the form of each weight's gradients for a budget, and plan.

    Args:
        gradients: with the forms that the pair rule gives.
        n_examples: N.
        memory: bytes of a replica.
        n_checkpoints: matrices wanted.
        tile: edge of a tile; None chooses.
        device: where the matrix will be made; None: where the network is.

    Raises:
        StudyError: the budget does not hold even the smallest block.
    """
    row_bytes, making_bytes = gradients.bytes_per_example()
    recipe, itemsize = gradients.recipe, gradients.precision.rows.itemsize
    chosen = choose_factored(
        recipe.layers,
        recipe.factored,
        n_examples=n_examples,
        row_numbers=row_bytes // itemsize,
        room=int(ROWS_SHARE * memory) // itemsize,
    )
    if chosen != recipe.factored:
        gradients = gradients.with_factored(chosen)
        row_bytes, making_bytes = gradients.bytes_per_example()
    work = gradients.work()
    plan = make_plan(
        n_examples=n_examples,
        n_checkpoints=n_checkpoints,
        row_bytes=row_bytes,
        making_bytes=making_bytes,
        making_work=work.making,
        pair_work=work.pair,
        memory=memory,
        tile=tile,
        factored=chosen,
        batch_bytes=_BATCH_BYTES[device or gradients.device.type],
    )
    plan = _with_checks(plan, work, gradients.n_parameters)
    gradients.checked_share = plan.checked_share
    return gradients, plan


def _with_checks(plan: Plan, work: Work, n_parameters: int) -> Plan:
    """Let the checks take their share of the work: of each batch, and of the sample."""
    making = plan.gradients_per_example * work.making
    total = max(1.0, making + plan.n_examples / 2 * work.pair)  # of an example
    # A pass of its own, and the gradients of the parameters, once: a batch that is made again is
    # not checked again. A pass is as dear as if it had one example more, and there are three.
    each = 1.5 * max(1, work.passes)
    affordable = max(CHECKS_SHARE * total, _ALWAYS / plan.n_examples) / each
    checked = min(plan.batch, max(1, int(affordable * plan.batch) - 3))
    checking = (checked + min(3, checked)) / plan.batch * each
    return replace(
        plan,
        checked_share=checked / plan.batch,
        checked_work=checking / (total + checking),
        sample=sample_size(
            passes=work.passes,
            total=plan.n_examples * total,
            n_parameters=n_parameters,
            memory=plan.sample_memory,
        ),
    )


def free_memory() -> int:
    """Return half of what is free, in bytes."""
    return int(psutil.virtual_memory().available // 2)


def choose_factored(
    layers: Mapping[str, Layer],
    factored: tuple[str, ...],
    *,
    n_examples: int,
    row_numbers: int,
    room: int,
) -> tuple[str, ...]:
    """Choose the weights that are kept as factors, by counted multiply-adds of the whole matrix.

    Where a budget does not hold all rows, gradients are made (K + 1)/2 times for K panels. Factors
    that cost a pair more than the product of rows, but are shorter, can then cost less in all.

    Args:
        layers: weights that can be kept as factors.
        factored: those whose pairs cost less that way.
        n_examples: N.
        row_numbers: numbers in a row as it is with `factored`.
        room: numbers that may be held.
    """
    passes = 2 * sum(layer.making_work for layer in layers.values())

    def work(kept: frozenset[str]) -> float:
        numbers = row_numbers
        pair = making = 0
        for weight, layer in layers.items():
            if weight in kept:
                pair += layer.factored_work
                numbers += 0 if weight in factored else layer.factored_numbers - layer.numbers
            else:
                pair += layer.numbers
                making += layer.making_work
        panels = math.ceil(n_examples / max(1, room // max(1, numbers)))
        return n_examples**2 / 2 * pair + n_examples * (panels + 1) / 2 * (passes + making)

    kept = frozenset(factored)
    while True:
        others = [kept | {w} for w, layer in layers.items() if w not in kept and layer.is_shorter]
        best = min(others, key=work, default=kept)
        if work(best) >= work(kept):
            return tuple(weight for weight in layers if weight in kept)
        kept = best
