"""The definition, word for word: one example at a time, autograd, float64.

Slow on purpose, and apart: nothing here is shared with the capture, the rules, the loss head or the
Gram products, so that a mistake there cannot hide here. The self-check and the error bound of every
checkpoint are differences from these numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distributed_stiffness.gradients.batches import Inputs, call, count_examples, prepare, take
from distributed_stiffness.gradients.loss_head import Loss, cross_entropy


class Reference:
    """Gradients of a float64 copy of a network."""

    def __init__(self, model: nn.Module, loss: Loss, names: Sequence[str]) -> None:
        self.model = copy.deepcopy(model).double()
        double = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        self.loss = cross_entropy if isinstance(double, str) else double
        by_name = dict(self.model.named_parameters())
        self.parameters = {name: by_name[name] for name in names}

    def gradient(self, inputs: Inputs, targets: Tensor, index: int) -> dict[str, Tensor]:
        """Return ∂loss/∂parameter of one example, at true scale."""
        device = next(iter(self.parameters.values())).device
        one = prepare(take(inputs, slice(index, index + 1)), torch.float64, device)
        with torch.enable_grad():
            loss = self.loss(call(self.model, one), targets[index : index + 1].to(device)).sum()
            grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self.parameters.items(), grads, strict=True)
        }

    def unit_gradients(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """Return the flattened unit gradients of all examples, (N, P) float64; 0 stays 0."""
        rows = []
        for i in range(count_examples(inputs)):
            flat = torch.cat([g.flatten() for g in self.gradient(inputs, targets, i).values()])
            norm = torch.linalg.vector_norm(flat)
            # Two steps: 1/norm overflows for gradients below 1e-308.
            rows.append(flat / norm if norm > 0 else flat)
        return torch.stack(rows)

    def cosines(self, inputs: Inputs, targets: Tensor, *, memory: int) -> Tensor:
        """cos(g_i, g_j) of all pairs, (N, N) float64, holding at most about `memory` bytes."""
        n = count_examples(inputs)
        row_bytes = 8 * sum(p.numel() for p in self.parameters.values())
        block = max(1, min(n, memory // (2 * row_bytes)))
        starts = range(0, n, block)
        result = torch.empty(n, n, dtype=torch.float64)
        for a in starts:
            rows = slice(a, a + block)
            G = self.unit_gradients(take(inputs, rows), targets[rows])
            for b in starts[starts.index(a) :]:
                columns = slice(b, b + block)
                H = G if b == a else self.unit_gradients(take(inputs, columns), targets[columns])
                cosines = (G @ H.T).cpu()
                result[rows, columns] = cosines
                result[columns, rows] = cosines.T
        return result
