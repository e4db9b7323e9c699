"""The gradients of a network, known from examples that tell what it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import nn

from distributed_stiffness.gradients.batches import Nest, prepare
from distributed_stiffness.gradients.evidence import EXAMPLES, Evidence, draw_evidence
from distributed_stiffness.gradients.in_play import device_of
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.network import Network
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.precision import precision_mode


def gradients_of_evidence(
    model: nn.Module,
    loss: Loss,
    read: Callable[[np.ndarray], tuple[Nest, Nest]],
    n_examples: int,
    *,
    parameters: Sequence[str] | str | None = None,
    precision: str = "float32",
    factored: Collection[str] | None = None,
) -> tuple[PerExampleGradients, Evidence]:
    """Return gradients whose recipe is read from examples drawn over the whole set.

    Args:
        model: in evaluation mode.
        loss: as in `PerExampleGradients`.
        read: returns inputs and targets of examples, by their numbers, ascending.
        n_examples: N.
        parameters: as in `PerExampleGradients`.
        precision: see there.
        factored: see there.

    Raises:
        StiffnessError: as `PerExampleGradients`.
    """
    device = device_of(model)
    mode = precision_mode(precision, device)
    few, _ = read(np.arange(min(EXAMPLES, n_examples)))
    network = Network(model, mode.network, prepare(few, mode.network, device))
    evidence = draw_evidence(network, loss, read, n_examples, device=device)
    sample = read(evidence.places)
    gradients = PerExampleGradients(
        network, loss, sample, parameters=parameters, precision=precision, factored=factored
    )
    return gradients, evidence
