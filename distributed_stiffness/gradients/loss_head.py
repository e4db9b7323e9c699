"""The loss and its gradient at the network's outputs, in float64, with every example scaled.

Cosine and sign do not change when an example's gradient is multiplied by a positive number. So the
gradient at the outputs, δ, is computed in float64, each example's δ is scaled to unit norm, and
only then sent backward in the network's own precision; the scale goes back into the norm. Without
this, softmax minus one-hot cancels in float32 as soon as a network fits its examples well, and the
signs of such pairs are noise (docs/design/0002-numbers.md).

Axis letters: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_stiffness.errors import GradientError, ModelError

Loss = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossHead:
    """Loss, direction and scale at the outputs of N examples."""

    loss: Tensor  # (N,) float64
    direction: Tensor  # like the outputs; each example has norm 1, or 0 where its gradient is 0
    scale: Tensor  # (N,) float64: δ = scale · direction
    correct: Tensor  # (N,) bool: the largest output is the target's (False without classes)


def loss_head(loss: Loss, outputs: Tensor, targets: Tensor) -> LossHead:
    """Compute the loss and δ = ∂loss/∂outputs of every example in float64.

    Args:
        loss: "cross_entropy" (softmax, outputs (N, C), integer targets (N,)), or a callable
            (outputs, targets) -> (N,) that is differentiated by autograd in float64.
        outputs: the network's outputs, N first, any floating dtype.
        targets: N first.

    Raises:
        ModelError: the outputs do not fit the targets, or the loss is not one number an example.
        GradientError: an output or a loss is not finite.
    """
    z = outputs.detach().double()
    if not torch.isfinite(z).all():
        raise GradientError(
            f"the network's outputs are not finite for {_count_bad(z)} of {len(z)} examples: its"
            " weights have diverged, or an input is not finite"
        )
    if loss == "cross_entropy":
        head = _cross_entropy(z, targets)
    elif callable(loss):
        head = _any_loss(loss, z, targets)
    else:
        raise ModelError(f"unknown loss {loss!r}: expected 'cross_entropy' or a callable")
    for what, values in (("loss", head.loss), ("gradient of the loss", head.direction)):
        if not torch.isfinite(values).all():
            raise GradientError(
                f"the {what} of {_count_bad(values)} examples is not finite: the loss is not"
                " defined, or not differentiable, at these outputs"
            )
    return LossHead(head.loss, head.direction.to(outputs.dtype), head.scale, head.correct)


def cross_entropy(z_NC: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy of each example, exact also where it is tiny: (N,) in z's dtype.

    −log p_y = log(1 + Σ_{k≠y} exp(z_k − z_y)), which unlike logsumexp(z) − z_y does not cancel.
    """
    return _log_1p_exp(_log_odds(z_NC, targets))


def _log_odds(z_NC: Tensor, targets: Tensor) -> Tensor:
    """log((1 − p_y)/p_y) = logsumexp_{k≠y}(z_k) − z_y."""
    others = z_NC.scatter(1, targets.unsqueeze(1), -torch.inf)
    return torch.logsumexp(others, 1) - z_NC.gather(1, targets.unsqueeze(1)).squeeze(1)


def _log_1p_exp(x: Tensor) -> Tensor:
    """log(1 + eˣ), which overflows for no x."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _cross_entropy(z_NC: Tensor, targets: Tensor) -> LossHead:
    if z_NC.dim() != 2 or targets.shape != z_NC.shape[:1]:
        raise ModelError(
            f"cross_entropy needs outputs (N, classes) and targets (N,), got outputs"
            f" {tuple(z_NC.shape)} and targets {tuple(targets.shape)}; pass a callable"
            " (outputs, targets) -> (N,) for any other loss"
        )
    if targets.is_floating_point():
        raise ModelError(f"cross_entropy needs integer targets, got {targets.dtype}")
    targets = targets.long()
    for label in (int(targets.max()), int(targets.min())):
        if not 0 <= label < z_NC.shape[1]:
            raise ModelError(
                f"the network has {z_NC.shape[1]} outputs, but there is a label {label}"
            )
    y = targets.unsqueeze(1)
    # δ = p − e_y. Its direction needs only the ratios of the other classes' probabilities, which
    # never underflow; its scale is 1 − p_y = 1/(1 + exp(−log-odds against y)), exact to 1e-308. It
    # is not let fall below: a scale, and so a norm, is 0 only where the gradient is.
    log_odds = _log_odds(z_NC, targets)
    direction = torch.softmax(z_NC.scatter(1, y, -torch.inf), 1).scatter(1, y, -1.0)
    length = torch.linalg.vector_norm(direction, dim=1)
    one_minus_p = torch.exp(-_log_1p_exp(-log_odds)).clamp(min=torch.finfo(z_NC.dtype).tiny)
    has_rivals = log_odds > -torch.inf  # not so with a single class
    return LossHead(
        loss=_log_1p_exp(log_odds),
        direction=direction * (has_rivals / length).unsqueeze(1),
        scale=one_minus_p * length * has_rivals,
        correct=z_NC.argmax(1) == targets,
    )


def _any_loss(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, targets: Tensor) -> LossHead:
    with torch.enable_grad():
        z = z.requires_grad_()
        losses = loss(z, targets)
        if losses.shape != z.shape[:1]:
            raise ModelError(
                f"the loss returned shape {tuple(losses.shape)} for {z.shape[0]} examples;"
                " expected one number an example (reduction='none')"
            )
        (delta,) = torch.autograd.grad(losses.sum(), z)
    # Scaled twice: the squares of a norm would overflow or underflow long before it does.
    peak = delta.reshape(len(delta), -1).abs().amax(1)
    direction = delta / _beside(torch.where(peak > 0, peak, 1.0), delta)
    length = torch.linalg.vector_norm(direction.reshape(len(delta), -1), dim=1)
    direction = direction / _beside(torch.where(length > 0, length, 1.0), delta)
    is_class = z.dim() == 2 and targets.shape == z.shape[:1] and not targets.is_floating_point()
    return LossHead(
        loss=losses.detach(),
        direction=direction,
        scale=peak * length,
        correct=z.argmax(1) == targets if is_class else torch.zeros_like(peak, dtype=torch.bool),
    )


def _beside(values_N: Tensor, like: Tensor) -> Tensor:
    """Give `values_N` as many dimensions as `like` has."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))


def _count_bad(values: Tensor) -> int:
    """Examples with a value that is not finite."""
    return int((~torch.isfinite(values)).reshape(len(values), -1).any(1).sum())
