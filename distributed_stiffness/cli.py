"""The command line: parses options, calls the package. Thin.

Exit codes: 0 done; 1 a mistake that the message explains, or a study that is not complete; 130
interrupted (the store continues).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from distributed_stiffness.errors import StiffnessError, StudyError
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Data, Study, Training, build_study

app = typer.Typer(
    help="Stiffness of neural networks: all pairs, every checkpoint, on a Ray cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes cut long option names short
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO = Study(
    title="Demo: handwritten digits",
    data=Data(name="digits"),
    training=Training(learning_rates=(1e-4, 1e-3), epochs=100.0),
)


def main() -> None:
    """Entry point of `stiffness`."""
    run_app(app)


def run_app(application: Callable[[], Any]) -> None:
    """Run a command; print what a user can mend without a traceback."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with _interrupted_by_signals():
            application()
    except StiffnessError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt, SystemExit) as ending:
        # Ray has a handler of its own while it starts and ends, which exits with the signal.
        if isinstance(ending, SystemExit) and ending.code != signal.SIGTERM:
            raise
        console.print("interrupted; what is done is kept: run the same command again to go on")
        sys.exit(130)


@app.command()
def demo(
    store: Annotated[str, typer.Option(help="Where results go.")] = "results/demo.zarr",
    engine: Annotated[str, typer.Option(help="ray, or serial: this process alone.")] = "ray",
) -> None:
    """Train the paper's fully connected net on real digits and look at its stiffness.

    Needs no network: the digits come with scikit-learn. Takes a minute or two on two cores.
    """
    compute_and_present(DEMO, _checked_run(store=store, engine=engine))


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="A study file: JSON, YAML or TOML.")],
    store: Annotated[str, typer.Option(help="Path or URL of the store.")],
    data_dir: Annotated[str | None, typer.Option(help="Folder of data sets.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.")] = None,
) -> None:
    """Run a study file; a store keeps its own, as JSON, in its attribute `study`.

    Example: stiffness run study.yaml --store results/study.zarr
    """
    chosen = _checked_run(store=store, data_directory=data_dir, address=address)
    compute_and_present(read_study(study), chosen)


@app.command()
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
    store: Annotated[
        str, typer.Option(help="Store of the results: a path, or a URL such as s3://…")
    ] = "results/gram.zarr",
    loss: Annotated[
        str,
        typer.Option(help="cross_entropy, or package.module:function of (outputs, targets)."),
    ] = "cross_entropy",
    examples: Annotated[
        str, typer.Option(help="Examples whose pairs are computed, or 'all'.")
    ] = "all",
    train_examples: Annotated[
        int, typer.Option(help="Examples of a training split, put before them.")
    ] = 0,
    iterations: Annotated[
        str | None, typer.Option(help="Those that are looked at, comma-separated; default: all.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Of the names in the checkpoints, such as 'model.'; default: found."),
    ] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the model; repeatable.")
    ] = None,
    data_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the data, such as resize=256; repeatable."),
    ] = None,
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
    precision: Annotated[
        str, typer.Option(help="float32, float64, bf16, bf16x3 or tf32.")
    ] = "float32",
    tile: Annotated[
        int | None, typer.Option(help="Edge of a tile; default: about 1,000 examples.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the report.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of data sets.")] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder of figures and report; default: beside the store."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join; default: $RAY_ADDRESS, else start Ray here."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_replicas: Annotated[int | None, typer.Option(help="Replicas at most.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a replica.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a replica, such as 4GB; default: its share.")
    ] = None,
    engine: Annotated[str, typer.Option(help="ray, or serial: this process alone.")] = "ray",
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what it will cost, and stop.")
    ] = False,
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
        iterations=None if iterations is None else _split("--iterations", iterations, int),
        prefix=prefix,
        loss=loss,
        examples=_count(examples),
        train_examples=train_examples,
        standardise=standardise,
        unit_norm=unit_norm,
        model_options=_options("--model-option", model_option or []),
        data_options=_options("--data-option", data_option or []),
        parameters=parameters,
        precision=precision,
        tile=tile,
        title=title,
    )
    chosen = _checked_run(
        store=store,
        data_directory=data_dir,
        address=address,
        device=device,
        max_replicas=max_replicas,
        threads=threads,
        memory=_bytes(memory),
        engine=engine,
    )
    _say(found.lines())
    if plan_only:
        show_plan(found.study, chosen, replicas=max_replicas or 1)
    else:
        compute_and_present(found.study, chosen, folder=figures, bring=found.bring)


