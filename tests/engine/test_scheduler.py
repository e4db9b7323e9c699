"""The scheduler: whatever replicas do, every task ends, once."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distributed_stiffness.engine.scheduler import (
    COPIES,
    IN_FLIGHT,
    MAX_FAILURES,
    SLOW_SECONDS,
    Assignment,
    Scheduler,
)
from distributed_stiffness.tiling import Checkpoint, Task, Tiling, tasks


def matrix(iteration: int, chunks: int = 4, panel_chunks: int = 2) -> list[Task]:
    """All tasks of one checkpoint."""
    tiling = Tiling(n_examples=chunks, tile=1)
    return tasks("pairs", Checkpoint(0, 0, iteration), tiling, panel_chunks=panel_chunks, done=())


Cell = tuple[object, ...]


def cells(*tasks_: Task) -> set[Cell]:
    """What tasks compute, whatever they were cut into."""
    return {
        (task.kind, task.checkpoint, row, task.column)
        for task in tasks_
        for row in task.rows or (None,)
    }


class Study(RuleBasedStateMachine):
    """Replicas come, die, compute and fail in any order; checkpoints appear meanwhile.

    What is known to the replicas is kept here, apart from the scheduler: `running` is what each of
    them was given and has not answered. Tasks may be cut, so that tiles are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.added: set[Task] = set()
        self.known: set[Cell] = set()
        self.finished: set[Cell] = set()
        self.running: dict[str, list[Task]] = {}
        self.last: dict[str, Task] = {}
        self.failed_on: dict[Cell, set[str]] = {}
        self.failures: Counter[Cell] = Counter()
        self.replicas_seen = self.iterations = 0
        self.now = 0.0

    # What happens

    @rule(chunks=st.integers(1, 4), panel_chunks=st.integers(1, 3))
    def a_checkpoint_appears(self, chunks, panel_chunks):
        self.iterations += 1
        self.add(matrix(self.iterations, chunks, panel_chunks))

    @rule()
    def a_checkpoint_is_to_be_checked(self):
        self.add([Task("check", Checkpoint(0, 0, self.iterations))])

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def known_tasks_are_added_again(self, data):
        self.add([data.draw(st.sampled_from(sorted(self.added, key=str)))])

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
        over = bool(lost) and self.is_over(lost[0])

        assert self.scheduler.replica_lost(name, error="killed") == lost
        if lost and not over:
            self.count_failure(name, lost[0])

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data(), seconds=st.none() | st.floats(0.1, 10))
    def a_task_is_done(self, data, seconds):
        name, task = self.some_running(data)

        is_new = not cells(task) & self.finished
        assert self.scheduler.task_done(name, task, seconds) == is_new
        self.finished |= cells(task)

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
        for other in {task, *self.scheduler.open_tasks(task.checkpoint)} - self.scheduler.done:
            self.scheduler.give_up(other, "broken checkpoint")
        assert not [
            cell
            for cell in self.waiting()
            if cell[1] == task.checkpoint and cell not in cells(*self.scheduler.set_aside)
        ]
        self.scheduler.task_failed(name, task, "it failed")

    @rule(seconds=st.floats(0, 100))
    def tasks_are_handed_out(self, seconds):
        self.now += seconds
        self.assign()

    # What holds

    @invariant()
    def every_tile_is_in_one_place(self):
        """Done, set aside, running or waiting: never lost, never in two of them."""
        aside = cells(*self.scheduler.set_aside)

        assert cells(*self.scheduler.done) == self.finished
        assert not aside & self.finished
        assert self.scheduler.waiting == len(self.waiting() - aside)

    @invariant()
    def a_replica_has_few_tasks(self):
        """At most two in flight: the next one waits there while this one computes."""
        for name, tasks_ in self.running.items():
            assert len(tasks_) <= IN_FLIGHT
            assert self.scheduler.tasks_of(name) == tasks_

    @invariant()
    def no_more_than_two_copies(self):
        """A task that is slow is doubled, once."""
        given = Counter(task for tasks_ in self.running.values() for task in tasks_)
        assert all(copies <= COPIES for copies in given.values())

    @invariant()
    def idle_when_nothing_is_left(self):
        busy = any(not cells(t) <= self.finished for ts in self.running.values() for t in ts)
        assert self.scheduler.idle != (self.scheduler.waiting > 0 or busy)

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
                    self.finished |= cells(task)
            if self.scheduler.idle:
                break

        assert self.scheduler.idle
        assert self.finished | cells(*self.scheduler.set_aside) == self.known
        self.every_tile_is_in_one_place()

    # The replicas' side

    def add(self, new):
        self.added |= set(new)
        self.known |= cells(*new)
        self.scheduler.add(new)

    def is_over(self, task) -> bool:
        return cells(task) <= self.finished or task in self.scheduler.set_aside

    def some_running(self, data) -> tuple[str, Task]:
        name = data.draw(st.sampled_from(sorted(n for n, t in self.running.items() if t)))
        task = data.draw(st.sampled_from(self.running[name]))
        self.running[name].remove(task)
        return name, task

    def fails(self, name, task):
        over = self.is_over(task)
        self.scheduler.task_failed(name, task, "it failed")
        if not over:
            self.count_failure(name, task)

    def count_failure(self, name, task):
        """Three failures are enough, but another replica that is at it may still succeed."""
        for cell in cells(task):
            self.failed_on.setdefault(cell, set()).add(name)
            self.failures[cell] += 1
        elsewhere = any(task in tasks_ for tasks_ in self.running.values())
        enough = all(self.failures[cell] >= MAX_FAILURES for cell in cells(task))
        assert (task in self.scheduler.set_aside) == (enough and not elsewhere)

    def assign(self):
        aside, waiting = set(self.scheduler.set_aside), self.waiting()
        aside_cells = cells(*aside)
        waiting -= aside_cells
        running = {task for tasks_ in self.running.values() for task in tasks_}
        for assignment in self.scheduler.assign(self.now):
            name, task = assignment.replica, assignment.task
            assert not cells(task) & (aside_cells | self.finished)
            others = set(self.running) - {name}
            failed_on = self.failed_on.get(next(iter(cells(task))), set())
            assert name not in failed_on or failed_on >= others
            if task in running:
                # Doubled: nothing waits that this replica may do, and it has nothing else.
                assert not self.running[name]
                assert not [c for c in waiting if self.may(name, c)]
            else:
                assert cells(task) <= waiting
                last = self.last.get(name)
                if last is not None and task.panel != last.panel:
                    # It leaves the rows it holds only when there is nothing left to do with them.
                    rows = range(last.first_row, last.first_row + 3)
                    assert not [
                        c
                        for c in waiting
                        if (c[0], c[1]) == (last.kind, last.checkpoint)
                        and c[2] in last.rows
                        and c[2] in rows
                        and self.may(name, c)
                    ]
                waiting -= cells(task)
            self.running[name].append(task)
            running.add(task)
            self.last[name] = task
        for name, tasks_ in self.running.items():
            # No replica waits while there is something that it may do.
            assert len(tasks_) == IN_FLIGHT or not [c for c in waiting if self.may(name, c)]

    def waiting(self) -> set[Cell]:
        """Tiles that are neither done nor with a replica; some of them may be set aside."""
        running = cells(*(task for tasks_ in self.running.values() for task in tasks_))
        return self.known - self.finished - running

    def may(self, name, cell) -> bool:
        failed_on = self.failed_on.get(cell, set())
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
        one, two, _ = scheduler.assign()

        assert {one.replica, two.replica} == {"a", "b"}

    def test_a_lost_replicas_tasks_go_first(self, scheduler):
        """They hold up the end of their checkpoint."""
        scheduler.add(matrix(0))
        lost = scheduler.tasks_of("a") or given_to(scheduler, "a")
        assert scheduler.replica_lost("a") == lost
        scheduler.replica_ready("c")

        assert given_to(scheduler, "c") == lost

    def test_early_checkpoints_first(self, scheduler):
        """As they were added."""
        for iteration in range(3):
            scheduler.add(matrix(iteration, chunks=4, panel_chunks=1))

        assert {a.task.checkpoint.iteration for a in scheduler.assign()} == {0, 1}

    def test_a_checkpoint_each_as_long_as_there_are_enough(self, scheduler):
        """Who shares a checkpoint makes gradients that another makes too."""
        for iteration in range(4):
            scheduler.add(matrix(iteration, chunks=4, panel_chunks=2))
        seen = {"a": [], "b": []}
        while scheduler.waiting:
            for a in scheduler.assign():
                seen[a.replica].append(a.task.checkpoint.iteration)
                scheduler.task_done(a.replica, a.task)

        changes = [sum(x != y for x, y in itertools.pairwise(found)) for found in seen.values()]
        assert max(changes) <= 2  # one more than there would be with two each: the last is shared
        assert sum(map(len, seen.values())) < 4 * 10 * 2

    def test_no_task_is_more_than_a_part_of_what_waits(self):
        """The end is cut fine, so that all end together; the beginning is not."""
        scheduler = Scheduler()
        replicas = [f"replica-{i}" for i in range(4)]
        for name in replicas:
            scheduler.replica_ready(name)
        scheduler.add(matrix(0, chunks=16, panel_chunks=8))
        sizes = []
        while scheduler.waiting:
            for assignment in scheduler.assign():
                sizes.append(assignment.task.size)
                scheduler.task_done(assignment.replica, assignment.task)

        assert sum(sizes) == 16 * 17 // 2
        assert max(sizes) == 8
        assert set(sizes[-4:]) == {1}

    def test_a_slow_replica_gets_less(self, scheduler):
        """As much less as it is slower than usual."""
        for name, seconds in (("a", 40.0), *(("b", 10.0) for _ in range(5))):
            (task,) = matrix(0 if name == "a" else int(seconds), chunks=1, panel_chunks=1)
            scheduler.task_done(name, task, seconds)
        scheduler.add([Task("pairs", Checkpoint(0, 0, 1), tuple(range(16)), 20, 0)])

        first = {a.replica: a.task.size for a in reversed(scheduler.assign())}
        assert first == {"a": 1, "b": 4}

    def test_what_is_cut_goes_where_its_rows_are(self):
        """A replica that has some of a task's rows takes these."""
        task = Task("pairs", Checkpoint(0, 0, 0), rows=(0, 1, 2, 3), column=5, first_row=0)

        part, rest = task.split(2, first={1, 3})

        assert (part.rows, rest.rows) == ((1, 3), (0, 2))
        assert (part.panel, part.column) == (task.panel, 5)


