"""Commands that compute a study: `demo`, `run`, and `plan`, which only says what it costs."""

from __future__ import annotations

from typing import Annotated

import typer

from distributed_stiffness.cli.options import Address, AsJson, DataDir, Engine, Store, StudyFile
from distributed_stiffness.cli.parsing import n_bytes, read_study
from distributed_stiffness.cli.work import checked_run, compute_and_present, show_plan
from distributed_stiffness.study import Data, Study, Training

DEMO = Study(
    title="Demo: handwritten digits",
    data=Data(name="digits"),
    training=Training(learning_rates=(1e-4, 1e-3), epochs=100.0),
)


def demo(store: Store = "results/demo.zarr", engine: Engine = "ray") -> None:
    """Train the paper's fully connected net on real digits and look at its stiffness.

    Needs no network: the digits come with scikit-learn. Takes a minute or two on two cores.
    """
    compute_and_present(DEMO, checked_run(store=store, engine=engine))


def run(
    study: StudyFile,
    store: Store,
    data_dir: DataDir = None,
    address: Address = None,
) -> None:
    """Run a study file; a store keeps its own, as JSON, in its attribute `study`.

    Example: stiffness run study.yaml --store results/study.zarr
    """
    chosen = checked_run(store=store, data_directory=data_dir, address=address)
    compute_and_present(read_study(study), chosen)


def plan(
    study: StudyFile,
    store: Annotated[
        str, typer.Option(help="Path or URL of the store; one that is there keeps its plan.")
    ] = "results/study.zarr",
    data_dir: DataDir = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a replica, such as 4GB; default: half of what is free.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="That work side by side.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a study will cost before it runs: operations, bytes, time.

    The time is that of replicas as fast as this process, which is measured for a second or two.

    Example: stiffness plan study.json --replicas 8 --memory 4GB
    """
    chosen = checked_run(store=store, data_directory=data_dir, memory=n_bytes(memory))
    show_plan(read_study(study), chosen, replicas=replicas, as_json=as_json)