@app.command()
def report(
    store: Annotated[str, typer.Argument(help="Path or URL of a store.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where figures and report go; default: beside the store.")
    ] = None,
) -> None:
    """Draw the figures of a store and write its report."""
    from distributed_stiffness.report import present

    with _interruptible(), Progress() as progress:
        _say(present(store, folder or beside(store), progress))


@app.command()
def plot(
    store: Annotated[str, typer.Argument(help="Path or URL of a store.")],
    view: Annotated[str | None, typer.Argument(help="Which figure; without it, all are named.")] = (
        None
    ),
    out: Annotated[
        Path | None, typer.Option(help="A .png, .svg or .pdf; default: VIEW.png beside the store.")
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Comma-separated, those to show; default: all.")
    ] = None,
    seed: Annotated[
        str | None, typer.Option(help="Comma-separated; default: the mean over all.")
    ] = None,
    iterations: Annotated[
        str | None, typer.Option(help="Comma-separated, those to show; default: all.")
    ] = None,
) -> None:
    """Draw one figure of a store.

    Example: stiffness plot results/demo.zarr class_matrices_sign --iterations 0,168 --out c.pdf
    """
    from distributed_stiffness.figures import VIEWS
    from distributed_stiffness.report import plot

    if view is None:
        _say([f"{name}: {v.title}" for name, v in VIEWS.items()])
        return
    given = {
        "learning_rate": learning_rates and _split("--learning-rates", learning_rates, float),
        "seed": seed and _split("--seed", seed, float),
        "iteration": iterations and _split("--iterations", iterations, float),
    }
    at = {dim: values for dim, values in given.items() if values}
    with _interruptible(), Progress() as progress:
        path = out or beside(store) / f"{view}.png"
        _say([f"Figure: {plot(store, view, path, at=at, progress=progress)}"])


