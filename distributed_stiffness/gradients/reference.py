"""The definition, word for word: one example at a time, autograd, float64.

Slow on purpose, and apart: nothing here is shared with the capture, the rules, the loss head or the
Gram products, so that a mistake there cannot hide here. The self-check and the error bound of every
checkpoint are differences from these numbers.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distributed_stiffness.gradients.batches import (
    Nest,
    call,
    count_examples,
    map_tensors,
    prepare,
    take,
)
from distributed_stiffness.gradients.loss_head import Loss, WholeLoss, double_loss


def _log_odds(outputs: Any, targets: Tensor) -> Tensor:
    """log((1 − p_y)/p_y) of each example, (N,)."""
    z = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    is_target = torch.arange(z.shape[1], device=z.device) == targets.unsqueeze(1)
    return torch.logsumexp(z.masked_fill(is_target, -torch.inf), 1) - z[is_target]


def _cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    log_odds = _log_odds(outputs, targets)
    return torch.logaddexp(log_odds, torch.zeros_like(log_odds))


class Reference:
    """Gradients of a float64 copy of a network."""

    def __init__(self, model: nn.Module, loss: Loss, names: Sequence[str]) -> None:
        self.model = copy.deepcopy(model).double()
        double = double_loss(loss)
        self.loss = _cross_entropy if isinstance(double, str) else double
        # Cross-entropy rises with its log-odds, so that both have gradients of one direction; that
        # of the log-odds is there also where the other is below 1e-308.
        self.same_direction = _log_odds if isinstance(double, str) else double
        by_name = dict(self.model.named_parameters())
        self.parameters = {name: by_name[name] for name in names}

    def gradient(self, inputs: Nest, targets: Nest, index: int) -> dict[str, Tensor]:
        """Return ∂loss/∂parameter of one example, at true scale."""
        return self._differentiate(self.loss, inputs, targets, index)

    def _differentiate(
        self,
        loss: Callable[[Any, Any], Tensor] | WholeLoss,
        inputs: Nest,
        targets: Nest,
        index: int,
    ) -> dict[str, Tensor]:
        device = next(iter(self.parameters.values())).device
        example, target = take((inputs, targets), slice(index, index + 1))
        # A copy: a network may write into its inputs.
        one = map_tensors(torch.clone, prepare(example, torch.float64, device))
        target = map_tensors(lambda t: t.to(device), target)
        with torch.enable_grad():
            if isinstance(loss, WholeLoss):
                batch = one if target is None else (one, target)
                value = loss.function(self.model, batch).sum()
            else:
                value = loss(call(self.model, one), target).sum()
            grads = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g.to_dense()
            for (name, p), g in zip(self.parameters.items(), grads, strict=True)
        }

    @property
    def n_parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters.values())

    def unit_gradients(self, inputs: Nest, targets: Nest) -> Tensor:
        """Return the flattened unit gradients of all examples, (N, P) float64; 0 stays 0."""
        first = next(iter(self.parameters.values()))
        rows = first.new_empty(count_examples(inputs), self.n_parameters)
        for i, row in enumerate(rows):
            parts = self._differentiate(self.same_direction, inputs, targets, i).values()
            torch.cat([g.flatten() for g in parts], out=row)
            for order in (torch.inf, 2):  # the squares of a gradient underflow long before it does
                size = torch.linalg.vector_norm(row, order)
                row /= torch.where(size > 0, size, 1.0)
        return rows

    def unit_sum(self, inputs: Nest, targets: Nest, norms: Tensor) -> Tensor:
        """Return the sum of the examples' unit gradients, (P,) float64, in one backward pass.

        It is the gradient of Σ loss_i / |g_i|, so that no example's own gradient is made.

        Args:
            inputs: N first.
            targets: N first.
            norms: |g_i| at true scale, (N,) float64; an example with 0 adds nothing.
        """
        device = next(iter(self.parameters.values())).device
        batch = map_tensors(torch.clone, prepare(inputs, torch.float64, device))
        targets = map_tensors(lambda t: t.to(device), targets)
        norms = norms.to(device)
        with torch.enable_grad():
            if isinstance(self.same_direction, WholeLoss):
                whole = batch if targets is None else (batch, targets)
                values = self.same_direction.function(self.model, whole)
            else:
                values = self.same_direction(call(self.model, batch), targets)
            log_weight = -torch.log(norms)
            if self.same_direction is _log_odds:
                # Cross-entropy is log(1 + exp(odds)): its slope there is less than 1, and no norm
                # is made with one that float64 cannot say.
                slope = nn.functional.logsigmoid(values.detach())
                log_weight = log_weight + slope.clamp(min=math.log(sys.float_info.min))
            weight = torch.where(norms > 0, log_weight.exp(), 0.0)
            grads = torch.autograd.grad(
                (weight * values).sum(), list(self.parameters.values()), allow_unused=True
            )
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g.to_dense()).flatten()
                for p, g in zip(self.parameters.values(), grads, strict=True)
            ]
        )

    def cosines(self, inputs: Nest, targets: Nest, *, memory: int) -> Tensor:
        """cos(g_i, g_j) of all pairs, (N, N) float64, holding at most about `memory` bytes."""
        n = count_examples(inputs)
        block = max(1, min(n, memory // (2 * 8 * self.n_parameters)))
        starts = range(0, n, block)
        result = torch.empty(n, n, dtype=torch.float64)
        for a in starts:
            rows = slice(a, a + block)
            G = self.unit_gradients(*take((inputs, targets), rows))
            for b in starts[starts.index(a) :]:
                columns = slice(b, b + block)
                H = G if b == a else self.unit_gradients(*take((inputs, targets), columns))
                cosines = (G @ H.T).cpu()
                result[rows, columns] = cosines
                result[columns, rows] = cosines.T
        return result
