"""Commands that compute a study: `demo`, `run`, and `plan`, which only says what it costs."""

from __future__ import annotations

from typing import Annotated

import typer

from distributed_stiffness.cli.fields import run_fields
from distributed_stiffness.cli.options import (
    Address,
    AllowError,
    AsJson,
    CheckpointFolder,
    DataDir,
    Device,
    Download,
    Engine,
    Figures,
    MaxReplicas,
    Memory,
    PlanOnly,
    Rows,
    Store,
    StudyFile,
    Threads,
    WaitForNodes,
)
from distributed_stiffness.cli.parsing import read_study
from distributed_stiffness.cli.work import checked_run, compute_or_plan, show_plan
from distributed_stiffness.study import Data, Study, Training

DEMO = Study(
    title="Demo: handwritten digits",
    data=Data(name="digits"),
    training=Training(learning_rates=(1e-4, 1e-3), epochs=100.0),
)


def demo(
    store: Store = "results/demo.zarr",
    figures: Figures = None,
    engine: Engine = "ray",
    as_json: AsJson = False,
) -> None:
    """Train a small net on real digits; see its stiffness.

    It is the paper's fully connected net. Needs no network: the digits come with scikit-learn.
    Takes a minute or two on two cores.

    Example: stiffness demo --store results/demo.zarr
    """
    run = checked_run(store=store, engine=engine)
    compute_or_plan(DEMO, run, plan_only=False, as_json=as_json, folder=figures)


def run(
    study: StudyFile,
    store: Store,
    checkpoints: CheckpointFolder = None,
    figures: Figures = None,
    data_dir: DataDir = None,
    download: Download = True,
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
    """Run a study file.

    A file says what the options of a job script say: the same fields, the same numbers. A store
    keeps its own, as JSON, in its attribute `study`.

    Example: stiffness run study.yaml --store results/study.zarr
    """
    chosen = checked_run(**run_fields(locals()))
    compute_or_plan(read_study(study), chosen, plan_only=plan_only, as_json=as_json, folder=figures)


def plan(
    study: StudyFile,
    store: Annotated[
        str, typer.Option(help="Path or URL of the store; one that is there keeps its plan.")
    ] = "results/study.zarr",
    data_dir: DataDir = None,
    download: Download = True,
    memory: Annotated[
        str | None, typer.Option(help="Of a replica, such as 4GB; default: half of what is free.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="That work side by side.")] = 1,
    device_rate: Annotated[
        float | None,
        typer.Option(
            help="Floating-point operations a second of a replica's device, such as 20e12 of a"
            " GPU: says the hours of replicas at this rate too."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a study will cost before it runs: operations, bytes, time.

    The time is that of replicas as fast as this process, which is measured for a few seconds:
    making gradients, multiplying them, folding tiles where sums are kept, and checks.

    Example: stiffness plan study.json --replicas 8 --memory 4GB
    """
    chosen = checked_run(**run_fields(locals()))
    show_plan(
        read_study(study), chosen, replicas=replicas, as_json=as_json, device_rate=device_rate
    )