@app.command()
def verify(
    store: Annotated[str, typer.Argument(help="Path or URL of a store.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what is wrong and compute it again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    checkpoints: Annotated[
        str | None, typer.Option(help="Folder or URL of checkpoints; default: beside the store.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of data sets.")] = None,
    download: Annotated[bool, typer.Option(help="Download data that are missing.")] = True,
    sample: Annotated[
        int, typer.Option(help="Examples of each chunk that are computed again.")
    ] = 3,
    engine: Annotated[
        str, typer.Option(help="Of a repair: ray, or serial: this process alone.")
    ] = "ray",
    address: Annotated[str | None, typer.Option(help="Of a repair: Ray cluster to join.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a repair: memory of a replica, such as 4GB.")
    ] = None,
) -> None:
    """Read every chunk of a store, check its numbers, and compute a sample of them again.

    Exit code 0: nothing is wrong, or all was repaired; 1: something is.
    """
    from distributed_stiffness.verify import verify_store

    chosen = _checked_run(
        store=store,
        checkpoints=checkpoints,
        data_directory=data_dir,
        download=download,
        engine=engine,
        address=address,
        memory=_bytes(memory),
    )
    with _interruptible(), Progress() as progress, contextlib.redirect_stdout(sys.stderr):
        found = verify_store(chosen, repair=repair, sample=sample, progress=progress)
    _say([json.dumps(found.to_json())] if as_json else found.lines())
    if not found.is_well:
        raise typer.Exit(1)


@app.command()
def status(
    store: Annotated[str, typer.Argument(help="Path or URL of a store.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say how far a study is: done, missing, who computes what, time left.

    Reads only, so that it can be asked while the study runs.

    Example: stiffness status results/cifar100.zarr
    """
    from distributed_stiffness.engine.status import status as look

    found = look(store)
    _say([json.dumps(found.to_json())] if as_json else list(found.lines()))


@app.command()
def plan(
    study: Annotated[Path, typer.Argument(help="A study file: JSON, YAML or TOML.")],
    store: Annotated[
        str, typer.Option(help="Path or URL of the store; one that is there keeps its plan.")
    ] = "results/study.zarr",
    data_dir: Annotated[str | None, typer.Option(help="Folder of data sets.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a replica, such as 4GB; default: half of what is free.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="That work side by side.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what a study will cost before it runs: operations, bytes, time.

    The time is that of replicas as fast as this process, which is measured for a second or two.

    Example: stiffness plan study.json --replicas 8 --memory 4GB
    """
    chosen = _checked_run(store=store, data_directory=data_dir, memory=_bytes(memory))
    show_plan(read_study(study), chosen, replicas=replicas, as_json=as_json)


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Option(
            help="fully_connected, cnn, resnet20, resnet18, torchvision:NAME, timm:NAME, hf:FOLDER"
            " or package.module:factory."
        ),
    ] = "fully_connected",
    model_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the model; repeatable.")
    ] = None,
    input_shape: Annotated[
        str, typer.Option(help="Of one example, comma-separated, such as 3,32,32.")
    ] = "1,28,28",
    classes: Annotated[int, typer.Option(min=1, help="Outputs of the network.")] = 10,
    examples: Annotated[int, typer.Option(min=1, help="N, of the matrix.")] = 10_000,
    precision: Annotated[
        str, typer.Option(help="float32, float64, bf16, bf16x3 or tf32.")
    ] = "float32",
    memory: Annotated[
        str | None, typer.Option(help="Of a replica, such as 4GB; default: half of what is free.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say by which rule each parameter's gradients are made, and what that costs.

    Example: stiffness explain --model resnet20 --input-shape 3,32,32 --classes 100
    """
    import torch

    from distributed_stiffness.gradients import explain as explained
    from distributed_stiffness.models import build, check_outputs

    shape = tuple(_split("--input-shape", input_shape, int))
    if not shape or min(shape) < 1:
        raise StudyError(f"--input-shape is {input_shape!r}: expected sizes of 1 or more")
    network = build(
        model,
        input_shape=shape,
        n_classes=classes,
        options=_options("--model-option", model_option or []),
    )
    inputs = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    check_outputs(network, inputs, classes, model)
    found = explained(
        network.eval(),
        "cross_entropy",
        (inputs, torch.arange(8) % classes),
        n_examples=examples,
        precision=precision,
        memory=_bytes(memory),
    )
    typer.echo(json.dumps(found.to_json()) if as_json else str(found))


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
        data_dir: Annotated[
            str | None,
            typer.Option(
                help="Folder of data sets; default: $STIFFNESS_DATA_DIR, else a cache folder in"
                " your home."
            ),
        ] = None,
        download: Annotated[bool, typer.Option(help="Download what is missing.")] = True,
        accept_unverified_data: Annotated[
            bool,
            typer.Option(
                "--accept-unverified-data",
                help="Read files whose checksums are not the published ones, after checking"
                " shapes, ranges, counts and names; the store says so.",
            ),
        ] = data.accept_unverified,
        store: Annotated[
            str, typer.Option(help="Store of the results: a path, or a URL such as s3://…")
        ] = store,
        checkpoints: Annotated[
            str | None,
            typer.Option(help="Folder or URL of checkpoints; default: beside the store."),
        ] = None,
        figures: Annotated[
            Path | None,
            typer.Option(help="Folder of figures and report; default: beside the store."),
        ] = None,
        model: Annotated[
            str,
            typer.Option(
                help="fully_connected, cnn, resnet20, resnet18 or package.module:factory."
            ),
        ] = study.model.name,
        model_option: Annotated[
            list[str] | None,
            typer.Option(
                help="NAME=VALUE for the model, such as normalisation=batch or widths=[500,300];"
                " repeatable."
            ),
        ] = None,
        learning_rates: Annotated[
            str, typer.Option(help="Comma-separated; one training run each.")
        ] = _join(training.learning_rates),
        seed: Annotated[
            str, typer.Option(help="Training seeds, comma-separated; one training run each.")
        ] = _join(training.seeds),
        iterations: Annotated[
            str | None,
            typer.Option(
                help="Optimiser steps whose checkpoints are looked at, comma-separated and"
                " ascending; default: four stages up to --epochs."
            ),
        ] = _join(training.iterations) if training.iterations else None,
        epochs: Annotated[
            float, typer.Option(help="How long to train, where --iterations is not given.")
        ] = training.epochs,
        batch_size: Annotated[int, typer.Option(help="Training batch.")] = training.batch_size,
        examples: Annotated[
            str, typer.Option(help="Validation examples whose pairs are computed, or 'all'.")
        ] = str(data.validation_examples or "all"),
        train_examples: Annotated[
            int, typer.Option(help="Training examples put before them.")
        ] = data.train_examples,
        permute_labels: Annotated[
            float, typer.Option(help="Share of training labels that are permuted, 0 to 1.")
        ] = data.permuted_labels,
        precision: Annotated[
            str,
            typer.Option(
                help="float32; float64: exact on over-fitted nets, slower gradients; bf16: products"
                " several times as fast, coarser; bf16x3 and tf32: on GPUs."
            ),
        ] = study.gradients.precision,
        tile: Annotated[
            int | None, typer.Option(help="Edge of a tile; default: about 1,000 examples.")
        ] = study.gradients.tile,
        address: Annotated[
            str | None,
            typer.Option(help="Ray cluster to join; default: $RAY_ADDRESS, else start Ray here."),
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        max_replicas: Annotated[
            int | None, typer.Option(help="Replicas at most; default: as many as there is room.")
        ] = None,
        threads: Annotated[int | None, typer.Option(help="CPU threads of a replica.")] = None,
        memory: Annotated[
            str | None, typer.Option(help="Memory of a replica, such as 4GB; default: its share.")
        ] = None,
        wait_for_nodes: Annotated[
            float | None,
            typer.Option(help="Seconds to wait for a node that fits; default: if autoscaled."),
        ] = None,
        engine: Annotated[str, typer.Option(help="ray, or serial: this process alone.")] = "ray",
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
        plan_only: Annotated[
            bool, typer.Option("--plan", help="Say what it will cost, and stop.")
        ] = False,
    ) -> None:
        chosen = build_study(
            lambda: study.model_validate(
                {
                    "keep": "sums" if reduce_only else "pairs",
                    "distance_bins": study.distance_bins,
                    "title": study.title
                    if (data_name, model) == (data.name, study.model.name)
                    else f"{data_name}, {model}",
                    "loss": study.loss,
                    "data": {
                        **data.model_dump(),
                        "name": data_name,
                        "validation_examples": _count(examples),
                        "train_examples": train_examples,
                        "permuted_labels": permute_labels,
                        "accept_unverified": accept_unverified_data,
                    },
                    "model": {
                        "name": model,
                        "options": (study.model.options if model == study.model.name else {})
                        | _options("--model-option", model_option or []),
                    },
                    "training": {
                        **training.model_dump(),
                        "learning_rates": _split("--learning-rates", learning_rates, float),
                        "seeds": _split("--seed", seed, int),
                        "iterations": None
                        if iterations is None
                        else _split("--iterations", iterations, int),
                        "epochs": epochs,
                        "batch_size": batch_size,
                    },
                    "gradients": {
                        **study.gradients.model_dump(),
                        "precision": precision,
                        "tile": tile,
                    },
                }
            )
        )
        how = _checked_run(
            store=store,
            checkpoints=checkpoints,
            data_directory=data_dir,
            download=download,
            address=address,
            device=device,
            max_replicas=max_replicas,
            threads=threads,
            memory=_bytes(memory),
            wait_for_nodes=wait_for_nodes,
            engine=engine,
            rows=_rows(rows),
        )
        if plan_only:
            show_plan(chosen, how, replicas=max_replicas or 1)
        else:
            compute_and_present(chosen, how, folder=figures)

    run_app(command)


def read_study(path: Path) -> Study:
    """Read a study file: JSON, YAML or TOML, by its suffix; the same fields in each.

    Raises:
        StudyError: it cannot be read, or is no study.
    """
    parse = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    try:
        fields = parse.get(path.suffix.lower(), json.loads)(path.read_text())
    except OSError as error:
        raise StudyError(f"cannot read the study file {path}: {error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise StudyError(
            f"{path} cannot be parsed: {error}. Expected JSON, or YAML or TOML where the name ends"
            " so"
        ) from error
    return build_study(lambda: Study.model_validate(fields))


def show_plan(study: Study, chosen: Any, *, replicas: int, as_json: bool = False) -> None:
    """Print what a study will cost."""
    from distributed_stiffness.engine.prediction import predict
    from distributed_stiffness.engine.prepare import prepare
    from distributed_stiffness.gradients.budget import free_memory

    with _interruptible(), Progress(quiet=as_json) as progress:
        prepared = prepare(study, chosen, progress)
        made = prepared.plan(chosen.memory or free_memory() // replicas, "cpu")
        found = predict(made, replicas=replicas, speed=prepared.speed(made))
    lines = [made.describe(), found.describe()]
    whole = {"plan": made.to_json(), "prediction": found.to_json()}
    _say([json.dumps(whole)] if as_json else lines)


def compute_and_present(
    study: Study,
    chosen: Any,
    *,
    folder: Path | None = None,
    bring: Callable[[Any], None] | None = None,
) -> None:
    """Compute a study, then draw its figures, write its report and print what they show."""
    from distributed_stiffness.engine import run_study
    from distributed_stiffness.report import present

    folder = _writable(folder or beside(chosen.store))
    with _interruptible(), Progress(quiet=chosen.quiet) as progress:
        if "_ray_pkg_" in str(Path.cwd()) and not _is_absolute(chosen.store):
            progress.say(
                f"note: the store {chosen.store!r} is relative to the job's scratch folder; give"
                " an absolute path or a URL to keep it"
            )
        store = run_study(study, chosen, progress, bring=bring)
        if chosen.rows is None:  # figures of a part would mislead
            _say(present(store, folder, progress))


def beside(store: str) -> Path:
    """Return the folder of a store's figures and report: STORE without .zarr; local."""
    name = store.rstrip("/")
    name = name.removesuffix(".zarr") if name.endswith(".zarr") else f"{name}.report"
    return Path("results", name.rpartition("/")[2]) if "://" in name else Path(name)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; typer would swallow a KeyboardInterrupt before it says what is kept."""


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise Interrupted on Ctrl-C and SIGTERM, in whatever is being done or imported."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # Nothing is left that could be interrupted, but threads that Python waits for before it
        # gets to what is registered for the exit.
        signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        atexit.register(_ignore_signals)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted from error


def _writable(folder: Path) -> Path:
    """Try whether figures and report can be written, now and not after hours of work.

    Raises:
        StudyError: it cannot be written.
    """
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if not existed:
            folder.rmdir()  # it is made when there is something to put there
    except OSError as error:
        raise StudyError(f"cannot write figures to {folder}: {error}; give --figures") from error
    return folder


def _checked_run(**options: Any) -> Any:
    from distributed_stiffness.engine import Run

    for name, allowed in (("engine", ("ray", "serial")), ("device", ("auto", "cpu", "cuda"))):
        if options.get(name, allowed[0]) not in allowed:
            raise StudyError(
                f"unknown {name} {options[name]!r}: expected one of {', '.join(allowed)}"
            )
    for name in ("max_replicas", "threads"):
        if options.get(name) is not None and options[name] < 1:
            raise StudyError(f"{name} is {options[name]}: expected 1 or more")
    return Run(**options)


def _say(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def _join(values: tuple[float, ...]) -> str:
    return ",".join(map(repr, values))


def _split(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise StudyError(
            f"{option} is {text!r}: expected numbers with commas between, such as 1,2 ({error})"
        ) from error


def _count(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit():
        raise StudyError(f"--examples is {text!r}: expected a number or 'all'")
    return int(text)


def _rows(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise StudyError(f"--rows is {text!r}: expected FIRST:LAST, such as 0:5000")
    return int(first), int(last)


def _options(option: str, pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise StudyError(f"{option} is {pair!r}: expected NAME=VALUE")
        try:
            options[name] = json.loads(value)  # 3, true, [500,300]
        except ValueError:
            options[name] = value
    return options


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}
    number = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(number) :]
    try:
        return round(float(number) * units[unit])
    except (ValueError, KeyError) as error:
        raise StudyError(f"--memory is {text!r}: expected a size such as 4GB or 800MB") from error


def _is_absolute(store: str) -> bool:
    return "://" in store or Path(store).is_absolute()
