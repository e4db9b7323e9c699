"""Before the work: load, check, plan, lay out. Everything that can be refused is refused here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.engine.job import Job
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prediction import Speed
from distributed_stiffness.engine.speed import measure, measure_checks
from distributed_stiffness.engine.sums import Folding, bin_edges, bytes_of_sums
from distributed_stiffness.errors import StoreError, StudyError
from distributed_stiffness.factories import import_loss
from distributed_stiffness.gradients.batches import Nest, from_numpy
from distributed_stiffness.gradients.budget import fit
from distributed_stiffness.gradients.evidence import ALL_ZERO, EXAMPLES
from distributed_stiffness.gradients.from_evidence import gradients_of_evidence
from distributed_stiffness.gradients.passes import modules_of, slow_gradients
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.precision import precision_mode
from distributed_stiffness.gradients.self_check import check_gradients
from distributed_stiffness.gradients.surroundings import undisturbed
from distributed_stiffness.models import check_outputs
from distributed_stiffness.paths import Location, is_url, located, require_writable
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import (
    create_or_continue,
    refuse_another_study,
    stored_plan,
    stored_tile,
)
from distributed_stiffness.study import Study, named_values
from distributed_stiffness.tiling import default_tile_of_sums
from distributed_stiffness.training import build_model

# Places that are read as a whole, or not written at all.
_NOT_WRITTEN = frozenset({"zip", "tar", "libarchive", "http", "https", "data", "git", "github"})


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how a study is computed; nothing here changes a number beyond the error bound.

    Places may be given as text or as any path; they are kept absolute, since a replica may have
    another working directory (`paths.located`).

    Raises:
        StudyError: one is no path and no URL.
    """

    store: Location = "results/study.zarr"
    checkpoints: Location | None = None  # None: beside the store
    data_directory: Location | None = None
    download: bool = True
    engine: Literal["ray", "serial"] = "ray"
    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, else a local one is started
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_replicas: int | None = None  # None: as many as the cluster holds
    threads: int | None = None  # of a CPU replica; None: a quarter of the smallest node's cores
    memory: int | None = None  # bytes a replica may use; None: its share of the node's
    rows: tuple[int, int] | None = None  # of the matrices, first and last + 1; None: all
    wait_for_nodes: float | None = None  # seconds; None: only when an autoscaler can help
    allow_error: bool = False  # keep numbers though their error bound is above what is allowed
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("store", "checkpoints", "data_directory"):
            given = getattr(self, name)
            if given is not None or name == "store":
                object.__setattr__(self, name, located(given, name.replace("_", " ")))

    @classmethod
    def of(cls, run: Run | Location) -> Run:
        """Return a run as it is, and one of a store that is given by its place alone."""
        return run if isinstance(run, Run) else cls(store=run)

    @property
    def store_url(self) -> str:
        """Absolute path or URL of the store."""
        return str(self.store)

    @property
    def checkpoint_folder(self) -> str:
        """Where checkpoints go: STORE without .zarr, plus .checkpoints."""
        return str(self.checkpoints or f"{self.store_url.removesuffix('.zarr')}.checkpoints")

    def require_writable(self) -> None:
        """Refuse places of this machine that cannot be written, now and not after hours of work.

        Raises:
            StoreError: the store, its checkpoints or the folder of either cannot be written.
        """
        places = {
            "the store": (self.store_url, "give another --store"),
            "checkpoints": (self.checkpoint_folder, "give another --checkpoints, or --store"),
        }
        for what, (place, remedy) in places.items():
            if _NOT_WRITTEN & {part.partition("://")[0] for part in place.split("::")}:
                raise StoreError(
                    f"{what} is {place}, where chunks cannot be written side by side: expected a"
                    f" folder, or a bucket such as s3://name/path; {remedy}"
                )
            if not is_url(place):
                for folder in (Path(place), Path(place).parent):
                    require_writable(folder, what, remedy, StoreError)


