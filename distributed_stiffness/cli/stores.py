"""Commands that look after a store: `verify` and `status`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from distributed_stiffness.cli.ending import FAILED, interruptible
from distributed_stiffness.cli.fields import run_fields
from distributed_stiffness.cli.options import (
    ENGINES,
    AsJson,
    CheckpointFolder,
    DataDir,
    Download,
    StorePath,
    choice,
)
from distributed_stiffness.cli.work import checked_run, say, say_json
from distributed_stiffness.progress import Progress


def verify(
    store: StorePath,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what is wrong and compute it again.")
    ] = False,
    as_json: AsJson = False,
    checkpoints: CheckpointFolder = None,
    data_dir: DataDir = None,
    download: Download = True,
    sample: Annotated[
        int, typer.Option(help="Examples of each chunk that are computed again.")
    ] = 3,
    engine: Annotated[str, choice(ENGINES, "Of a repair; serial: in this process alone.")] = "ray",
    address: Annotated[str | None, typer.Option(help="Of a repair: Ray cluster to join.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a repair: memory of a replica, such as 4GB.")
    ] = None,
) -> None:
    """Check every chunk of a store; repair what is wrong.

    All is read, its numbers are checked, and a sample of them is computed again. Exit code 0:
    nothing is wrong, or all was repaired; 1: something is.

    Example: stiffness verify results/demo.zarr --repair
    """
    options = locals()
    from distributed_stiffness.verify import verify_store

    chosen = checked_run(**run_fields(options))
    with interruptible(), Progress() as progress, contextlib.redirect_stdout(sys.stderr):
        found = verify_store(chosen, repair=repair, sample=sample, progress=progress)
    if as_json:
        say_json(found.to_json())
    else:
        say(found.lines())
    if not found.is_well:
        raise typer.Exit(FAILED)


def status(store: StorePath, as_json: AsJson = False) -> None:
    """Say how far a study is.

    What is done and what is missing, who computes what, time left. Reads only, so that it can be
    asked while the study runs.

    Example: stiffness status results/cifar100.zarr
    """
    from distributed_stiffness.engine.status import status as look

    found = look(store)
    if as_json:
        say_json(found.to_json())
    else:
        say(list(found.lines()))
