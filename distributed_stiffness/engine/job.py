"""What is left of a study, and what each event means: shared by every engine.

A job holds no numbers. It reads from the store what is missing, hands tasks to the scheduler as
their checkpoints appear, and keeps the books: progress, failures, what to say at the end.
"""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distributed_stiffness.certainty import allowed_error
from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.bounds import Bound, describe_bounds
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prediction import Prediction, Speed, predict
from distributed_stiffness.engine.replica import Receipt
from distributed_stiffness.engine.scheduler import Assignment, Scheduler
from distributed_stiffness.engine.whole_matrix import ClassMeans, is_checked_whole
from distributed_stiffness.errors import GradientError, StiffnessError, StoreError
from distributed_stiffness.gradients.passes import modules_of
from distributed_stiffness.plan import Plan, in_words
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import WHOLE_MATRIX_CHECK, Store, now, training_run, weights_key
from distributed_stiffness.study import Study, training_identity
from distributed_stiffness.tiling import Checkpoint, Task, all_checkpoints, tasks
from distributed_stiffness.training import TrainingEvent


class StudyFailed(StiffnessError, RuntimeError):
    """A part of a study could not be computed; the rest is in the store."""


@dataclass
class _Totals:
    """What all tasks of this run took."""

    tile_seconds: float = 0.0
    check_seconds: float = 0.0
    making_seconds: float = 0.0
    write_seconds: float = 0.0
    operations: float = 0.0
    gradients: int = 0
    bytes_written: int = 0
    retries: int = 0
    peak_memory: int = 0

    def add(self, receipt: Receipt, plan: Plan) -> None:
        """Count what a task took."""
        if receipt.task.kind == "check":
            self.check_seconds += receipt.seconds
        else:
            self.tile_seconds += receipt.seconds
        self.making_seconds += receipt.making_seconds
        self.write_seconds += receipt.write_seconds
        self.bytes_written += receipt.bytes_written
        self.retries += receipt.retries
        self.peak_memory = max(self.peak_memory, receipt.peak_memory)
        self.gradients += receipt.gradients
        self.operations += receipt.operations(plan)

    def describe(self, predicted: Prediction | None) -> str:
        """One line for people; beside it what was predicted."""
        seconds = operations = checks = ""
        if predicted is not None and predicted.tile_seconds is not None:
            seconds = f" (predicted: {predicted.tile_seconds:.3g} s)"
            operations = f" (predicted: {predicted.operations:.2g})"
        if predicted is not None and predicted.check_seconds is not None:
            checks = f" (predicted: {predicted.check_seconds:.3g} s)"
        again = f"; {self.retries} requests to the store were made again" if self.retries else ""
        return (
            f"replicas worked {self.tile_seconds:.3g} s on tiles{seconds}:"
            f" {self.making_seconds:.3g} s of it making {self.gradients:,} gradients,"
            f" {self.write_seconds:.3g} s writing {in_words(self.bytes_written)},"
            f" {self.operations:.2g} floating-point operations{operations}; and"
            f" {self.check_seconds:.3g} s on checks{checks}; peak memory"
            f" {in_words(self.peak_memory)} each{again}"
        )


