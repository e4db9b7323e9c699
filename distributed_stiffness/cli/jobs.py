"""The command line of a job script: its study's fields are the defaults."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from distributed_stiffness.cli.ending import run_app
from distributed_stiffness.cli.options import (
    Address,
    CheckpointFolder,
    DataDir,
    Device,
    Download,
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
    TrainExamples,
)
from distributed_stiffness.cli.parsing import (
    count,
    joined,
    n_bytes,
    named_values,
    rows_range,
    split,
)
from distributed_stiffness.cli.work import checked_run, compute_and_present, show_plan
from distributed_stiffness.study import Study, build_study


def job(study: Study, *, store: str, description: str | None) -> None:
    """Run a job script: its study's fields are the defaults of the command line."""
    command = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    training, data = study.training, study.data

    @command.command(help=description)
    def _job(
        data_name: Annotated[
            str,
            typer.Option(
                "--data",
                help="digits, mnist, fashion_mnist, cifar10, cifar100 or package.module:factory.",
            ),
        ] = data.name,
        data_dir: DataDir = None,
        download: Download = True,
        accept_unverified_data: Annotated[
            bool,
            typer.Option(
                "--accept-unverified-data",
                help="Read files whose checksums are not the published ones, after checking"
                " shapes, ranges, counts and names; the store says so.",
            ),
        ] = data.accept_unverified,
        store: Store = store,
        checkpoints: CheckpointFolder = None,
        figures: Figures = None,
        model: Annotated[
            str,
            typer.Option(
                help="fully_connected, cnn, resnet20, resnet18 or package.module:factory."
            ),
        ] = study.model.name,
        model_option: ModelOptions = None,
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
        examples: Annotated[
            str, typer.Option(help="Validation examples whose pairs are computed, or 'all'.")
        ] = str(data.validation_examples or "all"),
        train_examples: TrainExamples = data.train_examples,
        permute_labels: Annotated[
            float, typer.Option(help="Share of training labels that are permuted, 0 to 1.")
        ] = data.permuted_labels,
        precision: Precision = study.gradients.precision,
        tile: Tile = study.gradients.tile,
        address: Address = None,
        device: Device = "auto",
        max_replicas: MaxReplicas = None,
        threads: Threads = None,
        memory: Memory = None,
        wait_for_nodes: Annotated[
            float | None,
            typer.Option(help="Seconds to wait for a node that fits; default: if autoscaled."),
        ] = None,
        engine: Engine = "ray",
        rows: Annotated[
            str | None,
            typer.Option(help="FIRST:LAST, rows to compute now; a later run adds the rest."),
        ] = None,
        reduce_only: Annotated[
            bool,
            typer.Option(
                "--reduce-only",
                help="Keep no pairs, only sums over each example's pairs by class and distance.",
            ),
        ] = study.keep == "sums",
        plan_only: PlanOnly = False,
    ) -> None:
        chosen = _changed(
            study,
            keep="sums" if reduce_only else "pairs",
            data={
                "name": data_name,
                "validation_examples": count(examples),
                "train_examples": train_examples,
                "permuted_labels": permute_labels,
                "accept_unverified": accept_unverified_data,
            },
            model=model,
            model_options=named_values("--model-option", model_option),
            training={
                "learning_rates": split("--learning-rates", learning_rates, float),
                "seeds": split("--seed", seed, int),
                "iterations": None
                if iterations is None
                else split("--iterations", iterations, int),
                "epochs": epochs,
                "batch_size": batch_size,
            },
            gradients={"precision": precision, "tile": tile},
        )
        how = checked_run(
            store=store,
            checkpoints=checkpoints,
            data_directory=data_dir,
            download=download,
            address=address,
            device=device,
            max_replicas=max_replicas,
            threads=threads,
            memory=n_bytes(memory),
            wait_for_nodes=wait_for_nodes,
            engine=engine,
            rows=rows_range(rows),
        )
        if plan_only:
            show_plan(chosen, how, replicas=max_replicas or 1)
        else:
            compute_and_present(chosen, how, folder=figures)

    run_app(command)


def _changed(
    study: Study,
    *,
    keep: str,
    data: dict[str, Any],
    model: str,
    model_options: dict[str, Any],
    training: dict[str, Any],
    gradients: dict[str, Any],
) -> Study:
    """Return a script's study with what the command line says; its title only if it still fits."""
    same_model = model == study.model.name
    same = same_model and data["name"] == study.data.name
    fields = {
        "keep": keep,
        "distance_bins": study.distance_bins,
        "title": study.title if same else f"{data['name']}, {model}",
        "loss": study.loss,
        "data": {**study.data.model_dump(), **data},
        "model": {
            "name": model,
            "options": (study.model.options if same_model else {}) | model_options,
        },
        "training": {**study.training.model_dump(), **training},
        "gradients": {**study.gradients.model_dump(), **gradients},
    }
    return build_study(lambda: Study.model_validate(fields))
