"""Networks by name: the paper's, torchvision's, timm's, Hugging Face folders, and anyone's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.factories import import_factory
from distributed_stiffness.gradients.batches import (
    Nest,
    call,
    count_examples,
    map_tensors,
    prepare,
)
from distributed_stiffness.gradients.in_play import device_of
from distributed_stiffness.gradients.network import Network
from distributed_stiffness.gradients.surroundings import undisturbed
from distributed_stiffness.models import foreign
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
KINDS = "torchvision:NAME, timm:NAME, hf:FOLDER or package.module:factory"


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
        name: one of `MODELS`; `torchvision:NAME` or `timm:NAME` of these packages; `hf:FOLDER`
            with a config.json of Hugging Face; or `package.module:factory`. A factory gets
            `options`, and `input_shape` and `n_classes` where it has parameters of these names.
        input_shape: shape of one example.
        n_classes: outputs wanted.
        options: keyword arguments of the builder.
        seed: of the initial weights.

    Raises:
        ModelError: no such name, wrong options, or the factory returns no nn.Module.
    """
    builder = _BUILDERS.get(name)
    if builder is None and ":" not in name:
        raise ModelError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}, or {KINDS}")
    builder = builder or foreign.builder(name) or import_factory(name, "model", ModelError)
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


def check_outputs(
    model: nn.Module,
    inputs: Nest,
    n_classes: int,
    name: str,
    *,
    loss: str | Callable[..., Any] = "cross_entropy",
    exactly: bool = True,
) -> None:
    """Run a few examples through the network.

    Args:
        model: to be tried.
        inputs: N first.
        n_classes: outputs wanted.
        name: of the model, for messages.
        loss: what looks at the outputs; any but cross-entropy knows by itself what it needs.
        exactly: not more outputs than classes.

    Raises:
        ModelError: it does not take the inputs, or has the wrong number of outputs.
    """
    network, n = Network(model, torch.float32), count_examples(inputs)
    given = prepare(inputs, torch.float32, device_of(model))
    try:
        with undisturbed(), torch.no_grad(), network.running() as module:
            outputs = call(module.eval(), map_tensors(torch.clone, given))
    except Exception as error:  # the user's own code: any type of error
        raise ModelError(
            f"model {name!r} does not take inputs of {_shapes(inputs)}: {type(error).__name__}:"
            f" {error}"
        ) from error
    if loss != "cross_entropy":
        return
    logits = outputs
    if not isinstance(outputs, torch.Tensor):
        is_mapping = isinstance(outputs, Mapping)
        logits = outputs.get("logits") if is_mapping else getattr(outputs, "logits", None)
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(outputs).__name__
    if got == (n, n_classes) or (
        not exactly and isinstance(got, tuple) and len(got) == 2 and got[1] > n_classes
    ):
        return
    raise ModelError(
        f"model {name!r} gives outputs of shape {got} for {n} examples; the data"
        f" have {n_classes} classes, so {(n, n_classes)}{'' if exactly else ' or more'} is expected"
    )


def _shapes(inputs: Nest) -> str:
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {_shapes(part)}" for name, part in inputs.items())
    kind = str(inputs.dtype).removeprefix("torch.")
    return f"shape {tuple(inputs.shape)}" + ("" if kind == "float32" else f" and type {kind}")