class TestStragglers:
    def one_each(self, scheduler):
        """Two tasks of one tile, one for each replica."""
        tasks_ = matrix(0, chunks=2, panel_chunks=1)[:2]
        scheduler.add(tasks_)
        assert len(scheduler.assign(0.0)) == 2
        return tasks_

    def test_what_another_has_not_begun(self):
        """A replica that comes when nothing waits takes what is in another's queue."""
        scheduler = Scheduler()
        scheduler.replica_ready("a")
        scheduler.add(matrix(0, chunks=2, panel_chunks=1)[:2])
        _, queued = scheduler.assign(0.0)
        scheduler.replica_ready("b")

        assert scheduler.assign(0.0) == [Assignment("b", queued.task)]

    def test_what_takes_half_as_long_again(self, scheduler):
        """The first result counts; the run does not wait for the other."""
        fast, slow = self.one_each(scheduler)
        (fast_on,) = [n for n, tasks_ in scheduler.replicas().items() if tasks_ == [fast]]
        scheduler.task_done(fast_on, fast, 10.0)
        assert scheduler.assign(14.0) == []

        assert scheduler.assign(16.0) == [Assignment(fast_on, slow)]
        assert scheduler.assign(99.0) == []
        assert not scheduler.idle
        assert scheduler.task_done(fast_on, slow, 10.0)
        assert scheduler.idle
        assert scheduler.doubled == 1

    def test_short_tasks_are_let_be(self, scheduler):
        """A few seconds are no reason: a machine may have hiccups."""
        fast, _ = self.one_each(scheduler)
        (fast_on,) = [n for n, tasks_ in scheduler.replicas().items() if tasks_ == [fast]]
        scheduler.task_done(fast_on, fast, 0.1)

        assert scheduler.assign(SLOW_SECONDS - 1) == []

    def test_two_results_at_once(self):
        """A replica that ends both of its tasks between two looks has nothing that is slow."""
        scheduler = Scheduler()
        scheduler.replica_ready("a")
        tasks_ = matrix(0, chunks=2, panel_chunks=1)[:2]
        scheduler.add(tasks_)
        scheduler.assign(0.0)
        for task in tasks_:
            scheduler.task_done("a", task, 1.0)

        assert scheduler.assign(1.0) == []
        assert scheduler.assign(100.0) == []
        assert scheduler.idle

    def test_a_copy_that_fails_leaves_the_other(self, scheduler):
        """A task waits again only when nobody is at it."""
        fast, slow = self.one_each(scheduler)
        replicas = scheduler.replicas()
        (fast_on,) = [n for n, tasks_ in replicas.items() if tasks_ == [fast]]
        (slow_on,) = set(replicas) - {fast_on}
        scheduler.task_done(fast_on, fast, 1.0)
        scheduler.assign(20.0)
        scheduler.task_failed(fast_on, slow, "no luck")

        assert scheduler.waiting == 0
        assert scheduler.tasks_of(slow_on) == [slow]
        scheduler.replica_lost(slow_on)
        assert scheduler.waiting == 1


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
        first, second = matrix(0, 2, 1)[:2]
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
