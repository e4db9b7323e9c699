"""The command line of a job script: its study's fields are the defaults."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from distributed_stiffness.cli.ending import EPILOG, run_app
from distributed_stiffness.cli.fields import run_fields, study_fields
from distributed_stiffness.cli.options import (
    OPTIMIZERS,
    AcceptUnverified,
    Address,
    AllowError,
    AsJson,
    CheckpointFolder,
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
    choice,
)
from distributed_stiffness.cli.parsing import joined
from distributed_stiffness.cli.work import checked_run, compute_or_plan
from distributed_stiffness.study import Study, build_study


def job(study: Study, *, store: str, description: str | None) -> None:
    """Run a job script: its study's fields are the defaults of the command line."""
    run_app(job_app(study, store=store, description=description))


def job_app(study: Study, *, store: str, description: str | None) -> typer.Typer:
    """Return the command of a job script."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    training, data, gradients = study.training, study.data, study.gradients

    example = f"Example: python {sys.argv[0]} --learning-rates 0.0003,0.003 --examples all"

    @app.command(help=f"{description or study.title}\n\n{example}", epilog=EPILOG)
    def _job(
        data_name: Annotated[
            str,
            typer.Option(
                "--data",
                help="digits, mnist, fashion_mnist, cifar10, cifar100, package.module:factory,"
                " npz:FILE, images:FOLDER or hf:FOLDER.",
            ),
        ] = data.name,
        data_option: DataOptions = None,
        data_dir: DataDir = None,
        download: Download = True,
        accept_unverified_data: AcceptUnverified = data.accept_unverified,
        store: Store = store,
        checkpoints: CheckpointFolder = None,
        figures: Figures = None,
        title: Title = None,
        model: Annotated[
            str,
            typer.Option(
                help="fully_connected, cnn, resnet20, resnet18, torchvision:NAME, timm:NAME or"
                " package.module:factory."
            ),
        ] = study.model.name,
        model_option: ModelOptions = None,
        loss: Loss = study.loss,
        learning_rates: Annotated[
            str, typer.Option(help="Comma-separated; one training run each.")
        ] = joined(training.learning_rates),
        seed: Annotated[
            str, typer.Option(help="Training seeds, comma-separated; one training run each.")
        ] = joined(training.seeds),
        iterations: Annotated[
            str | None,
            typer.Option(
                help="Optimiser steps whose checkpoints are looked at, comma-separated and"
                " ascending; default: four stages up to --epochs."
            ),
        ] = joined(training.iterations) if training.iterations else None,
        epochs: Annotated[
            float, typer.Option(help="How long to train, where --iterations is not given.")
        ] = training.epochs,
        batch_size: Annotated[int, typer.Option(help="Training batch.")] = training.batch_size,
        optimizer: Annotated[
            str, choice(OPTIMIZERS, "Of the training, at a constant learning rate.")
        ] = training.optimizer,
        momentum: Annotated[float, typer.Option(help="Of sgd.")] = training.momentum,
        weight_decay: Annotated[
            float, typer.Option(help="Of the optimiser.")
        ] = training.weight_decay,
        examples: Annotated[
            str, typer.Option(help="Validation examples whose pairs are computed, or 'all'.")
        ] = "all" if data.validation_examples is None else str(data.validation_examples),
        train_examples: TrainExamples = data.train_examples,
        sample_seed: SampleSeed = data.sample_seed,
        permute_labels: Annotated[
            float, typer.Option(help="Share of training labels that are permuted, 0 to 1.")
        ] = data.permuted_labels,
        permutation_seed: Annotated[
            int, typer.Option(help="Of the permuted labels.")
        ] = data.permutation_seed,
        standardise: Standardise = data.standardise,
        unit_norm: UnitNorm = data.unit_norm,
        parameters: Parameters = None if gradients.parameters is None else [*gradients.parameters],
        precision: Precision = gradients.precision,
        tile: Tile = gradients.tile,
        reduce_only: ReduceOnly = study.keep == "sums",
        distance_bins: DistanceBins = study.distance_bins,
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
        options = locals()
        chosen = changed(study, study_fields(options))
        run = checked_run(**run_fields(options))
        compute_or_plan(chosen, run, plan_only=plan_only, as_json=as_json, folder=figures)

    return app


def changed(study: Study, said: Mapping[str, Any]) -> Study:
    """Return a script's study with what the command line says of every field.

    Options of its model and data stay where the model, or the data, are the same; its title where
    both are.

    Raises:
        StudyError: the fields do not fit.
    """
    same = {part: said[part]["name"] == getattr(study, part).name for part in ("model", "data")}
    fields = dict(said)
    for part, is_same in same.items():
        kept = getattr(study, part).options if is_same else {}
        fields[part] = said[part] | {"options": kept | said[part]["options"]}
    if said["title"] is None:
        other = f"{said['data']['name']}, {said['model']['name']}"
        fields["title"] = study.title if all(same.values()) else other
    return build_study(lambda: Study.model_validate(fields))