@dataclass
class Job:
    """One run of a study on its store."""

    study: Study
    data: StudyData
    plan: Plan
    store: Store
    checkpoints: str
    progress: Progress
    lease: Lease
    device: str = "cpu"
    rows: range | None = None  # row chunks that are wanted; None: all
    scheduler: Scheduler = field(default_factory=Scheduler)
    failures: list[str] = field(default_factory=list)
    noted: set[str] = field(default_factory=set)  # modules of which was said that they are slow

    def __post_init__(self) -> None:
        self._look()
        self._left: Counter[Checkpoint] = Counter()  # tiles to do before the check
        identity = training_identity(self.study, content=self.data.training_hash)
        self.folder = Checkpoints(self.checkpoints, identity=identity)
        self._taken_up: set[Checkpoint] = set()
        self._totals = _Totals()
        self._prediction: Prediction | None = None
        self._published = 0.0
        self._weights = dict(self.store.attrs["weights"])
        self._steps = {run: self._last_step(run) for run in self._runs()}
        imported = self.study.training.imported
        training = Progress(quiet=True) if imported else self.progress
        self._training = training.phase(
            "training",
            len(self._steps) * self.study.iterations[-1],
            "steps",
            done=sum(self._steps.values()),
        )
        self._tiles = self.progress.phase(
            "tiles", self._tiles_wanted(), "tiles", done=self._tiles_there()
        )
        self._checks = self.progress.phase(
            "checks",
            self.plan.n_checkpoints,
            "checkpoints",
            done=len(self._checked),
        )
        self._require_same_weights()
        self.scheduler.add(self._tasks("distance", None))
        self._take_up_checkpoints()

    # What is left

    def runs_to_train(self) -> list[TrainingRun]:
        """Return the runs with a checkpoint that is needed and not there.

        Raises:
            StoreError: it was imported, so that nobody here can make it again.
        """
        needed = dict.fromkeys(
            training_run(self.study, checkpoint)[0]
            for checkpoint in self._all_checkpoints()
            if checkpoint not in self._taken_up and not self._is_complete(checkpoint)
        )
        if needed and self.study.training.imported:
            raise StoreError(
                f"imported checkpoints are not in {self.checkpoints}: of"
                f" {'; '.join(map(str, needed))}. Run the same `stiffness gram` command: it imports"
                " them from the files that they were"
            )
        return list(needed)

    def assign(self) -> list[Assignment]:
        """Return what the replicas are to do next.

        Raises:
            StoreError: another run has taken the store over.
        """
        self.lease.require()
        found = self.scheduler.assign(time.monotonic())
        for assignment in found:
            (self._checks if assignment.task.kind == "check" else self._tiles).begin()
        self._publish()
        return found

    def measured(self, speed: Speed, replicas: int) -> None:
        """Say what the rest will take, now that a replica's speed is known."""
        left = 1 - self._tiles.done / max(1, self._tiles.total)
        if left > 0:
            unchecked = self.plan.n_checkpoints - self._checks.done
            self._prediction = predict(
                self.plan, replicas=replicas, speed=speed, left=left, unchecked=int(unchecked)
            )
            self.progress.say(self._prediction.describe())

    # Events

    def training_event(self, event: TrainingEvent) -> None:
        """A run took steps, or wrote a checkpoint."""
        self._training.begin()
        self._steps[event.run] = event.step
        known = not math.isnan(event.loss)
        loss = f"{event.run}: loss {event.loss:.4g}" if known else f"{event.run}"
        self._training.update(max(self._training.done, sum(self._steps.values())), loss)
        if event.checkpoint is not None:
            self._take_up_checkpoints(event.run)

    def training_ended(self, run: TrainingRun, error: BaseException | None = None) -> None:
        """A run ended, early if there is an error: the checkpoints that it left are used."""
        if isinstance(error, StoreError):
            raise error
        # An event may be lost with the process that sent it; what is on disk counts.
        self._take_up_checkpoints(run)
        if error is not None:
            self.failures.append(f"training ({run}): {_in_words(error)}")

    def task_done(self, replica: str, receipt: Receipt) -> None:
        """A replica finished a task."""
        self._totals.add(receipt, self.plan)
        if receipt.memory < self.plan.memory:
            self.shrink(f"{replica} ran out of memory", to=receipt.memory)
        task = receipt.task
        for note in receipt.notes:
            if modules_of(note) not in self.noted:
                self.progress.say(f"note: {note}")
            self.noted.add(modules_of(note))
        if not self.scheduler.task_done(replica, task, receipt.seconds):
            return
        if receipt.class_means is not None and task.checkpoint is not None:
            self._say_checked_whole(task.checkpoint, receipt.class_means)
        if task.kind == "check":
            self._checks.advance()
        else:
            self._tiles.advance(task.n_tiles, f"peak memory {receipt.peak_memory / 1e9:.2f} GB")
        if task.kind == "pairs" and task.checkpoint is not None:
            self._left[task.checkpoint] -= task.size
            self._add_check_if_due(task.checkpoint)

    def shrink(self, why: str, *, to: int | None = None) -> None:
        """Halve the blocks of replicas to come, and remember it in the store.

        Raises:
            StudyError: they are the smallest already.
        """
        to = self.plan.memory // 2 if to is None else to
        while self.plan.memory > to:
            self.plan = self.plan.halved()
        self.store.set_attrs(plan=self.plan.to_json())
        self.progress.say(f"{why}: going on with {in_words(self.plan.memory)} a replica")

    def task_failed(self, replica: str, task: Task, error: BaseException) -> None:
        """A task raised: a broken checkpoint is left out, a broken store ends the run.

        Raises:
            StoreError: nothing can be written; going on would only fail again.
        """
        if isinstance(error, StoreError):
            raise error
        if isinstance(error, GradientError):
            # The checkpoint is at fault, not the replica: none of its tasks can succeed.
            for other in self.scheduler.open_tasks(task.checkpoint) if task.checkpoint else [task]:
                self.scheduler.give_up(other, str(error))
        self.scheduler.task_failed(replica, task, _in_words(error))

    def finish(self) -> None:
        """Close the books: say that the store is complete, or what is missing and why.

        Raises:
            StudyFailed: something could not be computed; all else is in the store.
        """
        for phase in (self._training, self._tiles, self._checks):
            phase.close()
        if self._totals.tile_seconds or self._totals.check_seconds:
            self.progress.say(self._totals.describe(self._prediction))
        self.failures += sorted(
            {f"{self._name(task)}: {error}" for task, error in self.scheduler.set_aside.items()}
        )
        self._look()
        if not self.failures:
            self.failures = [
                f"{self._name(Task('check', checkpoint))}: not all in the store, for no known"
                " reason; run the same command again"
                for checkpoint in self._all_checkpoints()
                if not self._is_complete(checkpoint)
            ]
        if self.failures:
            raise StudyFailed(
                "the study is not complete; what could be computed is in "
                + f"{self.store.url}. Not computed:\n  "
                + "\n  ".join(self.failures)
            )
        if self.rows is not None:
            first, last = self.rows.start, self.rows.stop - 1
            of = self.plan.tiling.examples
            self.progress.say(
                f"rows {of(first).start} to {of(last).stop - 1} are there; the rest was not asked"
                " for. Run without --rows to complete the store"
            )
        else:
            if "finished" not in self.store.attrs:
                self.store.set_attrs(finished=now())
            bounds, allowed = self._bounds(), allowed_error(self.study.gradients.precision)
            self.progress.say(describe_bounds(bounds, self.plan.n_examples))
            above = [bound for bound in bounds if not bound.error <= allowed]
            if above:
                self.store.set_attrs(allow_error=True)
                self.progress.say(
                    f"WARNING: the error bound of {len(above)} of {len(bounds)} checkpoints is"
                    f" above the {allowed:g} that is allowed, and was let pass (--allow-error):"
                    " their cosines and signs are not certain"
                )

    def _bounds(self) -> list[Bound]:
        error, undecided = map(self.store.of_checkpoints, ("error_bound", "undecided"))
        places = {c: dataclasses.astuple(c) for c in self._all_checkpoints()}
        return [
            Bound(self._words(checkpoint), float(error[at]), int(undecided[at]))
            for checkpoint, at in places.items()
        ]

    # Checkpoints

    def _take_up_checkpoints(self, of: TrainingRun | None = None) -> None:
        """Hand out the tasks of every checkpoint that is on disk and lacks something.

        `of` one run where it has news: each look is a request where checkpoints are in a bucket.
        """
        for checkpoint in self._all_checkpoints():
            run, iteration = training_run(self.study, checkpoint)
            if of not in (None, run):
                continue
            if checkpoint in self._taken_up or self._is_complete(checkpoint):
                continue
            if self.folder.exists(run, iteration):
                self._taken_up.add(checkpoint)
                self._checkpoint_ready(checkpoint)

    def _look(self) -> None:
        """See what is there: the store is the only truth.

        A driver may die between the last number of a check and its own attribute: without that, the
        checkpoint that is checked as a whole counts as not checked.
        """
        self._contents = self.store.contents()
        said = self.store.attrs.get(WHOLE_MATRIX_CHECK, {})
        whole = self._place(self._all_checkpoints()[-1]).items() <= said.items()
        self._checked = {
            checkpoint
            for checkpoint in self._contents.checked
            if whole or not is_checked_whole(self.study, checkpoint)
        }

    def _say_checked_whole(self, checkpoint: Checkpoint, means: ClassMeans) -> None:
        said = self._place(checkpoint) | dataclasses.asdict(means)
        self.store.set_attrs(**{WHOLE_MATRIX_CHECK: said})
        self.progress.say(
            f"whole-matrix check of {self._words(checkpoint)}: the mean cosines of"
            f" {means.classes} classes are within {means.largest_difference:.1g} of those from"
            " sums of gradients"
        )

    def _checkpoint_ready(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: its weights' hash and metrics go to the store, its tasks wait."""
        run, iteration = training_run(self.study, checkpoint)
        weights = self.folder.load_weights(run, iteration)
        self._require_weights(run, iteration, weights.sha256)
        self.store.set_attrs(weights=self._weights)
        self.store.write_values(checkpoint, **weights.metrics)
        todo = self._tasks("pairs", checkpoint)
        self._left[checkpoint] = sum(task.size for task in todo)
        self.scheduler.add(todo)
        self._add_check_if_due(checkpoint)

    def _add_check_if_due(self, checkpoint: Checkpoint) -> None:
        whole = self.rows is None  # else there is nothing to draw a sample from
        if whole and self._left[checkpoint] == 0 and checkpoint not in self._checked:
            self.scheduler.add([Task("check", checkpoint)])

    def _require_same_weights(self) -> None:
        """Compare what complete checkpoints say of their weights with what the store says."""
        for checkpoint in self._all_checkpoints():
            if self._is_complete(checkpoint):
                run, iteration = training_run(self.study, checkpoint)
                said = self.folder.said_hash(run, iteration)
                if said is not None:
                    self._require_weights(run, iteration, said)

    def _require_weights(self, run: TrainingRun, iteration: int, sha256: str) -> None:
        """Note the hash of a checkpoint's weights.

        Raises:
            StoreError: the store's numbers are of others.
        """
        was = self._weights.setdefault(weights_key(run, iteration), sha256)
        if was != sha256:
            raise StoreError(
                f"{self.store.url} belongs to other weights: those of {run}, iteration"
                f" {iteration}, had SHA-256 {was[:12]}…, the checkpoint in {self.checkpoints} has"
                f" {sha256[:12]}…. Give another --store, or the old checkpoints"
            )

    def _tasks(self, kind: str, checkpoint: Checkpoint | None) -> list[Task]:
        done = (
            self._contents.distance
            if checkpoint is None
            else self._contents.tiles.get(checkpoint, ())
        )
        return tasks(
            "distance" if kind == "distance" else "pairs",
            checkpoint,
            self.plan.tiling,
            panel_chunks=self.plan.panel_chunks,
            done=done,
            rows=self.rows,
        )

    def _is_complete(self, checkpoint: Checkpoint) -> bool:
        if self.rows is not None:
            return not self._tasks("pairs", checkpoint)
        there = self._contents.tiles.get(checkpoint, ())
        return len(there) == self.plan.tiling.n_chunks**2 and checkpoint in self._checked

    def _all_checkpoints(self) -> list[Checkpoint]:
        return all_checkpoints(*self.study.shape)

    def _runs(self) -> list[TrainingRun]:
        training = self.study.training
        return [TrainingRun(r, s) for r in training.learning_rates for s in training.seeds]

    # Books

    def _publish(self) -> None:
        """Let `stiffness status` know, once a second at most."""
        if time.monotonic() - self._published < 1.0:
            return
        self._published = time.monotonic()
        phases = (self._training, self._tiles, self._checks)
        status: dict[str, Any] = {
            "phases": {
                phase.name: {
                    "done": phase.done,
                    "total": phase.total,
                    "unit": phase.unit,
                    "rate": phase.rate,
                }
                for phase in phases
            },
            "replicas": {
                name: [self._described(task) for task in tasks]
                for name, tasks in self.scheduler.replicas().items()
            },
            "failures": len(self.failures) + len(self.scheduler.set_aside),
        }
        self.lease.status = status

    def _described(self, task: Task) -> str:
        what = {"pairs": "tiles", "distance": "tiles", "check": "error bound"}[task.kind]
        where = f" rows {list(task.rows)} column {task.column}" if task.rows else ""
        return f"{self._name(task)}: {what}{where}"

    def _tiles_wanted(self) -> int:
        matrices = self.plan.n_checkpoints + (self.study.keep == "pairs")  # and the distances
        return self.plan.tiling.n_tiles(self.rows) * matrices

    def _tiles_there(self) -> int:
        missing = [self._tasks("distance", None)]
        missing += [self._tasks("pairs", checkpoint) for checkpoint in self._all_checkpoints()]
        return self._tiles_wanted() - sum(task.n_tiles for tasks in missing for task in tasks)

    def _last_step(self, run: TrainingRun) -> int:
        steps = self.folder.iterations(run) + self.folder.iterations(run, rolling=True)
        return min(max(steps, default=0), self.study.iterations[-1])

    def _name(self, task: Task) -> str:
        return "distances" if task.checkpoint is None else self._words(task.checkpoint)

    def _words(self, checkpoint: Checkpoint) -> str:
        return self.study.name_of(checkpoint)

    def _place(self, checkpoint: Checkpoint) -> dict[str, float]:
        run, iteration = training_run(self.study, checkpoint)
        return {"learning_rate": run.learning_rate, "seed": run.seed, "iteration": iteration}


def _in_words(error: BaseException) -> str:
    """Say what went wrong; for an error that nobody foresaw, with its traceback."""
    if isinstance(error, StiffnessError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()
