"""Which replica does which task: a pure state machine, with no Ray and no clock.

Events go in (a replica is ready or lost, a task is done or failed), assignments come out. The Ray
driver and the serial runner use the same one, and a simulation can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from distributed_stiffness.tiling import Task

IN_FLIGHT = 2  # tasks a replica has at a time: the next one waits there while this one computes
MAX_FAILURES = 3  # times a task may fail, on different replicas where there are as many


@dataclass(frozen=True)
class Assignment:
    """Give this task to this replica."""

    replica: str
    task: Task


@dataclass
class _Replica:
    tasks: list[Task] = field(default_factory=list)  # given, not finished
    last: Task | None = None


class Scheduler:
    """Tasks that wait, replicas that compute, and what became of each task.

    A replica gets tasks of the panel whose rows it already holds; else of a panel that nobody works
    on; else of the panel with the most left, so that panels are swept once where they can be.
    """

    def __init__(self, *, in_flight: int = IN_FLIGHT, max_failures: int = MAX_FAILURES) -> None:
        self._in_flight, self._max_failures = in_flight, max_failures
        self._waiting: dict[Task, None] = {}  # in the order they came
        self._replicas: dict[str, _Replica] = {}
        self._failed_on: dict[Task, set[str]] = {}
        self._failures: Counter[Task] = Counter()
        self.set_aside: dict[Task, str] = {}  # task -> the last error
        self.done: set[Task] = set()

    # Events

    def add(self, tasks: Iterable[Task]) -> None:
        """New tasks; those already known are left alone."""
        known = self.done | set(self.set_aside)
        known |= {task for replica in self._replicas.values() for task in replica.tasks}
        for task in tasks:
            if task not in known:
                self._waiting.setdefault(task)

    def replica_ready(self, replica: str) -> None:
        """A replica can take tasks."""
        self._replicas.setdefault(replica, _Replica())

    def replica_lost(self, replica: str, error: str | None = None) -> list[Task]:
        """A replica is gone; its tasks wait again. Return them.

        With an `error`, it died: the task that ran may have killed it, and counts as failed.
        """
        lost = self._replicas.pop(replica, _Replica()).tasks
        self._put_back(lost)
        if lost and error is not None:
            self._count_failure(replica, lost[0], error)
        return lost

    def task_done(self, replica: str, task: Task) -> bool:
        """A task is finished; return whether this is the first time."""
        self._release(replica, task)
        self._waiting.pop(task, None)
        self.set_aside.pop(task, None)
        is_new = task not in self.done
        self.done.add(task)
        return is_new

    def task_failed(self, replica: str, task: Task, error: str) -> None:
        """A task raised an error: it is tried again, elsewhere if it can be, a few times."""
        if not self._release(replica, task) or task in self.done or task in self.set_aside:
            return  # late news of a lost replica, or given up meanwhile
        self._put_back([task])
        self._count_failure(replica, task, error)

    def give_up(self, task: Task, error: str) -> None:
        """Set a task aside: it cannot succeed. If it runs and does all the same, it is done."""
        self._waiting.pop(task, None)
        self.set_aside[task] = error

    # Decisions

    def assign(self) -> list[Assignment]:
        """Hand waiting tasks to replicas that have room, the idlest first."""
        assignments: list[Assignment] = []
        while True:
            free = [name for name, r in self._replicas.items() if len(r.tasks) < self._in_flight]
            free.sort(key=lambda name: len(self._replicas[name].tasks))
            found = next(
                ((name, task) for name in free if (task := self._choose(name)) is not None), None
            )
            if found is None:
                return assignments
            name, task = found
            del self._waiting[task]
            self._replicas[name].tasks.append(task)
            self._replicas[name].last = task
            assignments.append(Assignment(name, task))

    @property
    def waiting(self) -> int:
        """Tasks that no replica has."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not any(r.tasks for r in self._replicas.values())

    def tasks_of(self, replica: str) -> list[Task]:
        """Tasks that a replica has."""
        return list(self._replicas[replica].tasks) if replica in self._replicas else []

    def _choose(self, name: str) -> Task | None:
        open_to_it = [task for task in self._waiting if self._may_try(name, task)]
        if not open_to_it:
            return None
        last = self._replicas[name].last
        if last is not None:
            for task in open_to_it:
                if task.panel == last.panel:
                    return task
        worked_on = {t.panel for r in self._replicas.values() for t in r.tasks}
        for task in open_to_it:
            if task.panel not in worked_on:
                return task
        left = Counter(task.panel for task in open_to_it)
        (panel, _), *_ = left.most_common(1)
        return next(task for task in open_to_it if task.panel == panel)

    def _may_try(self, name: str, task: Task) -> bool:
        """A task goes to replicas that it has not failed on, as long as there are any."""
        failed_on = self._failed_on.get(task, set())
        return name not in failed_on or failed_on >= set(self._replicas)

    def _count_failure(self, replica: str, task: Task, error: str) -> None:
        """Set a waiting task aside when it has failed often enough."""
        self._failed_on.setdefault(task, set()).add(replica)
        self._failures[task] += 1
        if self._failures[task] >= self._max_failures and task in self._waiting:
            self.give_up(task, error)

    def _put_back(self, tasks: Iterable[Task]) -> None:
        """Lost tasks go first: they hold up the end of their checkpoint."""
        back = {t: None for t in tasks if t not in self.done and t not in self.set_aside}
        self._waiting = back | self._waiting

    def _release(self, replica: str, task: Task) -> bool:
        """Take a task from a replica; return whether it had it."""
        held = self._replicas.get(replica)
        if held is None or task not in held.tasks:
            return False
        held.tasks.remove(task)
        return True
