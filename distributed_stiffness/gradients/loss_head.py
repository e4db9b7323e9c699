"""The loss and its gradient at the network's outputs, in float64, with every example scaled.

Cosine and sign do not change when an example's gradient is multiplied by a positive number. So the
gradient at the outputs, δ, is computed in float64, each example's δ is scaled to unit norm, and
only then sent backward in the network's own precision; the scale goes back into the norm. Without
this, softmax minus one-hot cancels in float32 as soon as a network fits its examples well, and the
signs of such pairs are noise (docs/design/0002-numbers.md).

Axis letters: N examples, C classes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distributed_stiffness.errors import GradientError, ModelError, StiffnessError
from distributed_stiffness.gradients.batches import Nest
from distributed_stiffness.gradients.network import saying_backward
from distributed_stiffness.gradients.precision import Precision
from distributed_stiffness.gradients.surroundings import NoLessThan, is_out_of_memory


@dataclass(frozen=True)
class WholeLoss:
    """A loss that runs the network itself: `function(model, batch)` -> one loss an example, (N,).

    For networks that return their loss. `batch` is (inputs, targets), or the inputs alone where
    there are no targets. Such a loss is computed in the network's own precision: what cancels in it
    is lost. Wherever a loss can be told from outputs and targets, give it so.
    """

    function: Callable[[nn.Module, Nest], Tensor]


Loss = str | Callable[[Any, Any], Tensor] | WholeLoss


@dataclass(frozen=True)
class LossHead:
    """Loss, direction and scale at the outputs of N examples."""

    loss: Tensor  # (N,) float64
    directions: tuple[
        Tensor, ...
    ]  # like the chosen outputs; each example has norm 1 over all, or 0
    scale: Tensor  # (N,) float64: δ = scale · direction
    correct: Tensor  # (N,) bool: the largest output is the target's (False without classes)
    leaves: tuple[int, ...]  # which of the outputs' leaves are differentiated

    def chosen(self, outputs: Nest) -> list[Tensor]:
        """Return the outputs that are differentiated."""
        found = pytree.tree_leaves(outputs)
        return [found[i] for i in self.leaves]


_IGNORED = (
    ": leave examples out that have none, or give a loss that ignores them, such as lambda o, t:"
    " torch.nn.functional.cross_entropy(o, t, ignore_index=-100, reduction='none'); their gradients"
    " are 0"
)


def warn_of_own_precision(loss: Loss, precision: Precision, *, stacklevel: int) -> None:
    """Say what may go wrong where a loss is not differentiated in float64, and how to have it so.

    Args:
        loss: as it was given.
        precision: of forward and backward passes.
        stacklevel: of the caller whom it concerns (see `warnings.warn`).
    """
    if isinstance(loss, WholeLoss) and precision.network == torch.float32:
        warnings.warn(
            "a WholeLoss is differentiated in the network's own precision, float32, and unscaled:"
            " of examples that the network fits well, softmax minus one-hot cancels, and signs and"
            " cosines may be noise. Give the loss apart, 'cross_entropy' or a callable (outputs,"
            " targets) -> (N,), and it is differentiated in float64 with every example scaled; or"
            " take precision='float64'",
            stacklevel=stacklevel + 1,
        )


def double_loss(loss: Loss) -> Loss:
    """Return the loss with its own tensors, where it has any, in float64."""
    return copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss


def loss_head(
    loss: Loss, outputs: Nest, targets: Nest, held: Mapping[int, str] = MappingProxyType({})
) -> LossHead:
    """Compute the loss and δ = ∂loss/∂outputs of every example in float64.

    Args:
        loss: "cross_entropy" (softmax; outputs (N, C), or with a part `logits`; integer targets
            (N,)), or a callable (outputs, targets) -> (N,) that is differentiated by autograd in
            float64.
        outputs: what the network returned: a tensor, N first, or a nest of such.
        targets: a tensor or nest, N first.
        held: parameters by `id` that the loss must not take (`NoLessThan`).

    Raises:
        ModelError: the outputs do not fit the targets, or the loss is not one number an example.
        GradientError: an output or a loss is not finite.
    """
    # Whatever mode is active sees the calls of the network and of its loss, and not ours.
    if loss == "cross_entropy":
        logits = logits_of(outputs)
        leaves = [i for i, leaf in enumerate(pytree.tree_leaves(outputs)) if leaf is logits]
        with torch._C.DisableTorchFunction():
            head = _cross_entropy(_finite(logits), targets, leaves[0])
        given = [logits]
    elif callable(loss):
        z, losses = losses_of(loss, outputs, targets, held)
        with torch._C.DisableTorchFunction():
            head = _any_loss(z, losses, targets)
        given = head.chosen(outputs)
    else:
        raise ModelError(f"unknown loss {loss!r}: expected 'cross_entropy' or a callable")
    values = [("loss", head.loss), *(("gradient of the loss", d) for d in head.directions)]
    for what, value in values:
        if not torch.isfinite(value).all():
            raise GradientError(
                f"the {what} of {_count_bad(value)} examples is not finite: the loss is not"
                " defined, or not differentiable, at these outputs"
            )
    directions = (d.to(o.dtype) for d, o in zip(head.directions, given, strict=True))
    return replace(head, directions=tuple(directions))


def whole_loss_head(losses: Tensor, n: int) -> LossHead:
    """Return the head of a `WholeLoss`: each example's loss, as it came, is what is differentiated.

    Raises:
        ModelError: it is not one number an example.
        GradientError: a loss is not finite.
    """
    _require_one_an_example(losses, n)
    if not torch.isfinite(losses).all():
        raise GradientError(f"the loss of {_count_bad(losses)} examples is not finite")
    loss = losses.detach().double()
    return LossHead(
        loss, (torch.ones_like(losses),), torch.ones_like(loss), torch.zeros_like(loss).bool(), (0,)
    )


def logits_of(outputs: Nest) -> Tensor:
    """Return the outputs, or their part named logits, where a network returns several.

    Raises:
        ModelError: there is neither.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found = getattr(outputs, "logits", None) if found is None else found
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"the network returned {type(outputs).__name__}, and cross_entropy needs one tensor (N,"
        " classes), or a part named logits: pass a callable (outputs, targets) -> (N,)"
    )


