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

from distributed_stiffness.tiling import Panel, Task

IN_FLIGHT = 2  # tasks a replica has at a time: one computes, the next loads, the last one writes
MAX_FAILURES = 3  # times a task may fail, on different replicas where there are as many
# A task is at most 1/SHARE of what waits for each replica, and is cut where it is more: large while
# there is much to do (rows are made once for it), small at the end, so that all end together.
SHARE = 2
COPIES = 2  # replicas that may have the same task
# A task is slow after so many times what its like took, and so many seconds.
SLOW, SLOW_SECONDS = 3.0, 10.0
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


class Scheduler:
    """Tasks that wait, replicas that compute, and what became of each task.

    A replica gets tasks of the panel whose rows it already holds; else of the same checkpoint; else
    of a checkpoint, or a panel, with few replicas for what is left of it. When nothing waits, one
    without work is given what another has not begun, or has been at for too long: the first result
    counts, and both write the same.
    """

    def __init__(self, *, in_flight: int = IN_FLIGHT, max_failures: int = MAX_FAILURES) -> None:
        self._in_flight, self._max_failures = in_flight, max_failures
        self._waiting: dict[Panel, dict[Task, None]] = {}  # in the order they came
        self._waiting_size = 0
        self._replicas: dict[str, _Replica] = {}
        self._holders: defaultdict[Task, set[str]] = defaultdict(set)
        self._at_panel: Counter[Panel] = Counter()  # replicas
        self._known: set[Task] = set()
        self._cut_up: set[Task] = set()  # there are smaller tasks instead
        self._failed_on: defaultdict[Task, set[str]] = defaultdict(set)
        self._failures: Counter[Task] = Counter()
        self._seconds: defaultdict[str, deque[float]] = defaultdict(
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
        self._replicas.setdefault(replica, _Replica())

    def replica_lost(self, replica: str, error: str | None = None) -> list[Task]:
        """A replica is gone; its tasks wait again. Return them.

        With an `error`, it died: the task that ran may have killed it, and counts as failed.
        """
        lost = list(self._replicas.get(replica, _Replica()).tasks)
        for task in reversed(lost):
            self._release(replica, task)
            self._put_back(task)
        gone = self._replicas.pop(replica, _Replica())
        if gone.panel is not None:
            self._at_panel[gone.panel] -= 1
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
        for replica in self._replicas.values():
            if replica.tasks and replica.running_since is None:
                replica.running_since = now
        assignments = [
            self._give(name, task)
            for room in range(self._in_flight)
            for name, replica in self._replicas.items()
            if len(replica.tasks) == room and (task := self._choose(name)) is not None
        ]
        idle = [name for name, replica in self._replicas.items() if not replica.tasks]
        if idle:
            assignments += self._double(idle)
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

    def open_tasks(self, checkpoint: object) -> list[Task]:
        """Tasks of a checkpoint that wait or run."""
        waiting = (task for tasks in self._waiting.values() for task in tasks)
        found = {task: None for task in (*waiting, *self._held()) if task not in self.done}
        return [task for task in found if task.checkpoint == checkpoint]

    # Choosing

    def _choose(self, name: str) -> Task | None:
        """Return a task that waits for a replica, no larger than it should be."""
        for panel in self._panels(self._replicas[name]):
            for task in self._waiting[panel]:
                if self._may_try(name, task):
                    return self._cut(name, task)
        return None

    def _panels(self, replica: _Replica) -> Iterator[Panel]:
        """Panels that wait, in the order in which a replica should look at them."""
        if replica.panel in self._waiting:
            yield replica.panel
        here = None if replica.panel is None else replica.panel[0]
        replicas: Counter[object] = Counter()  # by checkpoint
        for panel, count in self._at_panel.items():
            replicas[panel[0]] += count
        left: Counter[object] = Counter()
        for panel, tasks in self._waiting.items():
            left[panel[0]] += len(tasks)

        def crowded(panel: Panel) -> tuple[bool, float, float]:
            checkpoint, _ = panel
            return (
                replica.panel is None or checkpoint != here,
                replicas[checkpoint] / left[checkpoint],
                self._at_panel[panel] / len(self._waiting[panel]),
            )

        yield from sorted(self._waiting, key=crowded)

    def _cut(self, name: str, task: Task) -> Task:
        """Cut off what is too much for one replica; it waits in the task's place."""
        most = math.ceil(self._waiting_size / (SHARE * len(self._replicas)))
        if task.size <= most:
            return task
        replica = self._replicas[name]
        held = replica.rows if replica.panel == task.panel else set()
        part, rest = task.split(most, first=held)
        for piece in (part, rest):
            self._known.add(piece)
            self._failed_on[piece] = set(self._failed_on[task])
            self._failures[piece] = self._failures[task]
        self._cut_up.add(task)
        tasks = self._waiting[task.panel]
        self._waiting[task.panel] = {
            other: None for t in tasks for other in ((part, rest) if t == task else (t,))
        }
        return part

    def _may_try(self, name: str, task: Task) -> bool:
        """A task goes to replicas that it has not failed on, as long as there are any."""
        failed_on = self._failed_on.get(task, set())
        return name not in failed_on or failed_on >= set(self._replicas)

    def _give(self, name: str, task: Task) -> Assignment:
        self._withdraw(task)
        replica = self._replicas[name]
        replica.tasks.append(task)
        if len(replica.tasks) == 1:
            replica.running_since = self._now
        self._holders[task].add(name)
        if replica.panel != task.panel:
            if replica.panel is not None:
                self._at_panel[replica.panel] -= 1
            self._at_panel[task.panel] += 1
            replica.panel, replica.rows = task.panel, set()
        replica.rows |= set(task.rows)
        return Assignment(name, task)

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
        queued = (task for replica in self._replicas.values() for task in replica.tasks[1:])
        yield from (task for task in queued if self._could_double(task))
        for replica in self._replicas.values():
            if not replica.tasks or replica.running_since is None:
                continue
            task, known = replica.tasks[0], self._seconds[replica.tasks[0].kind]
            if known and self._could_double(task):
                usual = statistics.median(known) * task.size
                if self._now - replica.running_since > max(SLOW_SECONDS, SLOW * usual):
                    yield task

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
        self._waiting.setdefault(task.panel, {})[task] = None
        self._waiting_size += task.size

    def _withdraw(self, task: Task) -> None:
        """Take a task from those that wait, if it does."""
        tasks = self._waiting.get(task.panel, {})
        if task in tasks:
            del tasks[task]
            self._waiting_size -= task.size
        if not tasks:
            self._waiting.pop(task.panel, None)

    def _put_back(self, task: Task) -> None:
        """Let a task wait again, before all others: it holds up the end of its checkpoint."""
        if self._is_over(task) or self._holders[task]:
            return
        self._waiting_size += task.size
        panel = {task: None} | self._waiting.pop(task.panel, {})
        self._waiting = {task.panel: panel} | self._waiting

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
        if task == held.tasks[0]:
            held.running_since = None
        held.tasks.remove(task)
        self._holders[task].discard(replica)
        return True
