"""The distributed engine: training runs as Ray tasks, replicas as Ray actors, one wait loop.

The only module of the package that imports ray. It adds placement and retries to `train` and
`Replica`, and nothing numeric. Numbers go from a replica to the store; what comes back here is a
receipt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

# Before ray is imported: a run reports nothing to anybody, and a task without GPUs sees none.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.exceptions
import ray.util.metrics
import torch
from ray.autoscaler.sdk import request_resources

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.job import Job
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.metrics import Metrics
from distributed_stiffness.engine.prediction import Speed
from distributed_stiffness.engine.prepare import Prepared, Run
from distributed_stiffness.engine.replica import Receipt, Replica
from distributed_stiffness.engine.resources import (
    Node,
    ReplicaShape,
    choose_shape,
    require_fit,
)
from distributed_stiffness.engine.scheduler import IN_FLIGHT
from distributed_stiffness.errors import ClusterError, StiffnessError
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Task
from distributed_stiffness.training import TrainingEvent, train

WAIT_SECONDS = 1.0  # the longest pause between two looks at the cluster
TILES_OF_A_REPLICA = 8  # that make it worth while to ask an autoscaler for one more
IDLE_SECONDS = 10.0  # a replica without work for so long is released while training goes on
PATIENCE_SECONDS = 20.0  # without anything that runs, before it is said what is waited for
MAX_LOST_REPLICAS = 20  # replicas that may die with no task done between
MAX_LOST_TRAININGS = 3  # times that one training run may lose its worker


def run_on_ray(prepared: Prepared, lease: Lease) -> None:
    """Compute a study on a Ray cluster, or on a local Ray that is started for it."""
    run, progress = prepared.run, prepared.progress
    with _session(run, prepared.data, progress):
        shape = _shape(run, progress)
        progress.say(shape.describe())
        job = prepared.job(lease, memory=shape.memory, device=shape.device)
        _Driver(job, shape, run.max_replicas).run_to_the_end()
        job.finish()


# What runs on the cluster


@ray.remote
class _ReplicaActor:
    """A `Replica` in a process of its own, with a thread for each task in flight."""

    def build(
        self,
        study: Study,
        data: StudyData,
        plan: Plan,
        store: str,
        checkpoints: str,
        shape: ReplicaShape,
        measure: bool,
    ) -> Speed | None:
        """Build the replica; not in __init__, whose errors Ray keeps to itself."""
        self.threads = shape.threads
        torch.set_num_threads(self.threads)
        self.replica = Replica(
            study, data, plan, store=store, checkpoints=checkpoints, device=shape.device
        )
        self.metrics = Metrics(ray.util.metrics.Counter, ray.util.metrics.Gauge)
        return self.replica.measure() if measure else None

    def run(self, task: Task) -> Receipt:
        """Compute a task."""
        torch.set_num_threads(self.threads)  # of this thread
        receipt = self.replica.run(task)
        self.metrics.count(receipt, self.replica.plan)
        return receipt


@ray.remote  # type: ignore[untyped-decorator]  # ray is not typed
def _train(
    study: Study,
    run: TrainingRun,
    data: StudyData,
    checkpoints: Checkpoints,
    shape: ReplicaShape,
) -> Iterator[TrainingEvent]:
    torch.set_num_threads(shape.threads)
    yield from train(study, run, data, checkpoints, device=shape.device)


@ray.remote  # type: ignore[untyped-decorator]
def _free_gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0]


# The driver


@dataclass
class _Actor:
    handle: Any
    ready: Any  # reference to its first answer
    idle_since: float = field(default_factory=time.monotonic)


class _Driver:
    """Starts what the job needs, waits for whatever comes, tells the job."""

    def __init__(self, job: Job, shape: ReplicaShape, max_replicas: int | None) -> None:
        self._job, self._shape, self._max_replicas = job, shape, max_replicas
        self._data = ray.put(job.data)
        self._actors: dict[str, _Actor] = {}
        self._running: dict[Any, tuple[str, Task]] = {}
        self._trainings: dict[Any, TrainingRun] = {}
        self._begun: set[Any] = set()  # trainings that have said something
        self._lost_trainings: Counter[TrainingRun] = Counter()
        self._lost_in_a_row = self._started = 0
        self._nothing_since = time.monotonic()
        self._speed: Speed | None = None

    def run_to_the_end(self) -> None:
        """Run until nothing is left that can be done."""
        try:
            # Training first: replicas need its checkpoints, and would hold its cores.
            for run in self._job.runs_to_train():
                self._start_training(run)
            while self._trainings or not self._job.scheduler.idle:
                self._adjust_replicas()
                for assignment in self._job.assign():
                    actor = self._actors[assignment.replica]
                    reference = actor.handle.run.remote(assignment.task)
                    self._running[reference] = assignment.replica, assignment.task
                self._wait()
        finally:
            for name in list(self._actors):
                self._release(name)
            for generator in self._trainings:
                ray.cancel(generator, force=True)

    # Waiting

    def _wait(self) -> None:
        starting = {a.ready: name for name, a in self._actors.items() if a.ready is not None}
        events = [*self._trainings, *self._running, *starting]
        self._say_what_is_waited_for(len(events))
        if not events:
            time.sleep(0.05)
            return
        ready, _ = ray.wait(events, timeout=WAIT_SECONDS, fetch_local=False)
        if ready:
            self._nothing_since = time.monotonic()
        for event in ready:
            if event in self._running:
                self._task_ended(event)
            elif event in starting:
                self._replica_answered(starting[event])
            else:
                self._training_went_on(event)

    def _say_what_is_waited_for(self, asked: int) -> None:
        """Where others hold the cluster, nothing starts: say so instead of standing still."""
        at_work = self._running or self._begun & set(self._trainings)
        if at_work or time.monotonic() - self._nothing_since < PATIENCE_SECONDS:
            return
        self._nothing_since = time.monotonic()
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        self._job.progress.say(
            f"waiting for room on the cluster: {asked} asked for, each {self._shape.resources()};"
            f" free in all: {free or 'nothing'}"
        )

    def _task_ended(self, reference: Any) -> None:
        name, task = self._running.pop(reference)
        try:
            receipt = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # what the task raised: the job decides
            self._job.task_failed(name, task, _cause(error))
        except ray.exceptions.RayError as error:  # the process, its node or its memory is gone
            self._replica_lost(name, error)
        else:
            self._lost_in_a_row = 0
            self._job.task_done(name, receipt)
        if name in self._actors:
            self._actors[name].idle_since = time.monotonic()

    def _replica_answered(self, name: str) -> None:
        actor = self._actors[name]
        try:
            speed = ray.get(actor.ready)
        except ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, StiffnessError):
                raise cause from error
            raise ClusterError(f"a replica cannot be built on its node: {error}") from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise ClusterError(f"a replica cannot be started on its node: {error}") from error
            self._replica_lost(name, error)
        else:
            actor.ready, actor.idle_since = None, time.monotonic()
            self._job.scheduler.replica_ready(name)
            if self._speed is None and speed is not None:
                self._speed = speed
                self._job.measured(speed, replicas=len(self._actors))

    def _training_went_on(self, generator: Any) -> None:
        run = self._trainings[generator]
        try:
            self._job.training_event(ray.get(next(generator)))
            self._begun.add(generator)
        except StopIteration:
            del self._trainings[generator]
            self._job.training_ended(run)
        except ray.exceptions.RayTaskError as error:
            del self._trainings[generator]
            self._job.training_ended(run, _cause(error))
        except ray.exceptions.RayError as error:
            del self._trainings[generator]
            self._training_lost(run, error)

    # Starting and losing

    def _start_training(self, run: TrainingRun) -> None:
        job = self._job
        generator = _train.options(
            num_returns="streaming", max_retries=0, **self._shape.resources()
        ).remote(job.study, run, self._data, job.folder, self._shape)
        self._trainings[generator] = run

    def _training_lost(self, run: TrainingRun, error: BaseException) -> None:
        self._lost_trainings[run] += 1
        if self._lost_trainings[run] > MAX_LOST_TRAININGS:
            self._job.training_ended(run, error)
            return
        self._job.progress.say(
            f"training ({run}): its worker died ({_first_line(error)}); going on from its last"
            " checkpoint"
        )
        self._start_training(run)

    def _adjust_replicas(self) -> None:
        """Ask for replicas while tasks wait; release those that others could use meanwhile."""
        scheduler = self._job.scheduler
        working = sum(bool(scheduler.tasks_of(name)) for name in self._actors)
        wanted = min(self._most_replicas(), working + scheduler.waiting)
        while len(self._actors) < wanted:
            self._start_replica()
        if scheduler.waiting == 0:
            # One for each task that runs stays: it takes a copy if the task is slow.
            running = sum(map(len, scheduler.replicas().values()))
            for name in self._idle()[running:]:
                self._release(name)

    def _idle(self) -> list[str]:
        """Replicas that have had nothing to do for a while."""
        now = time.monotonic()
        return [
            name
            for name, actor in self._actors.items()
            if actor.ready is None
            and not self._job.scheduler.tasks_of(name)
            and now - actor.idle_since > IDLE_SECONDS
        ]

    def _most_replicas(self) -> int:
        """As many as there is room for; more where they can come, and would find work."""
        if self._max_replicas is not None:
            return self._max_replicas
        fitting = sum(self._shape.fits_on(node) for node in nodes())
        if _autoscaler_helps():
            fitting = max(fitting, self._job.scheduler.waiting // TILES_OF_A_REPLICA)
        return max(1, fitting)

    def _start_replica(self) -> None:
        job = self._job
        self._started += 1
        name = f"replica-{self._started}"
        handle = _ReplicaActor.options(  # type: ignore[attr-defined]
            max_restarts=0, max_concurrency=IN_FLIGHT, **self._shape.resources()
        ).remote()
        built = handle.build.remote(
            job.study,
            self._data,
            job.plan,
            job.store.url,
            job.checkpoints,
            self._shape,
            measure=self._speed is None,
        )
        self._actors[name] = _Actor(handle, built)

    def _replica_lost(self, name: str, error: BaseException) -> None:
        if name not in self._actors:
            return  # its other task told us already
        at_work = len(self._actors)
        lost = self._job.scheduler.replica_lost(name, error=_first_line(error))
        self._release(name)
        self._lost_in_a_row += 1
        if isinstance(error, ray.exceptions.OutOfMemoryError):  # Ray's memory monitor ended it
            self._job.shrink(f"{name} was ended for lack of memory on its node")
        self._job.progress.say(
            f"{name} died ({_first_line(error)}); {len(lost)} of its tasks go to another"
        )
        if self._lost_in_a_row > max(MAX_LOST_REPLICAS, 2 * at_work):
            raise ClusterError(
                f"{self._lost_in_a_row} replicas died with no task done between, the last with:"
                f" {error}. If they run out of memory, give a smaller --memory or fewer"
                " --max-replicas; what is done is in the store"
            )

    def _release(self, name: str) -> None:
        actor = self._actors.pop(name)
        self._job.scheduler.replica_lost(name)
        self._running = {k: v for k, v in self._running.items() if v[0] != name}
        ray.kill(actor.handle)


def nodes() -> list[Node]:
    """Return the nodes that are alive."""
    return [
        Node(
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory=int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _shape(run: Run, progress: Progress) -> ReplicaShape:
    """Choose what a replica asks of a node; wait for nodes only where some can come."""
    patience = run.wait_for_nodes
    if patience is None:
        patience = 1800.0 if _autoscaler_helps() else 0.0
    deadline, said = time.monotonic() + patience, float("-inf")
    with _node_requests() as request_nodes:
        while True:
            try:
                require_fit(nodes(), device=run.device, threads=run.threads)
                break
            except ClusterError as error:
                if time.monotonic() >= deadline:
                    raise
                if time.monotonic() - said > PATIENCE_SECONDS:
                    said = time.monotonic()
                    progress.say(f"waiting for nodes: {error}")
                    request_nodes(run)
                time.sleep(1.0)  # a node that comes and finds no work soon goes again
    shape = choose_shape(nodes(), device=run.device, threads=run.threads, memory=run.memory)
    if shape.device == "cuda" and run.memory is None:
        free = ray.get(_free_gpu_memory.options(num_gpus=1, num_cpus=0).remote())
        shape = shape.with_memory(int(0.8 * free))
    return shape


@contextlib.contextmanager
def _node_requests() -> Iterator[Callable[[Run], None]]:
    """Withdraw requests at the end: Ray keeps them, and with them a node that is paid for."""
    asked = _autoscaler_helps()  # then a driver that was killed may have asked, too

    def request_nodes(run: Run) -> None:
        nonlocal asked
        asked = True
        bundle = {"GPU": 1} if run.device == "cuda" else {"CPU": run.threads or 1}
        request_resources(bundles=[bundle])

    try:
        yield request_nodes
    finally:
        if asked:
            request_resources(bundles=[])


def _autoscaler_helps() -> bool:
    """Whether this driver runs on a cluster of `ray up` or KubeRay, which can bring nodes."""
    kuberay = ("RAY_USAGE_STATS_KUBERAY_IN_USE", "KUBERAY_GEN_RAY_START_CMD")
    return (Path.home() / "ray_bootstrap_config.yaml").exists() or any(
        name in os.environ for name in kuberay
    )


@contextlib.contextmanager
def _session(run: Run, data: StudyData, progress: Progress) -> Iterator[None]:
    """Join the cluster that is named, or start a local one; leave it as it was found."""
    if ray.is_initialized():
        with _stop_on_sigterm():
            yield
        return
    address = run.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _object_store_bytes(data),
        }
    # Ray is started in a thread of its own. In the main thread it takes SIGTERM over at once, and a
    # signal that came then raised SystemExit wherever it happened to be: once in the midst of
    # logging, whose lock stayed taken for ever. The thread lives as long as the session: Ray's
    # processes end with the thread that started them. When it ends, Ray leaves SIGTERM to the
    # kernel, which kills; so handlers are set again after it.
    with _stop_on_sigterm(), ThreadPoolExecutor(1) as thread:
        starting = thread.submit(ray.init, **options)
        try:
            try:
                starting.result()
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ClusterError(
                    f"cannot join the Ray cluster at {address!r}: {error}. Give --address, or unset"
                    " RAY_ADDRESS to start a local one"
                ) from error
            progress.say(f"Ray: {'joined ' + address if address else 'started on this machine'}")
            yield
        finally:
            # Ray that is shut down while it starts looks for its own head for a minute, and aborts.
            wait([starting])
            ray.shutdown()


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """End as Ctrl-C does; Ray, where the caller started it, has put a handler of its own there."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _object_store_bytes(data: StudyData) -> int:
    return 2**28 + 2 * data.nbytes


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _cause(error: BaseException) -> BaseException:
    """Return the error that a task raised, out of Ray's wrapping, with its remote traceback."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, BaseException):
        return error
    cause.add_note(str(error))
    return cause
