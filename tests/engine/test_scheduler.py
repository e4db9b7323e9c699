"""The scheduler: whatever replicas do, every task ends, once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distributed_stiffness.engine.scheduler import IN_FLIGHT, MAX_FAILURES, Scheduler
from distributed_stiffness.tiling import Checkpoint, Task, Tiling, tasks


def matrix(iteration: int, chunks: int = 4, panel_chunks: int = 2) -> list[Task]:
    """All tasks of one checkpoint."""
    tiling = Tiling(n_examples=chunks, tile=1)
    return tasks("pairs", Checkpoint(0, 0, iteration), tiling, panel_chunks=panel_chunks, done=())


class Study(RuleBasedStateMachine):
    """Replicas come, die, compute and fail in any order; checkpoints appear meanwhile.

    What is known to the replicas is kept here, apart from the scheduler: `running` is what each of
    them was given and has not answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.known: set[Task] = set()
        self.finished: set[Task] = set()
        self.running: dict[str, list[Task]] = {}
        self.last: dict[str, Task] = {}
        self.failed_on: dict[Task, set[str]] = {}
        self.failures: Counter[Task] = Counter()
        self.replicas_seen = self.iterations = 0

    # What happens

    @rule(chunks=st.integers(1, 4), panel_chunks=st.integers(1, 3))
    def a_checkpoint_appears(self, chunks, panel_chunks):
        self.iterations += 1
        self.add(matrix(self.iterations, chunks, panel_chunks))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def known_tasks_are_added_again(self, data):
        self.add([data.draw(st.sampled_from(sorted(self.known, key=str)))])

    @precondition(lambda self: len(self.running) < 5)
    @rule()
    def a_replica_is_ready(self):
        self.replicas_seen += 1
        name = f"replica-{self.replicas_seen}"
        self.running[name] = []
        self.scheduler.replica_ready(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_replica_is_lost(self, data):
        name = data.draw(st.sampled_from(sorted(self.running)))
        lost = self.running.pop(name)
        self.last.pop(name, None)

        assert self.scheduler.replica_lost(name) == lost

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_replica_dies(self, data):
        """The task that ran may have killed it, and counts as failed."""
        name = data.draw(st.sampled_from(sorted(self.running)))
        lost = self.running.pop(name)
        self.last.pop(name, None)

        assert self.scheduler.replica_lost(name, error="killed") == lost
        if lost and lost[0] not in self.scheduler.done:
            self.failed_on.setdefault(lost[0], set()).add(name)
            self.failures[lost[0]] += 1

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def a_task_is_done(self, data):
        name, task = self.some_running(data)

        assert self.scheduler.task_done(name, task) == (task not in self.finished)
        self.finished.add(task)

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def a_task_fails(self, data):
        name, task = self.some_running(data)
        self.fails(name, task)

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def a_task_cannot_succeed(self, data):
        """A broken checkpoint: the task that found out, and the others of the checkpoint."""
        name, task = self.some_running(data)
        self.scheduler.give_up(task, "broken checkpoint")
        self.fails(name, task)
        for other in self.known - self.finished:
            if other.checkpoint == task.checkpoint:
                self.scheduler.give_up(other, "broken checkpoint")

    @rule()
    def tasks_are_handed_out(self):
        self.assign()

    # What holds

    @invariant()
    def every_task_is_in_one_place(self):
        """Done, set aside, running or waiting: never lost, never in two of them."""
        running = [task for tasks_ in self.running.values() for task in tasks_]
        aside = set(self.scheduler.set_aside)

        assert len(running) == len(set(running))
        assert self.scheduler.done == self.finished
        assert not aside & self.finished
        elsewhere = self.finished | aside | set(running)
        assert self.scheduler.waiting == len(self.known - elsewhere)

    @invariant()
    def a_replica_has_few_tasks(self):
        """At most two in flight: the next one waits there while this one computes."""
        for name, tasks_ in self.running.items():
            assert len(tasks_) <= IN_FLIGHT
            assert self.scheduler.tasks_of(name) == tasks_

    @invariant()
    def idle_when_nothing_is_left(self):
        busy = self.scheduler.waiting > 0 or any(self.running.values())
        assert self.scheduler.idle != busy

    def teardown(self):
        """With one replica that works, everything comes to an end."""
        if not self.running:
            self.a_replica_is_ready()
        for _ in range(2 * len(self.known) + 1):
            self.assign()
            for name in list(self.running):
                while self.running[name]:
                    task = self.running[name].pop()
                    self.scheduler.task_done(name, task)
                    self.finished.add(task)
            if self.scheduler.idle:
                break

        assert self.scheduler.idle
        assert self.finished | set(self.scheduler.set_aside) == self.known
        self.every_task_is_in_one_place()

    # The replicas' side

    def add(self, new):
        self.known |= set(new)
        self.scheduler.add(new)

    def some_running(self, data) -> tuple[str, Task]:
        name = data.draw(st.sampled_from(sorted(n for n, t in self.running.items() if t)))
        task = data.draw(st.sampled_from(self.running[name]))
        self.running[name].remove(task)
        return name, task

    def fails(self, name, task):
        was_aside = task in self.scheduler.set_aside
        self.failed_on.setdefault(task, set()).add(name)
        self.failures[task] += 1
        self.scheduler.task_failed(name, task, "it failed")
        if not was_aside:
            assert (task in self.scheduler.set_aside) == (self.failures[task] >= MAX_FAILURES)

    def assign(self):
        aside, waiting = set(self.scheduler.set_aside), self.waiting()
        for assignment in self.scheduler.assign():
            name, task = assignment.replica, assignment.task
            assert task in waiting
            assert task not in aside | self.finished
            others = set(self.running) - {name}
            assert name not in self.failed_on.get(task, ()) or self.failed_on[task] >= others
            last = self.last.get(name)
            if last is not None and task.panel != last.panel:
                # It leaves the rows it holds only when there is nothing left to do with them.
                assert not [t for t in waiting if t.panel == last.panel and self.may(name, t)]
            waiting.remove(task)
            self.running[name].append(task)
            self.last[name] = task
        for name, tasks_ in self.running.items():
            # No replica waits while there is something that it may do.
            assert len(tasks_) == IN_FLIGHT or not [t for t in waiting if self.may(name, t)]

    def waiting(self) -> set[Task]:
        running = {task for tasks_ in self.running.values() for task in tasks_}
        return self.known - self.finished - set(self.scheduler.set_aside) - running

    def may(self, name, task) -> bool:
        failed_on = self.failed_on.get(task, set())
        return name not in failed_on or failed_on >= set(self.running)


TestStudy = Study.TestCase
TestStudy.settings = settings(max_examples=100, stateful_step_count=40)


@pytest.fixture
def scheduler():
    """Return a scheduler with two replicas."""
    scheduler = Scheduler()
    scheduler.replica_ready("a")
    scheduler.replica_ready("b")
    return scheduler


def given_to(scheduler, replica):
    return [a.task for a in scheduler.assign() if a.replica == replica]


class TestOrder:
    def test_replicas_take_different_panels(self, scheduler):
        """Rows are made once: each replica sweeps a panel of its own."""
        scheduler.add(matrix(0, chunks=6, panel_chunks=3))
        panels = {}
        while assignments := scheduler.assign():
            for a in assignments:
                panels.setdefault(a.replica, []).append(a.task.panel)
                scheduler.task_done(a.replica, a.task)
            if not scheduler.waiting:
                break

        first = {replica: found[0] for replica, found in panels.items()}
        assert len(set(first.values())) == 2
        for replica, found in panels.items():
            assert found[: found.count(first[replica])] == [first[replica]] * found.count(
                first[replica]
            )

    def test_the_last_panel_is_shared(self, scheduler):
        """No replica idles while another has a panel to itself."""
        scheduler.add(matrix(0, chunks=8, panel_chunks=8))

        assert {a.replica for a in scheduler.assign()} == {"a", "b"}

    def test_one_task_goes_to_the_idlest(self, scheduler):
        """Work is spread before it is stacked."""
        scheduler.add(matrix(0, chunks=2, panel_chunks=2))
        one, two = scheduler.assign()

        assert {one.replica, two.replica} == {"a", "b"}

    def test_a_lost_replicas_tasks_go_first(self, scheduler):
        """They hold up the end of their checkpoint."""
        scheduler.add(matrix(0))
        lost = scheduler.tasks_of("a") or given_to(scheduler, "a")
        assert scheduler.replica_lost("a") == lost
        scheduler.replica_ready("c")

        assert given_to(scheduler, "c") == lost

    def test_the_order_of_ordinary_tasks(self, scheduler):
        """Early checkpoints first, as they were added."""
        scheduler.add(matrix(0, chunks=3, panel_chunks=1))
        scheduler.add(matrix(1, chunks=3, panel_chunks=1))

        assert {a.task.checkpoint.iteration for a in scheduler.assign()} == {0}


class TestFailures:
    def fail_on(self, scheduler, replicas):
        (task,) = matrix(0, 1, 1)
        scheduler.add([task])
        for replica in replicas:
            (assignment,) = scheduler.assign()
            assert assignment.replica == replica
            scheduler.task_failed(replica, task, f"no luck on {replica}")
        return task

    def test_another_replica_tries(self, scheduler):
        """A task that fails on one replica goes to another, and may succeed there."""
        task = self.fail_on(scheduler, ["a"])
        assert not scheduler.set_aside
        (assignment,) = scheduler.assign()
        scheduler.task_done("b", task)

        assert assignment.replica == "b"
        assert scheduler.done == {task}

    def test_three_replicas_are_enough(self):
        """Then it is set aside with its last error, and the rest goes on."""
        scheduler = Scheduler()
        for name in "abcd":
            scheduler.replica_ready(name)
        task = self.fail_on(scheduler, "abc")

        assert scheduler.set_aside == {task: "no luck on c"}
        assert scheduler.idle

    def test_fewer_replicas_too(self, scheduler):
        """Where there are only two, both have tried, and one of them again."""
        task = self.fail_on(scheduler, ["a", "b"])
        assert task not in scheduler.set_aside
        (assignment,) = scheduler.assign()
        scheduler.task_failed(assignment.replica, task, "no luck again")

        assert scheduler.set_aside == {task: "no luck again"}

    def test_a_task_that_kills_its_replicas(self):
        """A task that three replicas died of is set aside; the one queued behind it is not."""
        first, second = matrix(0, 2, 2)[:2]
        scheduler = Scheduler()
        scheduler.add([first, second])
        for name in "abc":
            scheduler.replica_ready(name)
            scheduler.assign()
            assert scheduler.replica_lost(name, error=f"{name} was killed") == [first, second]

        assert scheduler.set_aside == {first: "c was killed"}
        scheduler.replica_ready("d")
        assert [a.task for a in scheduler.assign()] == [second]

    def test_the_only_replica_that_had_not_tried_dies(self, scheduler):
        """The task waits for nobody: it is tried once more, or set aside, never left hanging."""
        task = self.fail_on(scheduler, ["a"])
        scheduler.replica_lost("b")

        for error in ("again", "and again"):
            assert [a.task for a in scheduler.assign()] == [task]
            scheduler.task_failed("a", task, error)
        assert task in scheduler.set_aside

    def test_what_was_set_aside_is_not_added_again(self, scheduler):
        """Nor what is done or running."""
        task = self.fail_on(scheduler, ["a", "b", "a"])
        scheduler.add([task])

        assert scheduler.idle

    def test_given_up_while_it_runs(self, scheduler):
        """A task that was given up is not tried again when its replica fails or dies."""
        (task,) = matrix(0, 1, 1)
        scheduler.add([task])
        (assignment,) = scheduler.assign()
        scheduler.give_up(task, "broken checkpoint")
        scheduler.replica_lost(assignment.replica)

        assert scheduler.idle
        assert scheduler.set_aside == {task: "broken checkpoint"}

    def test_given_up_but_done(self, scheduler):
        """What is in the store is done, whatever was said of it."""
        (task,) = matrix(0, 1, 1)
        scheduler.add([task])
        (assignment,) = scheduler.assign()
        scheduler.give_up(task, "broken checkpoint")
        scheduler.task_done(assignment.replica, task)

        assert scheduler.done == {task}
        assert not scheduler.set_aside

    def test_late_news_of_a_lost_replica(self, scheduler):
        """Its task is elsewhere: a late failure changes nothing, a late result counts."""
        (task,) = matrix(0, 1, 1)
        scheduler.add([task])
        (first,) = scheduler.assign()
        scheduler.replica_lost(first.replica)
        (second,) = scheduler.assign()
        scheduler.task_failed(first.replica, task, "too late")

        assert not scheduler.set_aside
        assert scheduler.tasks_of(second.replica) == [task]
        assert scheduler.task_done(first.replica, task)
        assert not scheduler.task_done(second.replica, task)

    def test_unknown_replicas(self):
        """A replica that never was ready has nothing to lose."""
        scheduler = Scheduler()

        assert scheduler.replica_lost("never there") == []
        assert scheduler.tasks_of("never there") == []
        assert scheduler.idle
