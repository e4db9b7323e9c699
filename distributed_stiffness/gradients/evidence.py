"""Which examples tell what a network is: drawn over the whole set, with gradients that are not 0.

Where a gradient is 0, as of a label that is ignored, every rule and every layout is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from distributed_stiffness.gradients.batches import (
    Nest,
    call,
    map_tensors,
    prepare,
    require_examples_first,
)
from distributed_stiffness.gradients.loss_head import Loss, WholeLoss, loss_head
from distributed_stiffness.gradients.network import Network, saying

EXAMPLES = 8  # from which a network is known: its recipe, its rounding, the self-check
_AT_A_TIME = 64

ALL_ZERO = (
    "the loss gradients of all examples are 0 (are all labels ignored, or all units dead?), so that"
    " there is nothing to compare, and every cosine is 0"
)


@dataclass(frozen=True)
class Evidence:
    """Examples to look at."""

    places: np.ndarray  # (k,) int64, ascending
    is_zero: bool  # all examples have gradients of 0 at the outputs, these among them


def draw_evidence(
    network: Network,
    loss: Loss,
    read: Callable[[np.ndarray], tuple[Nest, Nest]],
    n_examples: int,
    *,
    device: torch.device,
) -> Evidence:
    """Draw examples by chance, always the same, among those whose loss has a gradient.

    Args:
        network: is run forward on some.
        loss: of `PerExampleGradients`.
        read: returns inputs and targets of examples, by their numbers, ascending.
        n_examples: N.
        device: of the network.
    """
    order = np.random.default_rng(n_examples).permutation(n_examples)
    k = min(EXAMPLES, n_examples)
    if isinstance(loss, WholeLoss):
        return Evidence(np.sort(order[:k]), is_zero=False)
    found: list[int] = []
    for start in range(0, n_examples, _AT_A_TIME):
        some = np.sort(order[start : start + _AT_A_TIME])
        inputs, targets = read(some)
        inputs = map_tensors(torch.clone, prepare(inputs, network.dtype, device))
        with saying(inputs), torch.no_grad(), network.running() as module:
            outputs = call(module, inputs)
        require_examples_first(outputs, len(some))
        head = loss_head(loss, outputs, map_tensors(lambda t: t.to(device), targets))
        has_gradient = (head.scale > 0).cpu().numpy()
        chosen = {int(i) for i in some[has_gradient]}
        found += [int(i) for i in order[start : start + _AT_A_TIME] if int(i) in chosen]
        if len(found) >= k:
            return Evidence(np.sort(found[:k]), is_zero=False)
    others = [int(i) for i in order if int(i) not in set(found)]
    return Evidence(np.sort([*found, *others][:k]), is_zero=not found)
