"""Networks by name: the paper's, and anyone's `package.module:factory`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.factories import import_factory
from distributed_stiffness.models.cnn import cnn
from distributed_stiffness.models.fully_connected import fully_connected
from distributed_stiffness.models.resnet import resnet18, resnet20

_BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "fully_connected": fully_connected,
    "cnn": cnn,
    "resnet20": resnet20,
    "resnet18": resnet18,
}
MODELS = tuple(_BUILDERS)


def build(
    name: str,
    *,
    input_shape: Sequence[int],
    n_classes: int,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a network with weights drawn from `seed`; the caller's random state stays as it is.

    Args:
        name: one of `MODELS`, or `package.module:factory`. A factory gets `options`, and
            `input_shape` and `n_classes` where it has parameters of these names.
        input_shape: shape of one example.
        n_classes: outputs wanted.
        options: keyword arguments of the builder.
        seed: of the initial weights.

    Raises:
        ModelError: no such name, wrong options, or the factory returns no nn.Module.
    """
    builder = _BUILDERS.get(name)
    if builder is None and ":" not in name:
        raise ModelError(
            f"unknown model {name!r}: expected one of {', '.join(MODELS)}, or"
            " package.module:factory"
        )
    builder = builder or import_factory(name, "model", ModelError)
    offered = {"input_shape": tuple(input_shape), "n_classes": n_classes}
    accepted = inspect.signature(builder).parameters
    arguments = {k: v for k, v in offered.items() if k in accepted} | dict(options or {})
    try:
        inspect.signature(builder).bind(**arguments)
    except TypeError as error:
        raise ModelError(
            f"model {name!r} does not take these options: {error}; it takes"
            f" {', '.join(k for k in accepted if k not in offered) or 'none'}"
        ) from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = builder(**arguments)
        except ModelError:
            raise
        except Exception as error:  # the user's own code, or options of a wrong kind
            raise ModelError(
                f"model {name!r} cannot be built with {arguments}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def check_outputs(model: nn.Module, inputs: torch.Tensor, n_classes: int, name: str) -> None:
    """Run a few examples through the network.

    Raises:
        ModelError: it does not take the inputs, or has the wrong number of outputs.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(inputs)
    except Exception as error:  # the user's own code: any type of error
        raise ModelError(
            f"model {name!r} does not take inputs of shape {tuple(inputs.shape)}:"
            f" {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (len(inputs), n_classes):
        got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ModelError(
            f"model {name!r} gives outputs of shape {got} for {len(inputs)} examples; the data"
            f" have {n_classes} classes, so {(len(inputs), n_classes)} is expected"
        )
