"""The command `gram`: networks that were trained elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from distributed_stiffness.cli.options import (
    Address,
    DataDir,
    DataOptions,
    Device,
    Engine,
    Figures,
    MaxReplicas,
    Memory,
    ModelOptions,
    PlanOnly,
    Precision,
    Store,
    Threads,
    Tile,
    Title,
    TrainExamples,
)
from distributed_stiffness.cli.parsing import count, n_bytes, named_values, split
from distributed_stiffness.cli.work import checked_run, compute_and_present, say, show_plan


def gram(
    *,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINTS]...",
            help="More checkpoints: what a shell makes of a * without quotes.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="package.module:factory, torchvision:NAME, timm:NAME, hf:FOLDER, or"
            " fully_connected, cnn, resnet20, resnet18."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="package.module:factory, npz:FILE, images:FOLDER, hf:FOLDER, or digits, mnist, …;"
            " inputs are taken as they are."
        ),
    ],
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            help="Paths or URLs, with * and ** (in quotes): .safetensors, .pt, .pth, .ckpt, or"
            " folders of Hugging Face; repeatable. Default: the folder of an hf: model."
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="How the paths end, such as 'lr{learning_rate}/seed{seed}/step-{iteration}';"
            " default: numbers after lr, seed, step, epoch and the like."
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="In place of --checkpoints: a CSV file of path, learning_rate, seed, iteration."
        ),
    ] = None,
    store: Store = "results/gram.zarr",
    loss: Annotated[
        str,
        typer.Option(help="cross_entropy, or package.module:function of (outputs, targets)."),
    ] = "cross_entropy",
    examples: Annotated[
        str, typer.Option(help="Examples whose pairs are computed, or 'all'.")
    ] = "all",
    train_examples: TrainExamples = 0,
    iterations: Annotated[
        str | None, typer.Option(help="Those that are looked at, comma-separated; default: all.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Of the names in the checkpoints, such as 'model.'; default: found."),
    ] = None,
    model_option: ModelOptions = None,
    data_option: DataOptions = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of the parameters in play, such as 'layer4.*'; repeatable."),
    ] = None,
    standardise: Annotated[
        bool,
        typer.Option("--standardise", help="Standardise inputs over a training split."),
    ] = False,
    unit_norm: Annotated[
        bool, typer.Option("--unit-norm", help="And scale each to unit norm.")
    ] = False,
    precision: Precision = "float32",
    tile: Tile = None,
    title: Title = None,
    data_dir: DataDir = None,
    figures: Figures = None,
    address: Address = None,
    device: Device = "auto",
    max_replicas: MaxReplicas = None,
    threads: Threads = None,
    memory: Memory = None,
    engine: Engine = "ray",
    plan_only: PlanOnly = False,
) -> None:
    """Compute the stiffness of networks that you have trained, from their checkpoints.

    Run the same command again after an interruption: what is done is kept.

    Example: stiffness gram --model nets:build --data data:validation --checkpoints
    'runs/*/step-*.safetensors' --store out.zarr
    """
    from distributed_stiffness.importing import gather

    found = gather(
        model,
        data,
        [*(checkpoints or []), *(more or [])] or None,
        pattern=pattern,
        table=table,
        iterations=None if iterations is None else split("--iterations", iterations, int),
        prefix=prefix,
        loss=loss,
        examples=count(examples),
        train_examples=train_examples,
        standardise=standardise,
        unit_norm=unit_norm,
        model_options=named_values("--model-option", model_option),
        data_options=named_values("--data-option", data_option),
        parameters=parameters,
        precision=precision,
        tile=tile,
        title=title,
    )
    chosen = checked_run(
        store=store,
        data_directory=data_dir,
        address=address,
        device=device,
        max_replicas=max_replicas,
        threads=threads,
        memory=n_bytes(memory),
        engine=engine,
    )
    say(found.lines())
    if plan_only:
        show_plan(found.study, chosen, replicas=max_replicas or 1)
    else:
        compute_and_present(found.study, chosen, folder=figures, bring=found.bring)
