"""The definition, word for word: one example at a time, autograd, float64.

Slow on purpose, and apart: nothing here is shared with the capture, the rules, the loss head or the
Gram products, so that a mistake there cannot hide here. The self-check and the error bound of every
checkpoint are differences from these numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
from distributed_stiffness.gradients.loss_head import Loss, WholeLoss, double_loss, logits_of
from distributed_stiffness.gradients.network import Network, saying
from distributed_stiffness.gradients.surroundings import NoLessThan
from distributed_stiffness.tiling import pieces

# Norms between these are those of float64 numbers whose squares are in range.
_SQUARES = 1e-140, 1e140


def _log_odds(outputs: Any, targets: Tensor) -> Tensor:
    """log((1 − p_y)/p_y) of each example, (N,)."""
    z = logits_of(outputs)
    is_target = torch.arange(z.shape[1], device=z.device) == targets.unsqueeze(1)
    return torch.logsumexp(z.masked_fill(is_target, -torch.inf), 1) - z[is_target]


def _cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    log_odds = _log_odds(outputs, targets)
    return torch.logaddexp(log_odds, torch.zeros_like(log_odds))


class Reference:
    """Gradients of a copy of a network by plain autograd, in float64 unless said otherwise.

    Args:
        model: a network, or the copy of one.
        loss: as in `PerExampleGradients`.
        names: parameters in play.
        dtype: of the passes.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        loss: Loss,
        names: Sequence[str],
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.network = (
            model.in_dtype(dtype) if isinstance(model, Network) else Network(model, dtype)
        )
        double = double_loss(loss)
        self.loss = _cross_entropy if isinstance(double, str) else double
        # Cross-entropy rises with its log-odds, so that both have gradients of one direction; that
        # of the log-odds is there also where the other is below 1e-308.
        self.same_direction = _log_odds if isinstance(double, str) else double
        by_name = dict(self.network.module.named_parameters())
        self.parameters = {name: by_name[name] for name in names}

    def gradient(self, inputs: Nest, targets: Nest, index: int) -> dict[str, Tensor]:
        """Return ∂loss/∂parameter of one example, at true scale."""
        one = take((inputs, targets), slice(index, index + 1))
        return self._differentiate(self.loss, *one)

    def losses(
        self, loss: Callable[[Any, Any], Tensor] | WholeLoss, inputs: Nest, targets: Nest
    ) -> Tensor:
        """Return the losses of some examples, in one call, with their history: (N,)."""
        network, device = self.network, next(iter(self.parameters.values())).device
        # A copy: a network may write into its inputs.
        batch = map_tensors(torch.clone, prepare(inputs, network.dtype, device))
        targets = map_tensors(lambda t: t.to(device), targets)
        with torch.enable_grad():
            if isinstance(loss, WholeLoss):
                with network.running() as module:
                    whole = batch if targets is None else (batch, targets)
                    return loss.function(module, whole)
            with saying(batch), network.running() as module:
                outputs = call(module, batch)
            doubled = map_tensors(lambda t: t.double() if t.is_floating_point() else t, outputs)
            with NoLessThan(torch.float64, network.held):
                return loss(doubled, targets)

    def _differentiate(
        self,
        loss: Callable[[Any, Any], Tensor] | WholeLoss,
        inputs: Nest,
        targets: Nest,
        weigh: Callable[[Tensor], Tensor] | None = None,
        seen: Callable[[Tensor], None] = lambda _: None,
    ) -> dict[str, Tensor]:
        """Return the gradient of the sum of the losses, each times what `weigh` makes of it.

        `seen` is shown the losses.
        """
        losses = self.losses(loss, inputs, targets)
        seen(losses.detach())
        if weigh is not None:
            losses = losses.double() * weigh(losses.detach().double())
        with torch.enable_grad():
            value = losses.sum()
            if not value.requires_grad:
                return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            grads = self.network.differentiate([value], self.parameters.values())
        return {
            name: torch.zeros_like(p) if g is None else g.to_dense()
            for (name, p), g in zip(self.parameters.items(), grads, strict=True)
        }

    @property
    def n_parameters(self) -> int:
        """P, in real numbers."""
        return sum(real_numbers(p).numel() for p in self.parameters.values())

    def unit_gradients(self, inputs: Nest, targets: Nest) -> Tensor:
        """Return the flattened unit gradients of all examples, (N, P) float64; 0 stays 0."""
        return self.gradients(inputs, targets)[0]

    def gradients(self, inputs: Nest, targets: Nest) -> tuple[Tensor, Tensor]:
        """Return the same, and the norms at true scale, (N,) float64."""
        first = next(iter(self.parameters.values()))
        shape = count_examples(inputs), self.n_parameters
        rows = torch.empty(shape, dtype=torch.float64, device=first.device)
        norms = rows.new_ones(len(rows))
        for i, row in enumerate(rows):
            one, target = take((inputs, targets), slice(i, i + 1))
            slopes: list[Tensor] = []
            grads = self._differentiate(self.same_direction, one, target, seen=slopes.append)
            torch.cat([real_numbers(g) for g in grads.values()], out=row)
            size = torch.linalg.vector_norm(row)
            if not _SQUARES[0] < size < _SQUARES[1]:
                # Squares underflow long before a gradient does, and overflow.
                peak = torch.linalg.vector_norm(row, torch.inf)
                row /= torch.where(peak > 0, peak, 1.0)
                norms[i] *= peak
                size = torch.linalg.vector_norm(row)
            row /= torch.where(size > 0, size, 1.0)
            norms[i] *= size
            if self.same_direction is _log_odds:
                norms[i] *= max(slopes[0].sigmoid().item(), sys.float_info.min)
            if size > 0:  # a gradient that is there has a norm that is not 0
                norms[i].clamp_(min=math.ulp(0.0))
        return rows, norms

    def unit_sum(self, inputs: Nest, targets: Nest, norms: Tensor) -> Tensor:
        """Return the sum of the examples' unit gradients, (P,) float64, in one backward pass.

        Args:
            inputs: N first.
            targets: N first.
            norms: |g_i| at true scale, (N,) float64; an example with 0 adds nothing.
        """
        grads = self.unit_sums(inputs, targets, norms, (norms > 0).double())
        return torch.cat([real_numbers(g) for g in grads.values()])

    def unit_sums(
        self, inputs: Nest, targets: Nest, norms: Tensor, factors: Tensor
    ) -> dict[str, Tensor]:
        """Return Σ factor_i g_i / |g_i| by parameter, in one backward pass.

        It is the gradient of Σ factor_i loss_i / |g_i|, so that no example's own gradient is made.

        Args:
            inputs: N first.
            targets: N first.
            norms: |g_i| at true scale, (N,) float64; where it is 0 the gradient itself is added.
            factors: (N,) float64.
        """

        def weigh(losses: Tensor) -> Tensor:
            sizes = norms.to(losses.device)
            log_weight = torch.where(sizes > 0, -torch.log(sizes), 0.0)
            if self.same_direction is _log_odds:
                # Cross-entropy is log(1 + exp(odds)): its slope there is less than 1, and no norm
                # is made with one that float64 cannot say.
                slope = nn.functional.logsigmoid(losses)
                log_weight = log_weight + slope.clamp(min=math.log(sys.float_info.min))
            return factors.to(losses.device) * log_weight.exp()

        return self._differentiate(self.same_direction, inputs, targets, weigh)

    def cosines(self, inputs: Nest, targets: Nest, *, memory: int) -> Tensor:
        """cos(g_i, g_j) of all pairs, (N, N) float64, holding at most about `memory` bytes."""
        return self.products((inputs, targets), None, memory=memory).cosines()[0]

    def products(
        self,
        examples: tuple[Nest, Nest],
        others: tuple[Nest, Nest] | None,
        *,
        memory: int,
        groups: Sequence[Collection[str]] | None = None,
    ) -> Products:
        """Return the products of unit gradients, holding at most about `memory` bytes.

        Args:
            examples: inputs and targets of the rows, N.
            others: of the columns, M; None: the same.
            memory: bytes.
            groups: parameters whose parts of the gradients are multiplied; None: all, once.
        """
        parts = self._places(groups)
        n, columns = count_examples(examples[0]), others or examples
        m = count_examples(columns[0])
        whole = n if others is None else n + m
        held, streamed = held_and_streamed(whole, self.n_parameters, memory=memory)
        made = [torch.empty(len(parts), n, m, dtype=torch.float64, device="cpu")]
        made += [torch.empty(len(parts), k, dtype=torch.float64, device="cpu") for k in (n, m)]
        norms = [torch.empty(k, dtype=torch.float64, device="cpu") for k in (n, m)]

        def gradients(part: slice, of: tuple[Nest, Nest], side: int) -> Tensor:
            rows, norms[side][part] = self.gradients(*take(of, part))
            for k, place in enumerate(parts):
                if groups is None:
                    made[1 + side][k, part] = (norms[side][part] > 0).double()
                else:
                    made[1 + side][k, part] = rows[:, place].norm(dim=1).cpu()
            return rows

        for rows in pieces(slice(0, n), held):
            G = gradients(rows, examples, 0)
            if others is None:
                for k, place in enumerate(parts):
                    made[0][k, rows, rows] = (G[:, place] @ G[:, place].T).cpu()
            for across in pieces(slice(rows.stop if others is None else 0, m), streamed):
                H = gradients(across, columns, 1)
                for k, place in enumerate(parts):
                    product = (G[:, place] @ H[:, place].T).cpu()
                    made[0][k, rows, across] = product
                    if others is None:
                        made[0][k, across, rows] = product.T
        if others is None:
            made[2], norms[1] = made[1], norms[0]
        return Products(*made, *norms)

    def by_name(self, row: Tensor) -> dict[str, Tensor]:
        """Take a flattened gradient apart, in the shapes of the parameters; complex ones as two."""
        sizes = [real_numbers(p).numel() for p in self.parameters.values()]
        parts = torch.split(row, sizes)
        return dict(zip(self.parameters, parts, strict=True))

    def _places(self, groups: Sequence[Collection[str]] | None) -> list[Tensor | slice]:
        """Return where the parameters of each group lie in a row."""
        if groups is None:
            return [slice(None)]
        sizes = [real_numbers(p).numel() for p in self.parameters.values()]
        parts = torch.split(torch.arange(sum(sizes), device="cpu"), sizes)
        places = dict(zip(self.parameters, parts, strict=True))
        return [torch.cat([places[name] for name in group]) for group in groups]


