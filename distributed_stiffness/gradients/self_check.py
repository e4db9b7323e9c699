"""Before long work: eight examples by the chosen rules, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_stiffness.errors import GradientError, StiffnessError
from distributed_stiffness.gradients.batches import Nest, count_examples, prepare, take, tensors
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.per_example import EXAMPLES, PerExampleGradients
from distributed_stiffness.gradients.reference import Reference

# Both sides run in float64, where two right ways differ by about 1e-13 of an example's gradient;
# a wrong rule differs by about 1.
TOLERANCE = 1e-8
# A network that rounds to float32 inside, whatever it is given, differs from itself by that.
TOLERANCE_OF_ROUNDING = 1e-4
# Unit rows are float32 and their products sum up to millions of terms (precision.py).
COSINE_TOLERANCE = 1e-5


def self_check(
    model: nn.Module,
    loss: Loss,
    inputs: Nest,
    targets: Nest,
    *,
    parameters: Sequence[str] | None = None,
) -> PerExampleGradients:
    """Compare rules and definition, in another order and other company; return the checked rules.

    Args:
        model: in evaluation mode.
        loss: as in `PerExampleGradients`.
        inputs: at least 3 examples; the first 8 are used.
        targets: N first.
        parameters: glob patterns of the parameters in play.

    Returns:
        The float64 gradients object that was checked; its recipe holds in every precision.

    Raises:
        GradientError: a parameter's gradient is wrong, or examples depend on each other.
    """
    n = min(EXAMPLES, count_examples(inputs))
    inputs, targets = take((inputs, targets), slice(n))
    try:
        checked = PerExampleGradients(
            model, loss, (inputs, targets), parameters=parameters, precision="float64"
        )
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, StiffnessError):
            raise
        raise GradientError(
            f"self-check: the network does not run on these examples in float64 ({error}), so that"
            " its gradients cannot be checked"
        ) from error
    reference = Reference(model, loss, list(checked.parameters))
    dtypes, exact = _FloatingDtypes(), prepare(inputs, torch.float64, checked.device)
    try:
        with dtypes:
            expected = _stacked(reference.gradient(exact, targets, i) for i in range(n))
    except (RuntimeError, ValueError) as error:
        raise GradientError(
            f"self-check: the network does not take one example alone ({error}), so that"
            " per-example gradients are not defined"
        ) from error
    tolerance = TOLERANCE if dtypes.found <= {torch.float64} else TOLERANCE_OF_ROUNDING
    norm = _norms(expected)
    together = checked.materialised(inputs, targets)
    _require_independence(checked, inputs, targets, together, norm, tolerance)
    for name, gradients in together.items():
        difference = _relative(gradients - expected[name], norm)
        if not difference.max() <= tolerance:
            raise GradientError(
                f"self-check: the gradient of parameter {name!r} for example"
                f" {int(difference.argmax())} (rule: {checked.recipe.rules.get(name, 'none')})"
                f" differs from one-example autograd by {float(difference.max()):.1e} of the"
                f" example's gradient (allowed: {tolerance:.0e}). Either examples depend on each"
                " other in this network, or a rule is wrong: please report it with the network's"
                " code"
            )
    rows = checked.rows(inputs, targets)
    unit = reference.unit_gradients(inputs, targets)
    for what, worst, allowed in (
        ("a norm", _relative(rows.norm - norm, norm).max(), tolerance),
        (
            "a cosine",
            (cosine(rows, rows) - unit @ unit.T).abs().max(),
            max(tolerance, COSINE_TOLERANCE),
        ),
    ):
        if not worst <= allowed:
            raise GradientError(
                f"self-check: {what} differs from one-example autograd by {float(worst):.1e}"
                f" (allowed: {allowed:.0e}): please report it with the network's code"
            )
    return checked


class _FloatingDtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note in which floating-point numbers a network computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.found |= {t.dtype for t in tensors(output) if t.is_floating_point()}
        return output


def _require_independence(
    checked: PerExampleGradients,
    inputs: Nest,
    targets: Nest,
    together: Mapping[str, Tensor],
    norm: Tensor,
    tolerance: float,
) -> None:
    """Compute the same examples backwards and in two halves."""
    for half in torch.arange(count_examples(inputs) - 1, -1, -1).chunk(2):
        for name, gradients in checked.materialised(*take((inputs, targets), half)).items():
            moved = _relative(gradients - together[name][half], norm[half])
            if not moved.max() <= tolerance:
                raise GradientError(
                    f"self-check: the gradient of parameter {name!r} for example"
                    f" {int(half[moved.argmax()])} changes by {float(moved.max()):.1e} of the"
                    " example's gradient in another order and other company: examples depend on"
                    " each other (batch statistics, attention across the batch, or chance), so"
                    " that per-example gradients are not defined"
                )


def _stacked(gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found = list(gradients)
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


def _norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each example's whole gradient; its squares may be below 1e-308."""
    some = [g for g in gradients.values() if g.numel()]  # a layer may have no inputs
    peaks = [g.abs().reshape(len(g), -1).amax(1) for g in some]
    peak = torch.stack(peaks).amax(0)
    parts = torch.stack([_relative(g, peak) for g in some])
    norms: Tensor = peak * parts.norm(dim=0)
    return norms


def _relative(values: Tensor, size_N: Tensor) -> Tensor:
    """Return the norm of each example's values in units of its size; 0 below 1e-290.

    There true gradients lose digits. The cosines, which lose none, are compared all the same.
    """
    scaled = values.reshape(len(values), -1) / size_N.unsqueeze(1)
    return torch.where(size_N > 1e-290, scaled.norm(dim=1), 0.0)
