"""From somebody's checkpoints, network and data to their stiffness.

Checkpoints are copied, one at a time, into the study's own folder beside the store: after that it
is a study like any other, but that nothing is trained, and resuming, `status`, `verify` and the
error bound are there as ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun, state_hash
from distributed_stiffness.data.foreign import READERS
from distributed_stiffness.engine import Run, run_study
from distributed_stiffness.engine.prepare import Prepared
from distributed_stiffness.errors import CheckpointError, StudyError
from distributed_stiffness.factories import name_of
from distributed_stiffness.importing.content import read, stamp
from distributed_stiffness.importing.files import Paths, find
from distributed_stiffness.importing.places import Files, describe, grid, placed
from distributed_stiffness.importing.table import Table, from_table
from distributed_stiffness.importing.weights import fitted
from distributed_stiffness.models.foreign import HUGGING_FACE
from distributed_stiffness.paths import Location, local
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Study, build_study, training_identity
from distributed_stiffness.training import build_model


@dataclass(frozen=True)
class Imports:
    """A study of checkpoints that were trained elsewhere, and where they are."""

    study: Study
    files: Files
    prefix: str | None = None
    key: str | None = None

    def lines(self) -> list[str]:
        """Return the table of what was understood."""
        return describe(self.files)

    def bring(self, prepared: Prepared) -> None:
        """Copy the checkpoints that are not there yet into the study's folder.

        Raises:
            CheckpointError: one cannot be read, does not fit the network, or has changed since.
            StoreError: the folder cannot be written.
        """
        study, data, progress = prepared.study, prepared.data, prepared.progress
        identity = training_identity(study, content=data.training_hash)
        folder = Checkpoints(prepared.run.checkpoint_folder, identity=identity)
        phase = progress.phase("importing", len(self.files), "checkpoints")
        phase.begin()
        said = ""
        for place, path in self.files.items():
            run = TrainingRun(place.learning_rate, place.seed)
            how_read = {"prefix": self.prefix} | ({"key": self.key} if self.key else {})
            source = json.dumps({"stamp": stamp(path)} | how_read)
            there = folder.source(run, place.iteration)
            if there != source:
                # Anew for each: what one checkpoint lacks is not left from another.
                network = build_model(study, data, study.training.seeds[0])
                weights, how = fitted(read(path, self.key), network, path, self.prefix)
                if how not in ("", said):
                    said = how
                    progress.say(f"{path}: {how}")
                if there is None:
                    folder.put(run, place.iteration, weights, source)
                elif state_hash(weights) != folder.load_weights(run, place.iteration).sha256:
                    raise CheckpointError(
                        f"{path} has other weights than when it was imported to"
                        f" {folder.path(run, place.iteration)}: give another --store, or the file"
                        " that it was"
                    )
            phase.advance()
        phase.close()


def gather(
    model: str | Callable[..., Any],
    data: str | Callable[..., Any],
    checkpoints: Paths | None = None,
    *,
    pattern: str | None = None,
    table: Table | None = None,
    iterations: Sequence[int] | None = None,
    prefix: str | None = None,
    key: str | None = None,
    loss: str | Callable[..., Any] = "cross_entropy",
    examples: int | None = None,
    train_examples: int = 0,
    sample_seed: int = 0,
    standardise: bool = False,
    unit_norm: bool = False,
    accept_unverified: bool = False,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    tile: int | None = None,
    keep: str = "pairs",
    distance_bins: int = 50,
    title: str | None = None,
) -> Imports:
    """Find the checkpoints, place them, and describe the study; arguments: `measure_checkpoints`.

    Raises:
        CheckpointError: they cannot be found or placed, or leave holes in the grid.
        StudyError: a setting does not fit.
    """
    model, data = _settled(name_of(model, "model")), _settled(name_of(data, "data"))
    loss = name_of(loss, "loss")
    files = grid(_files(model, checkpoints, pattern, table), iterations)
    fields = {
        "title": title or f"{model} on {data}",
        "data": {
            "name": data,
            "options": dict(data_options or {}),
            "validation_examples": examples,
            "train_examples": train_examples,
            "sample_seed": sample_seed,
            "standardise": standardise,
            "unit_norm": unit_norm,
            "accept_unverified": accept_unverified,
        },
        "model": {"name": model, "options": dict(model_options or {})},
        "training": {
            "imported": True,
            "learning_rates": sorted({place.learning_rate for place in files}),
            "seeds": sorted({place.seed for place in files}),
            "iterations": sorted({place.iteration for place in files}),
        },
        "gradients": {"parameters": parameters, "precision": precision, "tile": tile},
        "loss": loss,
        "keep": keep,
        "distance_bins": distance_bins,
    }
    return Imports(build_study(lambda: Study.model_validate(fields)), files, prefix, key)


def measure_checkpoints(
    model: str | Callable[..., Any],
    data: str | Callable[..., Any],
    checkpoints: Paths | None = None,
    *,
    store: Location | None = None,
    run: Run | None = None,
    progress: Progress | None = None,
    **choices: Any,
) -> str:
    """Compute the stiffness of networks that are trained already; return the store's path or URL.

    The same as `stiffness gram`. Run it again after any interruption: what is done is kept.

        measure_checkpoints(
            "nets:build", "data:validation", "runs/*/step-*.safetensors", store="out.zarr"
        )

    Args:
        model: `package.module:factory`, such a function itself, `torchvision:NAME`, `timm:NAME`,
            `hf:FOLDER`, or a name of this package's (`models.build`).
        data: `package.module:factory`, such a function itself (what it may return is said at
            `data.foreign.labelled`), `npz:FILE`, `images:FOLDER`, `hf:FOLDER`, or a name of this
            package's. Inputs are taken as they are.
        checkpoints: a path, a URL, a pattern such as `'runs/*/step-*.pt'`, or a list of these:
            files of safetensors, or of torch with a state dict; model folders of Hugging Face.
            None: the folder of an `hf:` model, or those of the table.
        store: path or URL of the results; None: that of `run`, else results/gram.zarr.
        run: where and how it is computed.
        progress: where it is shown.
        choices: by name, all optional:

            - `pattern`: how the paths end, such as `'lr{learning_rate}/step-{iteration}'`.
            - `table`: CSV file, DataFrame, or rows, with path, learning_rate, seed, iteration.
            - `iterations`: those that are looked at.
            - `prefix`: of the names in a state dict; found, where there is one choice.
            - `key`: under which the state dict is in its file, such as "ema" or "state.model".
            - `loss`: "cross_entropy", or a function (outputs, targets) -> (N,), or its name.
            - `examples`: how many, drawn with the classes in proportion; None: all.
            - `train_examples`: of a training split, put before them.
            - `sample_seed`: of the draw.
            - `standardise`, `unit_norm`: the package's own preprocessing, by a training split.
            - `accept_unverified`: read data files whose checksums are not the published ones.
            - `model_options`, `data_options`: keyword arguments of the factories.
            - `parameters`: glob patterns of the parameters in play.
            - `precision`, `tile`, `title`: as in a study.
            - `keep`: "pairs", or "sums" over each example's pairs in `distance_bins` bins.

    Raises:
        StiffnessError: whatever a user can mend, before costly work where that is possible.
    """
    run = _run_in(store, run)
    if progress is None:
        with Progress(quiet=run.quiet) as progress:
            return measure_checkpoints(
                model, data, checkpoints, run=run, progress=progress, **choices
            )
    imports = gather(model, data, checkpoints, **choices)
    for line in imports.lines():
        progress.say(line)
    return run_study(imports.study, run, progress, bring=imports.bring)


def _run_in(store: Location | None, run: Run | None) -> Run:
    """Return the run, in the store that is named beside it.

    Raises:
        StudyError: the run has another.
    """
    if run is None:
        return Run(store=store or "results/gram.zarr")
    if store is None:
        return run
    chosen = replace(run, store=store)
    if chosen.store_url != run.store_url != Run().store_url:
        raise StudyError(
            f"the store is {chosen.store_url}, and the run's is {run.store_url}: name it once"
        )
    return chosen


def _settled(name: str) -> str:
    """Return a name that holds a path with that path absolute: replicas may work elsewhere.

    But not in a job's copy of the working folder, which every node has, each time at another place.
    """
    kind, _, path = name.partition(":")
    if kind not in (*READERS, HUGGING_FACE.rstrip(":")) or "_ray_pkg_" in str(Path.cwd()):
        return name
    return f"{kind}:{local(path, f'the place of {kind}:')}"


def _files(
    model: str, checkpoints: Paths | None, pattern: str | None, table: Table | None
) -> Files:
    if table is not None:
        if checkpoints is not None or pattern is not None:
            raise CheckpointError(
                "a table names the checkpoints and their places: leave --checkpoints and --pattern"
                " out"
            )
        return from_table(table)
    if checkpoints is None:
        if not model.startswith(HUGGING_FACE):
            raise CheckpointError(
                "no checkpoints are named: give --checkpoints 'runs/*/step-*.safetensors', or a"
                " --table of them"
            )
        checkpoints = model.removeprefix(HUGGING_FACE)
    return placed(find(checkpoints), pattern)
