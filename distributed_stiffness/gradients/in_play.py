"""What of a network is differentiated, and which networks have no gradient of one example."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distributed_stiffness.errors import GradientError, ModelError


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's first parameter.

    Raises:
        ModelError: it has none.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the network is {model!r}: expected a torch.nn.Module (one that was made, not its"
            " class); a loss that calls functions can be a WholeLoss"
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError("the network has no parameter that requires a gradient")
    for name, p in parameters.items():
        if is_lazy(p) or p.is_meta:
            raise ModelError(
                f"the parameter {name!r} has no numbers yet (it is"
                f" {'lazy: run the network once' if is_lazy(p) else 'on the meta device'}):"
                " expected a network with its weights"
            )
    return next(iter(parameters.values())).device


def parameters_in_play(model: nn.Module, patterns: Sequence[str] | str | None) -> dict[str, Tensor]:
    """Return the parameters that require gradients and match a pattern, by name; tied ones once.

    Raises:
        ModelError: none is left, or a pattern matches nothing.
    """
    trainable: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    if patterns is not None:
        patterns = patterns_of(patterns, "parameters")
        for pattern in patterns:
            if not matching(list(trainable), [pattern]):
                raise ModelError(
                    f"no trainable parameter matches {pattern!r}; there are: {', '.join(trainable)}"
                )
        trainable = {name: trainable[name] for name in matching(list(trainable), patterns)}
    if not any(p.numel() for p in trainable.values()):
        raise ModelError("the network has no parameter that requires a gradient and has numbers")
    return trainable


def patterns_of(given: Sequence[str] | str, what: str) -> Sequence[str]:
    """Return glob patterns; a single one may be given as it is.

    Raises:
        ModelError: they are something else.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Collection) or not all(isinstance(p, str) for p in given):
        raise ModelError(f"{what}: {given!r} are no patterns: expected strings such as '*.weight'")
    return given


def matching(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names that match a glob pattern."""
    return tuple(n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns))


def refuse_dependence(model: nn.Module) -> None:
    """Refuse modules that make one example's gradient depend on chance or on its company.

    Raises:
        GradientError: batch statistics or dropout are in use; the message names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise GradientError(
                    f"batch normalisation {name!r} is in training mode, so that an example's"
                    " gradient would depend on its batch: call model.eval() first"
                )
            if module.running_mean is None:
                raise GradientError(
                    f"batch normalisation {name!r} keeps no running statistics, so that an"
                    " example's gradient would depend on its batch: build it with"
                    " track_running_stats=True, or use another normalisation"
                )
        if module.training and _dropout_share(module) > 0:
            raise GradientError(
                f"the dropout of {name!r} is active, so that gradients would be random: call"
                " model.eval() first"
            )


def _dropout_share(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout)
    return 0.0