def _finite(outputs: Tensor) -> Tensor:
    """Return outputs in float64, without history."""
    z = outputs.detach().double()
    if not torch.isfinite(z).all():
        raise GradientError(
            f"the network's outputs are not finite for {_count_bad(z)} of {len(z)} examples: its"
            " weights have diverged, or an input is not finite"
        )
    return z


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


def _cross_entropy(z_NC: Tensor, targets: Nest, leaf: int) -> LossHead:
    if not isinstance(targets, Tensor):
        raise ModelError(f"cross_entropy needs targets (N,), got {type(targets).__name__}")
    if z_NC.dim() != 2 or targets.shape != z_NC.shape[:1]:
        raise ModelError(
            f"cross_entropy needs outputs (N, classes) and targets (N,), got outputs"
            f" {tuple(z_NC.shape)} and targets {tuple(targets.shape)}; pass a callable"
            " (outputs, targets) -> (N,) for any other loss"
        )
    if targets.is_floating_point():
        raise ModelError(f"cross_entropy needs integer targets, got {targets.dtype}")
    if z_NC.shape[1] < 2:
        raise ModelError(
            "the network has 1 output, and cross_entropy of a single class is 0 whatever the"
            " weights: give the loss that it was trained with as a callable, such as lambda o, t:"
            " binary_cross_entropy_with_logits(o[:, 0], t.double(), reduction='none')"
        )
    targets = targets.long()
    for label in (int(targets.max()), int(targets.min())):
        if not 0 <= label < z_NC.shape[1]:
            raise ModelError(
                f"the network has {z_NC.shape[1]} outputs, but there is a label {label}"
                + (_IGNORED if label < 0 else "")
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
        directions=(direction * (has_rivals / length).unsqueeze(1),),
        scale=one_minus_p * length * has_rivals,
        correct=z_NC.argmax(1) == targets,
        leaves=(leaf,),
    )


