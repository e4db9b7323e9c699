"""A study on simulated replicas: the real scheduler, with replicas that only let time pass.

A replica is what engine/replica.py is, as far as time goes: it holds the rows of the chunks that it
used last, streams the columns that it does not hold, computes one task while the next one loads and
the last one writes. What gradients, products, writing, loading and checks take is a case's; the
driver is busy for a moment with each event. Replicas may come late, be slow, or be lost and
replaced.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

from distributed_stiffness.engine.scheduler import Scheduler
from distributed_stiffness.plan import ROWS_SHARE, Plan
from distributed_stiffness.tiling import Checkpoint, Task, all_checkpoints, pieces, tasks

TICK = 1.0  # seconds between two looks of the driver where nothing happens
MODELS = 2  # networks that a replica keeps loaded


@dataclass(frozen=True)
class Times:
    """What a replica takes, in seconds."""

    gradient: float  # to make one
    pair: float  # to multiply two
    tile: float  # to write one of 1,250²
    load: float  # to read a checkpoint
    check: float  # to check one
    event: float = 1e-3  # of the driver, for each task that ends


@dataclass(frozen=True)
class Cluster:
    """How many replicas, and what becomes of them."""

    replicas: int
    noise: float = 0.1  # of the logarithm of a task's time
    arrive_over: float = 0.0  # seconds in which they come, evenly; all are there at the start: 0
    lost_each: float = math.inf  # seconds that a replica lives, on average
    away: float = 60.0  # seconds until another takes its place
    slow_share: float = 0.0  # of the replicas
    slow_times: float = 5.0  # as long for everything


@dataclass(frozen=True)
class Outcome:
    """How a study went."""

    replicas: int
    seconds: float  # from the first replica to the last receipt
    offered: float  # replica-seconds that were there
    busy: float  # of these, with computing
    ideal: float  # seconds of one replica that makes every gradient once
    making: float  # replica-seconds of making gradients
    making_once: float  # of which so much would do
    wasted: float  # replica-seconds of tasks that were lost, or done by another too
    tasks: int
    lost: int
    all_done: bool
    decision: float  # seconds of the scheduler for each event, on average
    slowest_decision: float

    @property
    def busy_share(self) -> float:
        """1 − idle share."""
        return self.busy / self.offered

    @property
    def efficiency(self) -> float:
        """Of the replica-seconds offered, those that one ideal replica would take."""
        return self.ideal / self.offered

    @property
    def recomputed(self) -> float:
        """Share of computing that made gradients again."""
        return (self.making - self.making_once) / self.busy


def simulate(
    plan: Plan, times: Times, cluster: Cluster, *, checks: bool = True, seed: int = 0
) -> Outcome:
    """Compute every checkpoint of a plan."""
    return _Simulation(plan, times, cluster, checks=checks, seed=seed).run()


@dataclass
class _Replica:
    """What a replica holds, and what its two threads do."""

    name: str
    began: float
    slowness: float
    loaded: OrderedDict[Checkpoint, None] = field(default_factory=OrderedDict)  # networks
    held: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)  # strip -> rows
    loads_until: float = 0.0
    waiting: deque[Task] = field(default_factory=deque)  # for the thread that computes
    computing: Task | None = None
    since: float = 0.0  # it computes
    busy: float = 0.0


class _Simulation:
    def __init__(
        self, plan: Plan, times: Times, cluster: Cluster, *, checks: bool, seed: int
    ) -> None:
        self.plan, self.times, self.cluster, self.checks = plan, times, cluster, checks
        self.random = np.random.default_rng(seed)
        self.scheduler = Scheduler()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.now = self.driver_free = 0.0
        self.replicas: dict[str, _Replica] = {}
        self.names = itertools.count()
        self.there: set[tuple[Checkpoint | None, int, int]] = set()
        self.left: Counter[Checkpoint] = Counter()
        self.offered = self.busy = self.making = self.wasted = 0.0
        self.tasks = self.lost = 0
        self.decisions: list[float] = []

    def run(self) -> Outcome:
        for checkpoint in all_checkpoints(1, 1, self.plan.n_checkpoints):
            found = tasks(
                "pairs",
                checkpoint,
                self.plan.tiling,
                panel_chunks=self.plan.panel_chunks,
                done=(),
            )
            self.left[checkpoint] = sum(task.size for task in found)
            self.scheduler.add(found)
        cluster = self.cluster
        for index in range(cluster.replicas):
            self.at(cluster.arrive_over * index / cluster.replicas, self.arrives)
        self.at(TICK, self.tick)
        while not self.scheduler.idle:
            self.now, _, event = heapq.heappop(self.events)
            event()
        for name in list(self.replicas):
            self.leaves(name)
        plan, times = self.plan, self.times
        making_once = plan.n_checkpoints * plan.n_examples * times.gradient
        products = plan.n_checkpoints * plan.n_examples**2 / 2 * times.pair
        checks = plan.n_checkpoints * times.check * self.checks
        return Outcome(
            replicas=cluster.replicas,
            seconds=self.now,
            offered=self.offered,
            busy=self.busy,
            ideal=making_once + products + checks,
            making=self.making,
            making_once=making_once,
            wasted=self.wasted,
            tasks=self.tasks,
            lost=self.lost,
            all_done=not self.scheduler.set_aside and not any(self.left.values()),
            decision=sum(self.decisions) / len(self.decisions),
            slowest_decision=max(self.decisions),
        )

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), event))

    # The driver

    def drive(self, news: Callable[[], object] = lambda: None) -> None:
        """Tell the scheduler, and hand out what it says; one event after the other."""
        self.driver_free = max(self.now, self.driver_free) + self.times.event
        started = time.perf_counter()
        news()
        assignments = self.scheduler.assign(self.now)
        self.decisions.append(time.perf_counter() - started)
        for name, task in ((a.replica, a.task) for a in assignments):
            self.at(self.driver_free, lambda name=name, task=task: self.takes(name, task))

    def tick(self) -> None:
        self.drive()
        self.at(self.now + TICK, self.tick)

    def arrives(self) -> None:
        name = f"replica-{next(self.names)}"
        slow = self.random.random() < self.cluster.slow_share
        self.replicas[name] = _Replica(name, self.now, self.cluster.slow_times if slow else 1.0)
        if self.cluster.lost_each < math.inf:
            lives = self.random.exponential(self.cluster.lost_each)
            self.at(self.now + lives, lambda: self.is_lost(name))
        self.drive(lambda: self.scheduler.replica_ready(name))

    def leaves(self, name: str) -> None:
        replica = self.replicas.pop(name)
        if replica.computing is not None:
            self.busy += self.now - replica.since
            self.wasted += self.now - replica.since
        self.offered += self.now - replica.began

    def is_lost(self, name: str) -> None:
        self.lost += 1
        self.leaves(name)
        self.at(self.now + self.cluster.away, self.arrives)
        self.drive(lambda: self.scheduler.replica_lost(name, error="lost"))

    def ends(self, name: str, task: Task, seconds: float) -> None:
        """A receipt comes in; a checkpoint that is whole is checked."""
        if name not in self.replicas:
            return
        self.tasks += 1

        def news() -> None:
            if not self.scheduler.task_done(name, task, seconds) or task.kind == "check":
                return
            assert task.checkpoint is not None
            self.left[task.checkpoint] -= task.size
            if self.checks and self.left[task.checkpoint] == 0:
                self.scheduler.add([Task("check", task.checkpoint)])

        self.drive(news)

    # A replica

    def takes(self, name: str, task: Task) -> None:
        """One thread reads the checkpoint if it must, while the other one computes."""
        replica = self.replicas.get(name)
        if replica is None:
            return
        assert task.checkpoint is not None
        seconds = 0.0
        if task.checkpoint not in replica.loaded:
            seconds = self.times.load * replica.slowness
            replica.loaded[task.checkpoint] = None
            if len(replica.loaded) > MODELS:
                replica.loaded.popitem(last=False)
        replica.loaded.move_to_end(task.checkpoint)
        replica.loads_until = max(self.now, replica.loads_until) + seconds

        def loaded() -> None:
            replica.waiting.append(task)
            self.computes(replica)

        self.at(replica.loads_until, loaded)

    def computes(self, replica: _Replica) -> None:
        """Begin with the next task, if nothing is computed."""
        if replica.computing is not None or not replica.waiting:
            return
        replica.computing = task = replica.waiting.popleft()
        replica.since = self.now
        making, rest = self.takes_seconds(replica, task)
        noise = math.exp(self.random.normal(-(self.cluster.noise**2) / 2, self.cluster.noise))
        making, rest = (s * replica.slowness * noise for s in (making, rest))
        writing = self.writes_seconds(task) * replica.slowness if making + rest > 0 else 0.0

        def computed() -> None:
            if replica.name not in self.replicas:
                return
            self.busy += making + rest
            self.making += making
            replica.computing = None
            self.at(self.now + writing, written)
            self.computes(replica)

        def written() -> None:
            if replica.name in self.replicas:
                if self.is_there(task):
                    self.wasted += making + rest
                self.there.update((task.checkpoint, row, task.column) for row in task.rows)
            self.ends(replica.name, task, making + rest + writing)

        self.at(self.now + making + rest, computed)

    def is_there(self, task: Task) -> bool:
        return bool(task.rows) and all(
            (task.checkpoint, row, task.column) in self.there for row in task.rows
        )

    def takes_seconds(self, replica: _Replica, task: Task) -> tuple[float, float]:
        """Return what making gradients takes, and all else."""
        if self.is_there(task):
            return 0.0, 0.0
        if task.kind == "check":
            return 0.0, self.times.check
        tiling = self.plan.tiling
        sizes = [(tiling.size(row), tiling.size(task.column)) for row in task.rows]
        pairs = sum(r * c for r, c in sizes)
        if task.column in task.rows:
            pairs -= tiling.size(task.column) ** 2 // 2
        return self.made(replica, task) * self.times.gradient, pairs * self.times.pair

    def writes_seconds(self, task: Task) -> float:
        return task.n_tiles * self.times.tile * (self.plan.tile / 1250) ** 2

    def made(self, replica: _Replica, task: Task) -> int:
        """Return how many gradients a task makes, as `Replica._tiles` goes through its strips."""
        plan, tiling = self.plan, self.plan.tiling
        columns = [*pieces(tiling.examples(task.column), plan.strip)]
        strips = [(row, s) for row in task.rows for s in pieces(tiling.examples(row), plan.strip)]
        made = 0
        if task.column in task.rows:
            made += sum(self.rows(replica, task, s) for s in columns)
        size = max(1, plan.panel_rows // plan.strip)
        for start in range(0, len(strips), size):
            group = strips[start : start + size]
            made += sum(self.rows(replica, task, strip) for _, strip in group)
            for across in columns:
                if all(row == task.column and across.start < s.stop for row, s in group):
                    continue
                if plan.holds_all or (task.checkpoint, across.start) in replica.held:
                    made += self.rows(replica, task, across)
                else:
                    made += across.stop - across.start
        return made

    def rows(self, replica: _Replica, task: Task, strip: slice) -> int:
        """Hold the rows of a strip; return how many had to be made."""
        key, size, held = (task.checkpoint, strip.start), strip.stop - strip.start, replica.held
        made = 0
        if key not in held:
            room = int(ROWS_SHARE * self.plan.memory) // self.plan.row_bytes
            while held and sum(held.values()) + size > room:
                held.popitem(last=False)
            held[key], made = size, size
        held.move_to_end(key)
        return made