@dataclass(frozen=True)
class Prepared:
    """A study whose data, network and gradients have been looked at."""

    study: Study  # its iterations written out
    data: StudyData
    gradients: PerExampleGradients
    run: Run
    progress: Progress
    noted: frozenset[str] = frozenset()  # modules of which was said that their gradients are slow

    def job(self, lease: Lease, *, memory: int, device: str) -> Job:
        """Plan for replicas of `memory` bytes, and lay the store out or take it up again.

        Raises:
            StudyError: it does not fit.
            StoreError: the store belongs to another study, or cannot be written.
        """
        precision_mode(self.study.gradients.precision, device)  # some need a GPU
        url, plan = self.run.store_url, self.plan(memory, device)
        rows = self._row_chunks(plan)
        self.progress.say(plan.describe())
        return Job(
            self.study,
            self.data,
            plan,
            create_or_continue(url, self.study, self.data, plan, self._edges),
            self.run.checkpoint_folder,
            self.progress,
            lease,
            device=device,
            rows=rows,
            noted=set(self.noted),
        )

    @property
    def _edges(self) -> Callable[[], np.ndarray] | None:
        """What returns the edges of the distance bins, where sums are kept in them."""
        if self.study.keep == "pairs":
            return None
        return functools.partial(bin_edges, self.data, self.study.distance_bins)

    def _row_chunks(self, plan: Plan) -> range | None:
        if self.run.rows is None:
            return None
        first, last = self.run.rows
        if not 0 <= first < last <= plan.n_examples:
            raise StudyError(
                f"rows {first}:{last} are not in the matrix: expected FIRST:LAST with"
                f" 0 <= FIRST < LAST <= {plan.n_examples}"
            )
        return plan.tiling.chunks(first, last)

    def speed(self, plan: Plan) -> Speed:
        """Measure how fast this process makes tiles and checks.

        Gradients in float64 too, so that their cost is known before they are chosen.
        """
        examples = _examples(self.data, slice(0, min(plan.batch, plan.n_examples)))
        folding = None if self._edges is None else Folding(self.data, self._edges())
        gradients = self.gradients.with_factored(plan.factored)
        speed = measure(gradients, examples, plan, folding)
        labels = np.array(self.data.examples.labels)
        speed = replace(speed, checks=measure_checks(gradients, examples, plan, labels, speed))
        if self.study.gradients.precision == "float64":
            return speed
        exact = gradients.in_float64
        return replace(speed, exact=measure(exact, examples, plan, folding))

    def plan(self, memory: int, device: str) -> Plan:
        """Fit the tiles into replicas of `memory` bytes; a store that is there keeps its plan.

        Raises:
            StudyError: it does not fit.
        """
        study, url = self.study, self.run.store_url
        tile = study.gradients.tile or stored_tile(url)
        if study.keep == "sums" and tile is None:
            tile = default_tile_of_sums(self.data.n_examples)
        _, plan = fit(
            self.gradients,
            n_examples=self.data.n_examples,
            n_checkpoints=math.prod(self.study.shape),
            memory=memory,
            tile=tile,
            device=device,
        )
        if study.keep == "sums":
            plan = replace(plan, sums_bytes=bytes_of_sums(self.data, study.distance_bins))
        return stored_plan(url, replace(plan, allow_error=self.run.allow_error))


def prepare(study: Study, run: Run, progress: Progress) -> Prepared:
    """Load the data, build the network, and check its gradients on a few examples.

    Raises:
        StiffnessError: whatever of these a user can mend.
    """
    if run.engine == "serial" and run.device == "cuda" and not torch.cuda.is_available():
        raise StudyError("device is cuda, but this machine has none: give --device cpu")
    if run.memory is not None and run.memory <= 0:
        raise StudyError(f"memory is {run.memory} bytes: expected more than 0, such as 4GB")
    data = select(
        study.data,
        directory=run.data_directory,
        download=run.download,
        every_class=not study.training.imported,
        progress=progress,
    )
    if not data.n_train and not study.training.imported:
        raise StudyError(
            f"{data.labelled.name} has no training split to train on; for networks that are trained"
            " already, use `stiffness gram`"
        )
    study = study.resolved(data.n_train)
    refuse_another_study(run.store_url, study, data, tile=study.gradients.tile)
    progress.say(_described(study, data))
    gradients, notes = _checked(study, data, progress)
    noted = frozenset(map(modules_of, notes))
    return Prepared(study, data, gradients, run, progress, noted)


def _described(study: Study, data: StudyData) -> str:
    """One line: what is run."""
    parts = [f"{data.n_examples:,} examples of {data.labelled.name}", study.model.name]
    parts += [named_values(name, *values) for name, values in study.given().items()]
    return f"study: {', '.join(parts)}"


def _checked(
    study: Study, data: StudyData, progress: Progress
) -> tuple[PerExampleGradients, list[str]]:
    """Try the network on a few examples, then its gradients against the definition."""
    if data.n_examples < 2:
        raise StudyError(f"{data.n_examples} example has no pairs: give 2 or more")
    model = build_model(study, data, study.training.seeds[0])
    inputs, _ = _examples(data, slice(0, EXAMPLES))
    loss, name = import_loss(study.loss), study.model.name
    # A network of others may know more classes than the examples have.
    exactly = not study.training.imported
    check_outputs(model, inputs, data.labelled.n_classes, name, loss=loss, exactly=exactly)
    precision = study.gradients.precision
    with undisturbed(), slow_gradients() as notes:
        gradients, evidence = gradients_of_evidence(
            model.eval(),
            loss,
            lambda some: _examples(data, some),
            data.n_examples,
            parameters=study.gradients.parameters,
            # On this process's CPU; what needs a GPU has rows like float32's.
            precision="float32" if precision_mode(precision).cuda_only else precision,
        )
        check_gradients(gradients, *_examples(data, evidence.places))
    for note in (*dict.fromkeys(notes), *([ALL_ZERO] if evidence.is_zero else [])):
        progress.say(f"note: {note}")
    progress.say(
        f"self-check: {gradients.n_parameters:,} parameters, {len(evidence.places)} examples agree"
        f" with one-example float64 autograd{_unused(gradients)}"
    )
    return gradients, notes


def _examples(data: StudyData, chosen: slice | np.ndarray) -> tuple[Nest, torch.Tensor]:
    return from_numpy(data.inputs(chosen)), torch.from_numpy(data.examples.labels[chosen].copy())


def _unused(gradients: PerExampleGradients) -> str:
    unused = gradients.recipe.unused
    return f"; without a gradient: {', '.join(unused)}" if unused else ""