def held_and_streamed(n: int, n_parameters: int, *, memory: int) -> tuple[int, int]:
    """Return of how many examples gradients are held, and streamed against them, at a time.

    The more are held, the less often each is made; so few are streamed.

    Args:
        n: examples in all.
        n_parameters: P, numbers of float64.
        memory: bytes.
    """
    fit = max(1, memory // (8 * n_parameters))
    if fit >= n:
        return n, n
    streamed = max(1, fit // 8)
    return max(1, fit - streamed), streamed


def gradients_made(n: int, held: int) -> int:
    """Return how many gradients are made for all pairs of N examples, some held at a time."""
    return sum(range(n, 0, -held))


@dataclass(frozen=True)
class Products:
    """Products of unit gradients, of all parameters or of groups of them (K)."""

    dots: Tensor  # (K, N, M) float64
    row_parts: Tensor  # (K, N), the norm of each group's part of a unit gradient
    column_parts: Tensor  # (K, M)
    row_norms: Tensor  # (N,), of whole gradients at true scale
    column_norms: Tensor  # (M,)

    def cosines(self) -> Tensor:
        """Return the cosines of each group, (K, N, M); 0 where a part is 0."""
        sizes = self.row_parts.unsqueeze(2) * self.column_parts.unsqueeze(1)
        return torch.where(sizes > 0, self.dots / torch.where(sizes > 0, sizes, 1.0), 0.0)


def real_numbers(t: Tensor) -> Tensor:
    """Return the real numbers of a tensor, of complex ones two each."""
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten()
