"""Before long work: eight examples by the chosen rules, against the definition in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients.batches import Inputs, count_examples, take
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.reference import Reference

EXAMPLES = 8
# Both sides run in float64, where two right ways differ by about 1e-13 of an example's gradient;
# a wrong rule differs by about 1.
TOLERANCE = 1e-8
# Unit rows are float32 and their products sum up to millions of terms (precision.py).
COSINE_TOLERANCE = 1e-5


def self_check(
    model: nn.Module,
    loss: Loss,
    inputs: Inputs,
    targets: Tensor,
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
    inputs, targets = take(inputs, slice(n)), targets[:n]
    checked = PerExampleGradients(
        model, loss, (inputs, targets), parameters=parameters, precision="float64"
    )
    names = list(checked.parameters)
    reference = Reference(model, loss, names)
    expected = [reference.gradient(inputs, targets, i) for i in range(n)]
    together = checked.materialised(inputs, targets)
    elsewhere = _in_other_company(checked, inputs, targets)
    for i in range(n):
        norm = torch.stack([g.norm() for g in expected[i].values()]).norm()
        for name in names:
            difference = (together[name][i] - expected[i][name]).norm()
            moved = (together[name][i] - elsewhere[name][i]).norm()
            if not moved <= TOLERANCE * norm:
                raise GradientError(_dependence(name, i, float(moved / norm)))
            if not difference <= TOLERANCE * norm:
                raise GradientError(
                    f"self-check: the gradient of parameter {name!r} for example {i}"
                    f" (rule: {checked.recipe.rules.get(name, 'none')}) differs from one-example"
                    f" autograd by {float(difference / norm):.1e} of the example's gradient"
                    f" (allowed: {TOLERANCE:.0e}). Either examples depend on each other in this"
                    " network, or a rule is wrong: please report it with the network's code"
                )
    rows = checked.rows(inputs, targets)
    worst = (cosine(rows, rows).double().cpu() - reference.cosines(inputs, targets, memory=2**28)).abs()
    if not worst.max() <= COSINE_TOLERANCE:
        raise GradientError(
            f"self-check: a cosine differs from one-example autograd by {float(worst.max()):.1e}"
            f" (allowed: {COSINE_TOLERANCE:.0e}): please report it with the network's code"
        )
    return checked


def _in_other_company(
    checked: PerExampleGradients, inputs: Inputs, targets: Tensor
) -> dict[str, Tensor]:
    """Gradients of the same examples, computed backwards and in two halves."""
    backwards = torch.arange(len(targets) - 1, -1, -1)
    halves = [
        checked.materialised(take(inputs, half), targets[half]) for half in backwards.chunk(2)
    ]
    return {name: torch.cat([h[name] for h in halves]).flip(0) for name in checked.parameters}


def _dependence(name: str, example: int, share: float) -> str:
    return (
        f"self-check: the gradient of parameter {name!r} for example {example} changes by"
        f" {share:.1e} of its norm in another order and other company: examples depend"
        " on each other (batch statistics, attention across the batch, or chance), so that"
        " per-example gradients are not defined"
    )
