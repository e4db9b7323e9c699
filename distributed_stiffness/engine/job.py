"""What is left of a study, and what each event means: shared by every engine.

A job holds no numbers. It reads from the store what is missing, hands tasks to the scheduler as
their checkpoints appear, and keeps the books: progress, failures, what to say at the end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.replica import Receipt
from distributed_stiffness.engine.scheduler import Assignment, Scheduler
from distributed_stiffness.errors import GradientError, StiffnessError, StoreError
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import Store, now, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, Task, tasks
from distributed_stiffness.training import TrainingEvent


class StudyFailed(StiffnessError, RuntimeError):
    """A part of a study could not be computed; the rest is in the store."""


@dataclass
class Job:
    """One run of a study on its store."""

    study: Study
    data: StudyData
    plan: Plan
    store: Store
    checkpoints: str
    progress: Progress
    device: str = "cpu"
    threads: int | None = None
    scheduler: Scheduler = field(default_factory=Scheduler)
    failures: list[str] = field(default_factory=list)
    peak_memory: int = 0

    def __post_init__(self) -> None:
        self._contents = self.store.contents()
        self._left: Counter[Checkpoint] = Counter()  # tile tasks to do before the check
        self._steps = dict.fromkeys(self._runs(), 0)
        self._folder = Checkpoints(self.checkpoints)
        self._weights = dict(self.store.attrs["weights"])
        self._training = self.progress.phase(
            "training",
            len(self._steps) * self.study.iterations[-1],
            "steps",
            done=self._steps_there(),
        )
        self._tiles = self.progress.phase(
            "tiles", self._tiles_wanted(), "tiles", done=self._tiles_there()
        )
        self.scheduler.add(self._tasks("distance", None))
        for checkpoint in self._all_checkpoints():
            run, iteration = training_run(self.study, checkpoint)
            if not self._is_complete(checkpoint) and self._folder.exists(run, iteration):
                self._checkpoint_ready(checkpoint)

    # What is left

    def runs_to_train(self) -> list[TrainingRun]:
        """Return the runs with a checkpoint that is needed and not there."""
        needed: dict[TrainingRun, None] = {}
        for checkpoint in self._all_checkpoints():
            run, iteration = training_run(self.study, checkpoint)
            if not self._is_complete(checkpoint) and not self._folder.exists(run, iteration):
                needed[run] = None
        return list(needed)

    def assign(self) -> list[Assignment]:
        """Return what the replicas are to do next."""
        return self.scheduler.assign()

    # Events

    def training_event(self, event: TrainingEvent) -> None:
        """A run took steps, or wrote a checkpoint."""
        self._steps[event.run] = event.step
        loss = f"{event.run}: loss {event.loss:.4g}" if event.step else f"{event.run}"
        self._training.update(max(self._training.done, sum(self._steps.values())), loss)
        if event.checkpoint is not None:
            checkpoint = self._checkpoint_of(event.run, event.checkpoint)
            if not self._is_complete(checkpoint):
                self._checkpoint_ready(checkpoint)

    def training_failed(self, run: TrainingRun, error: BaseException) -> None:
        """A run ended early: its checkpoints so far are used, the study goes on."""
        if isinstance(error, StoreError):
            raise error
        self.failures.append(f"training ({run}): {error}")

    def task_done(self, replica: str, receipt: Receipt) -> None:
        """A replica finished a task."""
        self.peak_memory = max(self.peak_memory, receipt.peak_memory)
        task = receipt.task
        if not self.scheduler.task_done(replica, task):
            return
        if task.kind != "check":
            self._tiles.advance(task.n_tiles, f"peak memory {receipt.peak_memory / 1e9:.2f} GB")
        if task.kind == "pairs" and task.checkpoint is not None:
            self._left[task.checkpoint] -= 1
            self._add_check_if_due(task.checkpoint)

    def task_failed(self, replica: str, task: Task, error: BaseException) -> None:
        """A task raised: a broken checkpoint is left out, a broken store ends the run.

        Raises:
            StoreError: nothing can be written; going on would only fail again.
        """
        if isinstance(error, StoreError):
            raise error
        if isinstance(error, GradientError):
            # The checkpoint is at fault, not the replica: none of its tasks can succeed.
            self.scheduler.give_up(task, str(error))
            self.scheduler.task_failed(replica, task, str(error))
            for other in self._tasks("pairs", task.checkpoint):
                if other not in self.scheduler.done:
                    self.scheduler.give_up(other, str(error))
            return
        self.scheduler.task_failed(replica, task, f"{type(error).__name__}: {error}")

    def finish(self) -> None:
        """Close the books: say that the store is complete, or what is missing and why.

        Raises:
            StudyFailed: something could not be computed; all else is in the store.
        """
        self._tiles.close()
        self._training.close()
        self.failures += sorted(
            {f"{self._name(task)}: {error}" for task, error in self.scheduler.set_aside.items()}
        )
        if self.failures:
            raise StudyFailed(
                "the study is not complete; what could be computed is in "
                + f"{self.store.url}. Not computed:\n  "
                + "\n  ".join(self.failures)
            )
        if "finished" not in self.store.attrs:
            self.store.set_attrs(finished=now())

    # Checkpoints

    def _checkpoint_ready(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: its weights' hash and metrics go to the store, its tasks wait."""
        run, iteration = training_run(self.study, checkpoint)
        weights = self._folder.load_weights(run, iteration)
        place = f"{run.learning_rate!r}/{run.seed}/{iteration}"
        known = self._weights.setdefault(place, weights.sha256)
        if known != weights.sha256:
            raise StoreError(
                f"{self.store.url} belongs to other weights: those of {run}, iteration"
                f" {iteration}, had SHA-256 {known[:12]}…, the checkpoint in {self.checkpoints} has"
                f" {weights.sha256[:12]}…. Give another --store, or the old checkpoints"
            )
        self.store.set_attrs(weights=self._weights)
        self.store.write_values(checkpoint, **weights.metrics)
        todo = self._tasks("pairs", checkpoint)
        self._left[checkpoint] = len(todo)
        self.scheduler.add(todo)
        self._add_check_if_due(checkpoint)

    def _add_check_if_due(self, checkpoint: Checkpoint) -> None:
        if self._left[checkpoint] == 0 and checkpoint not in self._contents.checked:
            self.scheduler.add([Task("check", checkpoint)])

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
        )

    def _is_complete(self, checkpoint: Checkpoint) -> bool:
        there = self._contents.tiles.get(checkpoint, ())
        return len(there) == self.plan.tiling.n_chunks**2 and checkpoint in self._contents.checked

    def _all_checkpoints(self) -> list[Checkpoint]:
        """Early iterations first: training writes them first."""
        training = self.study.training
        return [
            Checkpoint(rate, seed, iteration)
            for iteration in range(len(self.study.iterations))
            for rate in range(len(training.learning_rates))
            for seed in range(len(training.seeds))
        ]

    def _checkpoint_of(self, run: TrainingRun, iteration: int) -> Checkpoint:
        training = self.study.training
        return Checkpoint(
            training.learning_rates.index(run.learning_rate),
            training.seeds.index(run.seed),
            self.study.iterations.index(iteration),
        )

    def _runs(self) -> list[TrainingRun]:
        training = self.study.training
        return [TrainingRun(r, s) for r in training.learning_rates for s in training.seeds]

    # Books

    def _tiles_wanted(self) -> int:
        return self.plan.tiling.n_chunks**2 * (len(self._all_checkpoints()) + 1)

    def _tiles_there(self) -> int:
        matrices = [self._contents.distance, *self._contents.tiles.values()]
        return sum(len(tiles) for tiles in matrices)

    def _steps_there(self) -> int:
        for run in self._steps:
            self._steps[run] = max(self._folder.iterations(run), default=0)
        return sum(self._steps.values())

    def _name(self, task: Task) -> str:
        if task.checkpoint is None:
            return "distances"
        run, iteration = training_run(self.study, task.checkpoint)
        return f"{run}, iteration {iteration}"
