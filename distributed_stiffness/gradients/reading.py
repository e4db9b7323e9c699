"""One pass over some examples, and what it says of them: whose the rows of each use are.

Axis letters: N examples, R rows of a use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distributed_stiffness.gradients.batches import Nest
from distributed_stiffness.gradients.capture import Capture, hidden_uses
from distributed_stiffness.gradients.layout import Layout, find_owners, multiples
from distributed_stiffness.gradients.loss_head import LossHead
from distributed_stiffness.gradients.network import Network


@dataclass(frozen=True)
class Pass:
    """One forward pass over some examples, and the loss at its end."""

    network: Network
    inputs: Nest
    targets: Nest
    n: int
    capture: Capture
    head: LossHead
    outputs: Sequence[Tensor]  # those that the loss uses

    def backward(
        self,
        uses: Sequence[int] | None = None,
        *,
        times_N: Tensor | None = None,
        again: bool = False,
    ) -> list[Tensor | None]:
        """Return the gradient at the output of each use.

        Args:
            uses: their places; None: all.
            times_N: each example's part is multiplied by its number.
            again: whether there will be another such pass.
        """
        chosen = [self.capture.uses[i] for i in range(len(self.capture.uses))]
        if uses is not None:
            chosen = [chosen[i] for i in uses]
        starts = [
            (o, d if times_N is None else d * _beside(times_N.to(d), d))
            for o, d in zip(self.outputs, self.head.directions, strict=True)
            if o.requires_grad
        ]
        if not chosen or not starts:
            return [None] * len(chosen)
        found = self.network.differentiate(
            [o for o, _ in starts],
            [use.edge for use in chosen],
            [d for _, d in starts],
            again=again,
        )
        return [
            None if grad is None else grad.detach().reshape(use.output_shape)
            for use, grad in zip(chosen, found, strict=True)
        ]


@dataclass(frozen=True)
class Reading:
    """What a pass says of its examples."""

    layouts: tuple[Layout | None, ...]  # of each use; None: no gradient arrives there
    why: Mapping[str, str]  # source -> why no rule makes its gradient


@dataclass
class Reader:
    """Reads passes, and remembers what follows from shapes alone.

    Args:
        trusts_shapes: False: whose the rows are is found in every pass anew.
    """

    trusts_shapes: bool = True
    _known: dict[Any, Reading] = field(default_factory=dict)

    def read(self, done: Pass, *, anew: bool = False) -> tuple[Reading, list[Tensor | None]]:
        """Return the reading of a pass, and the gradient at the output of each use.

        Args:
            done: a pass.
            anew: whatever is known of others of these shapes.
        """
        uses = done.capture.uses
        key = done.n, tuple(use.signature for use in uses), tuple(done.capture.unstructured.items())
        known = self._known.get(key) if self.trusts_shapes and not anew else None
        asked = [i for i, use in enumerate(uses) if known is None or use.is_moved]
        is_partial = known is not None and None in known.layouts
        grads = done.backward(again=done.n > 1 and (bool(asked) or is_partial))
        if known is not None and is_partial:
            found = [i for i, grad in enumerate(grads) if grad is not None]
            asked = sorted({*asked, *(i for i in found if known.layouts[i] is None)})
        numbers = multiples(done.n) if asked and done.n > 1 else []
        multiplied = [
            done.backward(asked, times_N=times, again=k + 1 < len(numbers))
            for k, times in enumerate(numbers)
        ]
        layouts: list[Layout | None] = list(known.layouts) if known else [None] * len(uses)
        why = dict(known.why) if known else self._without_a_rule(done)
        follows_from_shapes = True
        for place, i in enumerate(asked):
            grad, use = grads[i], uses[i]
            if grad is None:
                continue
            others = [part[place] for part in multiplied]
            rows, *scaled = (
                use.rows(torch.zeros_like(grad) if X is None else X) for X in (grad, *others)
            )
            owners = find_owners(_flat(rows), [_flat(X) for X in scaled], done.n)
            if owners.is_mixed:
                why |= dict.fromkeys(use.names.values(), "its rows are of several examples each")
            layouts[i], is_certain = owners.layout(done.n)
            follows_from_shapes &= (is_certain or use.is_moved) and not owners.is_mixed
        reading = Reading(tuple(layouts), why)
        if known is None and follows_from_shapes:
            self._known[key] = reading
        return reading, grads

    def _without_a_rule(self, done: Pass) -> dict[str, str]:
        why = dict(done.capture.unstructured)
        for use in done.capture.uses:
            if use.spoiled:
                reason = "its input or output is overwritten in place"
                why |= dict.fromkeys(use.names.values(), reason)
        for name in hidden_uses(done.outputs, done.capture):
            why.setdefault(name, "a call that torch does not show")
        return why


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _beside(values_N: Tensor, like: Tensor) -> Tensor:
    """Give `values_N` as many dimensions as `like` has."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
