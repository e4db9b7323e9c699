"""Before long work: a few examples by the chosen rules, against the definition in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients.batch_check import require_same_sum, said_infinite, said_wrong
from distributed_stiffness.gradients.batches import (
    Nest,
    count_examples,
    prepare,
    take,
    tensors,
)
from distributed_stiffness.gradients.evidence import EXAMPLES
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.precision import precision_mode
from distributed_stiffness.gradients.reference import real_numbers

# Both sides run in float64, where two right ways differ by about 1e-13 of an example's gradient;
# a wrong rule differs by about 1.
TOLERANCE = 1e-8
# A network that rounds to float32 inside, whatever it is given, differs from itself by that.
TOLERANCE_OF_ROUNDING = 1e-4
# Unit rows are float32 and their products sum up to millions of terms (precision.py).
COSINE_TOLERANCE = 1e-5
_TINY = 1e-290


def self_check(
    model: nn.Module,
    loss: Loss,
    inputs: Nest,
    targets: Nest,
    *,
    parameters: Sequence[str] | str | None = None,
) -> PerExampleGradients:
    """Compare rules and definition, in another order and other company; return the checked rules.

    Args:
        model: in evaluation mode.
        loss: as in `PerExampleGradients`.
        inputs: N first; the first 8 are used.
        targets: N first.
        parameters: glob patterns of the parameters in play.

    Returns:
        The float64 gradients object that was checked; its recipe holds in every precision.

    Raises:
        GradientError: examples depend on each other, or a parameter's gradient comes out wrong
            whichever way it is made.
    """
    few = take((inputs, targets), slice(EXAMPLES))
    checked = PerExampleGradients(model, loss, few, parameters=parameters, precision="float64")
    check_gradients(checked, *few)
    return checked


def check_gradients(gradients: PerExampleGradients, inputs: Nest, targets: Nest) -> None:
    """Compare gradients of a few examples with the definition, in float64.

    What rules make wrong goes another way from now on, with a warning: torch.func, or one example
    at a time.

    Raises:
        GradientError: as `self_check`.
    """
    exact = gradients.in_float64
    inputs = prepare(inputs, torch.float64, gradients.device)
    dtypes = _FloatingDtypes()
    try:
        with dtypes:
            unit, norm = exact.plain.gradients(inputs, targets)
    except Exception as error:  # the network's own code: any type of error
        if isinstance(error, GradientError):
            raise
        raise GradientError(
            f"self-check: the network does not take one example alone in float64 ({error}), so that"
            " per-example gradients are not defined, or cannot be checked"
        ) from error
    if not torch.isfinite(norm).all():
        raise GradientError("self-check: " + said_infinite(norm))
    tolerance = TOLERANCE if dtypes.found <= {torch.float64} else TOLERANCE_OF_ROUNDING
    require_same_sum(exact, (inputs, targets), unit, norm)
    while True:
        differences = _differences(exact, inputs, targets, unit, norm)
        wrong = {name: size for name, size in differences.items() if not size <= tolerance}
        if not wrong:
            break
        if not gradients.take_another_way(wrong):
            raise GradientError("self-check: " + said_wrong(wrong))
    unrounded = copy.copy(exact)  # rows too, which bf16 rounds
    unrounded.precision = precision_mode("float64", exact.device)
    rows = unrounded.rows(inputs, targets)
    # Below, true norms lose digits.
    off = torch.where(norm > _TINY, (rows.norm / norm - 1).abs(), 0.0)
    for what, worst, allowed in (
        ("a norm", off.max(), tolerance),
        (
            "a cosine",
            (cosine(rows, rows) - unit @ unit.T).abs().max(),
            max(tolerance, COSINE_TOLERANCE),
        ),
    ):
        if not worst <= allowed:
            raise GradientError(
                f"self-check: {what} differs from one-example autograd by {float(worst):.1e}"
                f" (allowed: {allowed:.0e}), though every gradient agrees: its numbers are too"
                " large or too small for this network's products; scale the loss"
            )


class _FloatingDtypes(TorchFunctionMode):
    """Note in which floating-point numbers a network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.found |= {t.dtype for t in tensors(output) if t.is_floating_point()}
        return output


def _differences(
    exact: PerExampleGradients, inputs: Nest, targets: Nest, unit_NP: Tensor, norm_N: Tensor
) -> dict[str, float]:
    """Return how far each parameter's gradients are off, at most, in units of a whole gradient.

    Made backwards: all of them, and the second half, which is other company.
    """
    backwards = torch.arange(count_examples(inputs) - 1, -1, -1, device="cpu")
    half = backwards[: len(backwards) // 2]
    worst: dict[str, float] = {}
    for some in (backwards, half) if len(half) else (backwards,):
        made, scale = exact.scaled(*take((inputs, targets), some))
        scale = torch.where(norm_N[some] > 0, scale / norm_N[some], 1.0)
        expected = [exact.plain.by_name(unit_NP[i]) for i in some.tolist()]
        for name, gradients in made.items():
            for row, factor, true in zip(gradients, scale, expected, strict=True):
                size = float(torch.linalg.vector_norm(factor * real_numbers(row) - true[name]))
                worst[name] = _larger(size, worst.get(name, 0.0))
    return worst


def _larger(a: float, b: float) -> float:
    return a if not a <= b else b  # NaN is larger than any
