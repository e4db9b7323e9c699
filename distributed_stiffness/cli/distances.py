"""The command that adds distances to a store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from distributed_stiffness.cli.ending import interruptible
from distributed_stiffness.cli.options import (
    AsJson,
    CheckpointFolder,
    DataDir,
    Download,
    StorePath,
)
from distributed_stiffness.cli.work import checked_run, say, say_json
from distributed_stiffness.errors import StudyError
from distributed_stiffness.progress import Progress


def distances(
    store: StorePath,
    wanted: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of euclidean (of the inputs), latent:LAYER, latent:LAYER:euclidean, and"
            " NAME=package.module:function for your own, of the inputs of some examples and of some"
            " others; without any, those that the store has are listed."
        ),
    ] = None,
    checkpoints: CheckpointFolder = None,
    data_dir: DataDir = None,
    download: Download = True,
    as_json: AsJson = False,
) -> None:
    """Add distances between the examples to a store.

    Profiles and critical lengths can then be drawn over them. What is there is not computed again.
    LAYER is a module of the network by its name; a name that does not exist lists them.

    Example: stiffness distances results/mnist.zarr latent:6 && stiffness plot results/mnist.zarr
    distance_profile --distance distance_latent_6
    """
    from distributed_stiffness.engine import add_distances
    from distributed_stiffness.report.present import distances_in

    if wanted:
        run = checked_run(
            store=store, checkpoints=checkpoints, data_directory=data_dir, download=download
        )
        own = {name: of for name, equals, of in (w.partition("=") for w in wanted) if equals}
        with interruptible(), Progress() as progress:
            add_distances(
                run,
                [w for w in wanted if "=" not in w],
                own={name: _function(name, of) for name, of in own.items()},
                progress=progress,
            )
    found = distances_in(store)
    if as_json:
        say_json({"store": store, "distances": found})
    else:
        say([f"{name}: {meaning}" for name, meaning in found.items()])


def _function(name: str, of: str) -> Any:
    from distributed_stiffness.factories import import_factory

    return import_factory(of, f"distance {name}", StudyError)
