"""The command `gram`: networks that were trained elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from distributed_stiffness.cli.fields import run_fields, study_fields
from distributed_stiffness.cli.options import (
    AcceptUnverified,
    Address,
    AllowError,
    AsJson,
    DataDir,
    DataOptions,
    Device,
    DistanceBins,
    Download,
    Engine,
    Figures,
    Loss,
    MaxReplicas,
    Memory,
    ModelOptions,
    Parameters,
    PlanOnly,
    Precision,
    ReduceOnly,
    Rows,
    SampleSeed,
    Standardise,
    Store,
    Threads,
    Tile,
    Title,
    TrainExamples,
    UnitNorm,
    WaitForNodes,
)
from distributed_stiffness.cli.work import checked_run, compute_or_plan


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
    data_name: Annotated[
        str,
        typer.Option(
            "--data",
            help="package.module:factory, npz:FILE, images:FOLDER, hf:FOLDER, or digits, mnist, …;"
            " inputs are taken as they are.",
        ),
    ],
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            help="Paths or URLs, with * and ** (in quotes): files of safetensors or torch, or"
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
            help="In place of --checkpoints: a CSV file of path, learning_rate, seed, iteration;"
            " as a spreadsheet writes it too."
        ),
    ] = None,
    store: Store = "results/gram.zarr",
    loss: Loss = "cross_entropy",
    examples: Annotated[
        str, typer.Option(help="Examples whose pairs are computed, or 'all'.")
    ] = "all",
    train_examples: TrainExamples = 0,
    sample_seed: SampleSeed = 0,
    iterations: Annotated[
        str | None, typer.Option(help="Those that are looked at, comma-separated; default: all.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Of the names in the checkpoints, such as 'model.'; default: found."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Under which a checkpoint keeps its state dict, such as ema or state.model;"
            " default: found."
        ),
    ] = None,
    model_option: ModelOptions = None,
    data_option: DataOptions = None,
    parameters: Parameters = None,
    standardise: Standardise = False,
    unit_norm: UnitNorm = False,
    precision: Precision = "float32",
    tile: Tile = None,
    reduce_only: ReduceOnly = False,
    distance_bins: DistanceBins = 50,
    title: Title = None,
    data_dir: DataDir = None,
    download: Download = True,
    accept_unverified_data: AcceptUnverified = False,
    figures: Figures = None,
    address: Address = None,
    device: Device = "auto",
    max_replicas: MaxReplicas = None,
    threads: Threads = None,
    memory: Memory = None,
    wait_for_nodes: WaitForNodes = None,
    allow_error: AllowError = False,
    engine: Engine = "ray",
    rows: Rows = None,
    plan_only: PlanOnly = False,
    as_json: AsJson = False,
) -> None:
    """Compute the stiffness of networks that you have trained.

    From their checkpoints, which are copied beside the store. Run the same command again after an
    interruption: what is done is kept.

    Example: stiffness gram --model nets:build --data data:validation --checkpoints
    'runs/*/step-*.safetensors' --store out.zarr
    """
    options = locals()
    from distributed_stiffness.importing import gather

    said = study_fields(options)
    found = gather(
        model,
        data_name,
        [*(checkpoints or []), *(more or [])] or None,
        pattern=pattern,
        table=table,
        iterations=said["training"]["iterations"],
        prefix=prefix,
        key=key,
        loss=loss,
        examples=said["data"]["validation_examples"],
        train_examples=train_examples,
        sample_seed=sample_seed,
        standardise=standardise,
        unit_norm=unit_norm,
        accept_unverified=accept_unverified_data,
        model_options=said["model"]["options"],
        data_options=said["data"]["options"],
        parameters=parameters,
        precision=precision,
        tile=tile,
        keep=said["keep"],
        distance_bins=distance_bins,
        title=title,
    )
    # The checkpoints that are named are read; the study's own folder is beside the store.
    run = checked_run(**run_fields({**options, "checkpoints": None}))
    for line in found.lines():
        typer.echo(line, err=as_json)
    compute_or_plan(
        found.study, run, plan_only=plan_only, as_json=as_json, folder=figures, bring=found.bring
    )
