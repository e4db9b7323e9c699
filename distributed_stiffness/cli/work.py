"""What several commands do: check how to run, tell the cost, compute and present."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from distributed_stiffness.cli.ending import interruptible
from distributed_stiffness.cli.options import DEVICES, ENGINES
from distributed_stiffness.errors import StudyError
from distributed_stiffness.paths import Location, is_url, local, located, require_writable
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Study


def say(lines: list[str]) -> None:
    """Print lines to standard output; in red, on a terminal, what warns."""
    for line in lines:
        typer.secho(line, fg="red" if line.startswith("WARNING") else None)


def checked_run(**options: Any) -> Any:
    """Return how to run, an `engine.Run`.

    Raises:
        StudyError: an option has a value that does not exist.
    """
    from distributed_stiffness.engine import Run

    for name, allowed in (("engine", ENGINES), ("device", DEVICES)):
        if options.get(name, allowed[0]) not in allowed:
            raise StudyError(
                f"unknown {name} {options[name]!r}: expected one of {', '.join(allowed)}"
            )
    for name in ("max_replicas", "threads"):
        if options.get(name) is not None and options[name] < 1:
            raise StudyError(f"{name} is {options[name]}: expected 1 or more")
    return Run(**options)


def say_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to standard output."""
    typer.echo(json.dumps(value))


def show_plan(
    study: Study,
    chosen: Any,
    *,
    replicas: int,
    as_json: bool = False,
    device_rate: float | None = None,
) -> None:
    """Print what a study will cost; at an assumed rate of the replicas' devices too.

    Raises:
        StudyError: the rate is 0 or less, or something does not fit.
    """
    if device_rate is not None and not device_rate > 0:
        raise StudyError(
            f"the rate of a device is {device_rate:g} operations a second: expected more than 0,"
            " such as --device-rate 20e12"
        )
    from distributed_stiffness.engine.prediction import predict
    from distributed_stiffness.engine.prepare import prepare
    from distributed_stiffness.gradients.budget import free_memory

    with interruptible(), Progress(quiet=as_json) as progress:
        prepared = prepare(study, chosen, progress)
        made = prepared.plan(chosen.memory or free_memory() // replicas, "cpu")
        found = predict(made, replicas=replicas, speed=prepared.speed(made))
    hours = None if device_rate is None else found.at_rate(device_rate)
    if as_json:
        said = {"plan": made.to_json(), "prediction": found.to_json()}
        say_json(said if hours is None else said | {"device_hours": hours.to_json()})
    else:
        say([made.describe(), found.describe(), *([] if hours is None else [hours.describe()])])


def compute_or_plan(
    study: Study,
    chosen: Any,
    *,
    plan_only: bool,
    as_json: bool,
    folder: Location | None = None,
    bring: Callable[[Any], None] | None = None,
) -> None:
    """Compute a study, then draw its figures, write its report and print what they show.

    With `plan_only`, say what it will cost instead.
    """
    if plan_only:
        show_plan(study, chosen, replicas=chosen.max_replicas or 1, as_json=as_json)
        return
    from distributed_stiffness.engine import run_study
    from distributed_stiffness.report.present import presented

    folder = writable_folder(folder or beside(chosen.store), "--figures")
    with interruptible(), Progress(quiet=chosen.quiet) as progress:
        if "_ray_pkg_" in chosen.store_url:
            progress.say(
                f"note: the store {chosen.store_url} is in the job's scratch folder; give another"
                " path or a URL to keep it"
            )
        # What Ray and others print is no part of the answer.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            store = run_study(study, chosen, progress, bring=bring)
        if chosen.rows is not None:  # figures of a part would mislead
            if as_json:
                say_json({"store": store, "rows": chosen.rows})
            return
        shown = presented(store, folder, progress, data_directory=chosen.data_directory)
    if as_json:
        say_json(shown.to_json())
    else:
        say(shown.lines())


def beside(store: Location) -> Path:
    """Return the folder of a store's figures and report: STORE without .zarr; local."""
    name = located(store, "store")
    folder = name.removesuffix(".zarr") if name.endswith(".zarr") else f"{name}.report"
    return local(Path("results", folder.rpartition("/")[2]) if is_url(name) else folder, "figures")


def writable_folder(folder: Location, option: str) -> Path:
    """Return where figures and report go; refused now, and not after hours of work.

    Raises:
        StudyError: it cannot be written; says with which option another is named.
    """
    path = local(folder, "the folder of figures")
    require_writable(path, "figures", f"give another folder with {option}")
    return path
