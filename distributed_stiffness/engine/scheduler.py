"""Which replica does which task: a pure state machine, with no Ray and no clock.

Events go in (a replica is ready or lost, a task is done or failed), assignments come out. The Ray
driver, the serial runner and the simulation (benchmarks/engine.py) use the same one.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from distributed_stiffness.tiling import Checkpoint, Kind, Panel, Task

IN_FLIGHT = 2  # tasks a replica has at a time: one computes, the next loads, the last one writes
MAX_FAILURES = 3  # times a task may fail, on different replicas where there are as many
# A task is at most 1/SHARE of what waits for each replica, and is cut where it is more: large while
# there is much to do (rows are made once for it), small at the end, so that all end together.
SHARE = 2
COPIES = 2  # replicas that may have the same task
# A task is slow after so many times what its like took, and so many seconds. Who takes a copy of it
# has nothing else to do, so that being wrong costs little.
SLOW, SLOW_SECONDS = 1.5, 2.0
_REMEMBERED = 64  # durations of a kind


@dataclass(frozen=True)
class Assignment:
    """Give this task to this replica."""

    replica: str
    task: Task


@dataclass
class _Replica:
    tasks: list[Task] = field(default_factory=list)  # given, not finished; the first one runs
    running_since: float | None = None  # of the first
    panel: Panel | None = None  # of the last task that it was given
    rows: set[int] = field(default_factory=set)  # of that panel, in tasks given to it
    pace: float = 0.0  # seconds of a tile, or a check, in the last task that it did


class Scheduler:
    """Tasks that wait, replicas that compute, and what became of each task.

    A replica gets tasks of the panel whose rows it already holds; else of the same checkpoint; else
    of a checkpoint, or a panel, with few replicas for what is left of it. When nothing waits, one
    without work is given what another has not begun, or has been at for too long: the first result
    counts, and both write the same.
    """

    def __init__(self, *, in_flight: int = IN_FLIGHT, max_failures: int = MAX_FAILURES) -> None:
        self._in_flight, self._max_failures = in_flight, max_failures
        # By matrix and panel, in the order they came.
        self._waiting: dict[Checkpoint | None, dict[Panel, dict[Task, None]]] = {}
        self._waiting_size = 0
        self._left: Counter[Checkpoint | None] = Counter()  # what waits, by matrix
        self._replicas: dict[str, _Replica] = {}
        # Names by number of tasks, so that a decision need not look at all.
        self._with: list[dict[str, None]] = [{} for _ in range(in_flight + 1)]
        self._starting: list[_Replica] = []  # their first task has begun since the time was said
        self._holders: defaultdict[Task, set[str]] = defaultdict(set)
        self._at_panel: Counter[Panel] = Counter()  # replicas
        self._at_matrix: Counter[Checkpoint | None] = Counter()
        self._known: set[Task] = set()
        self._cut_up: set[Task] = set()  # there are smaller tasks instead
        self._failed_on: defaultdict[Task, set[str]] = defaultdict(set)
        self._failures: Counter[Task] = Counter()
        self._seconds: defaultdict[Kind, deque[float]] = defaultdict(
            lambda: deque(maxlen=_REMEMBERED)
        )
        self.set_aside: dict[Task, str] = {}  # task -> the last error
        self.done: set[Task] = set()
        self._now = 0.0  # seconds, as it was last said
        self.doubled = 0  # tasks given to a second replica

    # Events

    def add(self, tasks: Iterable[Task]) -> None:
        """New tasks; those already known are left alone."""
        for task in tasks:
            if task not in self._known:
                self._known.add(task)
                self._wait(task)

    def replica_ready(self, replica: str) -> None:
        """A replica can take tasks."""
        if replica not in self._replicas:
            self._replicas[replica] = _Replica()
            self._with[0][replica] = None

    def replica_lost(self, replica: str, error: str | None = None) -> list[Task]:
        """A replica is gone; its tasks wait again. Return them.

        With an `error`, it died: the task that ran may have killed it, and counts as failed.
        """
        lost = list(self._replicas.get(replica, _Replica()).tasks)
        for task in reversed(lost):
            self._release(replica, task)
            self._put_back(task)
        gone = self._replicas.pop(replica, _Replica())
        self._with[0].pop(replica, None)
        self._move(gone, None)
        if lost and error is not None and not self._is_over(lost[0]):
            self._count_failure(replica, lost[0], error)
        return lost

    def task_done(self, replica: str, task: Task, seconds: float | None = None) -> bool:
        """A task is finished, in so many seconds; return whether this is the first time."""
        self._release(replica, task)
        if task in self._cut_up:
            return False  # late news of a lost replica: its parts are counted
        self._withdraw(task)
        self.set_aside.pop(task, None)
        if seconds is not None:
            self._seconds[task.kind].append(seconds / task.size)
            if replica in self._replicas:
                self._replicas[replica].pace = seconds / task.size
        is_new = task not in self.done
        self.done.add(task)
        return is_new

    def task_failed(self, replica: str, task: Task, error: str) -> None:
        """A task raised an error: it is tried again, elsewhere if it can be, a few times."""
        if not self._release(replica, task) or self._is_over(task):
            return  # late news of a lost replica, or given up meanwhile
        self._put_back(task)
        self._count_failure(replica, task, error)

    def give_up(self, task: Task, error: str) -> None:
        """Set a task aside: it cannot succeed. If it runs and does all the same, it is done."""
        self._withdraw(task)
        self.set_aside[task] = error

    # Decisions

    def assign(self, now: float = 0.0) -> list[Assignment]:
        """Hand tasks to replicas that have room, the idlest first; `now` in seconds."""
        self._now = now
        for replica in self._starting:
            replica.running_since = now if replica.tasks else None
        self._starting.clear()
        assignments = [
            self._give(name, task)
            for room in range(self._in_flight)
            for name in list(self._with[room] if self._waiting else ())
            if (task := self._choose(name)) is not None
        ]
        if self._with[0]:
            assignments += self._double(list(self._with[0]))
        return assignments

    @property
    def waiting(self) -> int:
        """How much no replica has: tiles, and checks of whole checkpoints."""
        return self._waiting_size

    @property
    def idle(self) -> bool:
        """Nothing waits, and nothing runs that is not done elsewhere."""
        return not self._waiting and all(task in self.done for task in self._held())

    def tasks_of(self, replica: str) -> list[Task]:
        """Tasks that a replica has."""
        return list(self._replicas[replica].tasks) if replica in self._replicas else []

    def replicas(self) -> dict[str, list[Task]]:
        """Every replica and its tasks."""
        return {name: list(replica.tasks) for name, replica in self._replicas.items()}

    def open_tasks(self, checkpoint: Checkpoint | None) -> list[Task]:
        """Tasks of a checkpoint that wait or run."""
        panels = self._waiting.get(checkpoint, {}).values()
        waiting = (task for tasks in panels for task in tasks)
        held = (task for task in self._held() if task.checkpoint == checkpoint)
        return [task for task in dict.fromkeys((*waiting, *held)) if task not in self.done]

    # Choosing

    def _choose(self, name: str) -> Task | None:
        """Return a task that waits for a replica, no larger than it should be."""
        for panel in self._panels(self._replicas[name]):
            for task in self._waiting[panel[0]][panel]:
                if self._may_try(name, task):
                    return self._cut(name, task)
        return None

    def _panels(self, replica: _Replica) -> Iterator[Panel]:
        """Panels that wait, in the order in which a replica should look at them."""
        here = replica.panel
        if here is not None and here in self._waiting.get(here[0], {}):
            yield here

        def crowded(matrix: Checkpoint | None) -> tuple[bool, float]:
            elsewhere = here is None or matrix != here[0]
            return elsewhere, self._at_matrix[matrix] / self._left[matrix]

        for matrix in sorted(self._waiting, key=crowded):
            panels = self._waiting[matrix]
            yield from sorted(panels, key=lambda p: self._at_panel[p] / len(panels[p]))

    def _cut(self, name: str, task: Task) -> Task:
        """Cut off what is too much for one replica; it waits in the task's place.

        One that is slower than usual gets less, so that the others need not wait for it at the end.
        """
        if task.size == 1:
            return task
        replica = self._replicas[name]
        slowness = max(1.0, replica.pace / self._usual(task.kind))
        most = math.ceil(self._waiting_size / (SHARE * len(self._replicas) * slowness))
        if task.size <= most:
            return task
        held = replica.rows if replica.panel == task.panel else set()
        part, rest = task.split(most, first=held)
        for piece in (part, rest):
            self._known.add(piece)
            self._failed_on[piece] = set(self._failed_on[task])
            self._failures[piece] = self._failures[task]
        self._cut_up.add(task)
        panels = self._waiting[task.checkpoint]
        panels[task.panel] = {
            other: None
            for waiting in panels[task.panel]
            for other in ((part, rest) if waiting == task else (waiting,))
        }
        return part

    def _may_try(self, name: str, task: Task) -> bool:
        """A task goes to replicas that it has not failed on, as long as there are any."""
        failed_on = self._failed_on.get(task, set())
        return name not in failed_on or failed_on >= set(self._replicas)

    def _give(self, name: str, task: Task) -> Assignment:
        self._withdraw(task)
        replica = self._replicas[name]
        self._recount(name, task, +1)
        if len(replica.tasks) == 1:
            replica.running_since = self._now
        self._holders[task].add(name)
        self._move(replica, task.panel)
        replica.rows |= set(task.rows)
        return Assignment(name, task)

    def _recount(self, name: str, task: Task, change: Literal[1, -1]) -> None:
        """Add a task to a replica's, or take it away."""
        tasks = self._replicas[name].tasks
        del self._with[len(tasks)][name]
        if change > 0:
            tasks.append(task)
        else:
            tasks.remove(task)
        self._with[len(tasks)][name] = None

    def _move(self, replica: _Replica, panel: Panel | None) -> None:
        """Note which panel a replica is at; it begins with none of its rows."""
        if replica.panel == panel:
            return
        for place, change in ((replica.panel, -1), (panel, +1)):
            if place is not None:
                self._at_panel[place] += change
                self._at_matrix[place[0]] += change
        replica.panel, replica.rows = panel, set()

    def _double(self, idle: list[str]) -> Iterator[Assignment]:
        """Give replicas without work what others have not begun, or have been at for too long."""
        candidates = list(self._slow_or_queued())
        for name in idle:
            task = next((t for t in candidates if self._may_double(name, t)), None)
            if task is not None:
                candidates.remove(task)
                self.doubled += 1
                yield self._give(name, task)

    def _slow_or_queued(self) -> Iterator[Task]:
        for number in range(2, self._in_flight + 1):
            for name in self._with[number]:
                yield from filter(self._could_double, self._replicas[name].tasks[1:])
        usual = {kind: self._usual(kind) for kind in self._seconds}
        for replica in self._replicas.values():
            began = replica.running_since
            if began is None or self._now - began <= SLOW_SECONDS:
                continue
            task = replica.tasks[0]
            slow = SLOW * usual.get(task.kind, math.inf) * task.size
            if self._now - began > slow and self._could_double(task):
                yield task

    def _usual(self, kind: Kind) -> float:
        """Return the median time of a tile, or a check; infinity where none was done yet."""
        known = self._seconds.get(kind)
        # What another has finished meanwhile takes no time.
        return max(1e-9, statistics.median(known)) if known else math.inf

    def _could_double(self, task: Task) -> bool:
        return not self._is_over(task) and len(self._holders[task]) < COPIES

    def _may_double(self, name: str, task: Task) -> bool:
        return name not in self._holders[task] and self._may_try(name, task)

    # Where tasks are

    def _held(self) -> Iterator[Task]:
        return (task for replica in self._replicas.values() for task in replica.tasks)

    def _is_over(self, task: Task) -> bool:
        return task in self.done or task in self.set_aside

    def _wait(self, task: Task) -> None:
        self._waiting.setdefault(task.checkpoint, {}).setdefault(task.panel, {})[task] = None
        self._count_waiting(task, +1)

    def _count_waiting(self, task: Task, change: Literal[1, -1]) -> None:
        self._waiting_size += change * task.size
        self._left[task.checkpoint] += change * task.size

    def _withdraw(self, task: Task) -> None:
        """Take a task from those that wait, if it does."""
        panels = self._waiting.get(task.checkpoint, {})
        tasks = panels.get(task.panel, {})
        if task not in tasks:
            return
        del tasks[task]
        self._count_waiting(task, -1)
        if not tasks:
            del panels[task.panel]
        if not panels:
            del self._waiting[task.checkpoint]

    def _put_back(self, task: Task) -> None:
        """Let a task wait again, before all others: it holds up the end of its checkpoint."""
        if self._is_over(task) or self._holders[task]:
            return
        panels = self._waiting.pop(task.checkpoint, {})
        tasks = {task: None} | panels.pop(task.panel, {})
        self._waiting = {task.checkpoint: {task.panel: tasks} | panels} | self._waiting
        self._count_waiting(task, +1)

    def _count_failure(self, replica: str, task: Task, error: str) -> None:
        """Set a task aside when it has failed often enough and nobody else is at it."""
        self._failed_on[task].add(replica)
        self._failures[task] += 1
        if self._failures[task] >= self._max_failures and not self._holders[task]:
            self.give_up(task, error)

    def _release(self, replica: str, task: Task) -> bool:
        """Take a task from a replica; return whether it had it."""
        held = self._replicas.get(replica)
        if held is None or task not in held.tasks:
            return False
        began = task == held.tasks[0]
        self._recount(replica, task, -1)
        if began:
            held.running_since = None
            if held.tasks:
                self._starting.append(held)
        self._holders[task].discard(replica)
        return True
