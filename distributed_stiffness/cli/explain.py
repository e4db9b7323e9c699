"""The command `explain`: how the gradients of a network are made."""

from __future__ import annotations

from typing import Annotated

import typer

from distributed_stiffness.cli.options import AsJson, ModelOptions, Precision
from distributed_stiffness.cli.parsing import n_bytes, named_values, split
from distributed_stiffness.cli.work import say, say_json
from distributed_stiffness.errors import StudyError


def explain(
    model: Annotated[
        str,
        typer.Option(
            help="fully_connected, cnn, resnet20, resnet18, torchvision:NAME, timm:NAME, hf:FOLDER"
            " or package.module:factory."
        ),
    ] = "fully_connected",
    model_option: ModelOptions = None,
    input_shape: Annotated[
        str, typer.Option(help="Of one example, comma-separated, such as 3,32,32.")
    ] = "1,28,28",
    classes: Annotated[int, typer.Option(min=1, help="Outputs of the network.")] = 10,
    examples: Annotated[int, typer.Option(min=1, help="N, of the matrix.")] = 10_000,
    precision: Precision = "float32",
    memory: Annotated[
        str | None, typer.Option(help="Of a replica, such as 4GB; default: half of what is free.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how each parameter's gradients are made, at what cost.

    Example: stiffness explain --model resnet20 --input-shape 3,32,32 --classes 100
    """
    import torch

    from distributed_stiffness.gradients import explain as explained
    from distributed_stiffness.models import build, check_outputs

    shape = tuple(split("--input-shape", input_shape, int))
    if not shape or min(shape) < 1:
        raise StudyError(f"--input-shape is {input_shape!r}: expected sizes of 1 or more")
    network = build(
        model,
        input_shape=shape,
        n_classes=classes,
        options=named_values("--model-option", model_option),
    )
    inputs = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    check_outputs(network, inputs, classes, model)
    found = explained(
        network.eval(),
        "cross_entropy",
        (inputs, torch.arange(8) % classes),
        n_examples=examples,
        precision=precision,
        memory=n_bytes(memory),
    )
    if as_json:
        say_json(found.to_json())
    else:
        say([str(found)])