def losses_of(
    loss: Callable[[Any, Any], Tensor],
    outputs: Nest,
    targets: Nest,
    held: Mapping[int, str] = MappingProxyType({}),
) -> tuple[dict[int, Tensor], Tensor]:
    """Call a loss on outputs in float64, such that it can be differentiated.

    Returns:
        The floating-point outputs by their places among all, without history, and what it returned.

    Raises:
        ModelError: there is no such output.
    """
    leaves, structure = pytree.tree_flatten(outputs)
    z = {
        i: leaf.detach().double().requires_grad_()
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    if not z:
        raise ModelError(
            "the network returned no tensor of real floating-point numbers: of complex ones take"
            " .abs(), or torch.view_as_real, in the network"
        )
    doubled = pytree.tree_unflatten([z.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
    try:
        with torch.enable_grad(), NoLessThan(torch.float64, held):
            return z, loss(doubled, targets)
    except Exception as error:  # the user's own code: any type of error
        if isinstance(error, StiffnessError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"the loss fails with these outputs and targets: {type(error).__name__}: {error};"
            " expected a function of (outputs, targets) that gives one number an example"
        ) from error


def _any_loss(z: Mapping[int, Tensor], losses: Tensor, targets: Nest) -> LossHead:
    first = next(iter(z.values()))
    n = len(first)
    _require_one_an_example(losses, n)
    if not losses.requires_grad:
        raise ModelError(
            "the loss does not depend on the network's outputs, so that its gradient is 0: expected"
            " a differentiable function of (outputs, targets)"
        )
    leaves = list(z.values())
    with saying_backward("loss"), torch.enable_grad():
        delta = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, retain_graph=True)
    used = {i: d for i, d in zip(z, delta, strict=True) if d is not None}
    for i, d in used.items():
        _finite(z[i])
        if d.shape[:1] != (n,):
            raise ModelError(
                f"the loss uses an output of shape {tuple(d.shape)} for {n} examples, expected N"
                " first"
            )
    _require_own_losses(losses, {i: z[i] for i in used}, used)
    # Scaled twice: the squares of a norm would overflow or underflow long before it does.
    peak = _over_all([d.abs().reshape(n, -1).amax(1) for d in used.values()]).amax(0)
    directions = [d / _beside(torch.where(peak > 0, peak, 1.0), d) for d in used.values()]
    parts = [torch.linalg.vector_norm(d.reshape(n, -1), dim=1) for d in directions]
    length = torch.linalg.vector_norm(_over_all(parts), dim=0)
    size = torch.where(length > 0, length, 1.0)
    return LossHead(
        loss=losses.detach(),
        directions=tuple(d / _beside(size, d) for d in directions),
        scale=peak * length,
        correct=_is_correct(first, targets, n),
        leaves=tuple(used),
    )


def _require_own_losses(
    losses: Tensor, z: Mapping[int, Tensor], delta: Mapping[int, Tensor]
) -> None:
    """Check that a loss depends on the outputs of its own example alone.

    Each loss is multiplied by a number of its own: so must be what its example sends back.
    """
    n = len(losses)
    if not all(torch.isfinite(t).all() for t in (losses.detach(), *delta.values())):
        return  # which is said elsewhere
    times = torch.arange(1, n + 1, dtype=losses.dtype, device=losses.device) / n
    with saying_backward("loss"), torch.enable_grad():
        found = torch.autograd.grad(losses, list(z.values()), times, allow_unused=True)
    for (i, d), scaled in zip(delta.items(), found, strict=True):
        expected = d * _beside(times, d)
        size = float(expected.abs().max()) if d.numel() else 0.0
        if scaled is None or not float((scaled - expected).abs().max()) <= 1e-9 * size:
            raise GradientError(
                f"the examples depend on each other in the loss: the loss of one example changes"
                f" with another's outputs (of shape {tuple(z[i].shape)}), as in a contrastive loss"
                " or one that is averaged over the batch, so that per-example gradients are not"
                " defined; give a loss of each example's own outputs and targets"
            )


def _over_all(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        raise ModelError("the loss does not depend on the network's outputs")
    return torch.stack(list(parts))


def _is_correct(first: Tensor, targets: Nest, n: int) -> Tensor:
    is_class = (
        first.dim() == 2
        and isinstance(targets, Tensor)
        and targets.shape == (n,)
        and not targets.is_floating_point()
    )
    return first.argmax(1) == targets if is_class else torch.zeros(n, device=first.device).bool()


def _require_one_an_example(losses: Any, n: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ModelError(
            f"the loss returned shape {shape} for {n} examples; expected one number an example"
            " (reduction='none')"
        )


def _beside(values_N: Tensor, like: Tensor) -> Tensor:
    """Give `values_N` as many dimensions as `like` has."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))


def _count_bad(values: Tensor) -> int:
    """Examples with a value that is not finite."""
    return int((~torch.isfinite(values)).reshape(len(values), -1).any(1).sum())
