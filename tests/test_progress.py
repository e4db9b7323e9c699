"""Progress: lines in a log, bars on a terminal, nothing when quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distributed_stiffness import progress as module
from distributed_stiffness.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands still until it is moved."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return clock


def log(**options) -> tuple[Progress, io.StringIO]:
    """Return progress as in a job's log."""
    file = io.StringIO()
    return Progress(console=Console(file=file, soft_wrap=True, highlight=False), **options), file


def begin(progress: Progress, *arguments, **options) -> module.Phase:
    """Begin a phase at the time of the clock."""
    phase = progress.phase(*arguments, **options)
    phase.started = module.time.monotonic()
    return phase


def lines(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


class TestLog:
    def test_start_middle_and_end(self, clock):
        """Rate, done of total, share and time left, every few seconds; and how long it took."""
        progress, file = log()
        phase = begin(progress, "tiles", 400, "tiles")
        clock.now += 10
        phase.advance(120)
        clock.now += 30
        phase.update(400)
        phase.close()

        assert lines(file) == [
            "tiles: 0/400 tiles",
            "tiles: 120/400 tiles (30%), 12.0 tiles/s, 0:00:23 left",
            "tiles: 400/400 tiles (100%), 10.0 tiles/s",
            "tiles: 400/400 tiles (100%), 10.0 tiles/s, took 0:00:40",
        ]

    def test_not_too_often(self, clock):
        """A log is not flooded: one line of a phase every few seconds."""
        progress, file = log()
        phase = begin(progress, "tiles", 10_000, "tiles")
        for _ in range(1000):
            clock.now += 0.125
            phase.advance()

        assert len(lines(file)) == 1 + 125 / module.LOG_SECONDS

    def test_a_continued_run(self, clock):
        """What an earlier run did is counted as done, not as fast."""
        progress, file = log()
        phase = begin(progress, "tiles", 100, "tiles", done=60)
        clock.now += 10
        phase.advance(20)

        assert lines(file) == [
            "tiles: 60/100 tiles",
            "tiles: 80/100 tiles (80%), 2.0 tiles/s, 0:00:10 left",
        ]

    def test_the_clock_starts_with_the_work(self, clock):
        """What goes by before it begins is not in the rate, and so not in what is left."""
        progress, file = log()
        phase = begin(progress, "tiles", 100, "tiles")
        clock.now += 1000
        phase.begin()
        clock.now += 10
        phase.begin()
        phase.advance(50)

        assert "5.0 tiles/s, 0:00:10 left" in lines(file)[-1]

    def test_a_note(self, clock):
        """A loss or a path ends the line."""
        progress, file = log()
        phase = begin(progress, "training", 2000, "steps")
        clock.now += 10
        phase.advance(1000, "loss 0.5")

        assert lines(file)[-1].endswith("left, loss 0.5")
        assert "1,000/2,000 steps" in lines(file)[-1]

    def test_long_runs(self, clock):
        """Hours are shown as hours."""
        progress, file = log()
        phase = begin(progress, "tiles", 1000, "tiles")
        clock.now += 3600
        phase.advance(10)

        assert "99:00:00 left" in lines(file)[-1]

    def test_nothing_to_do(self):
        """A phase without work is complete, and divides by nothing."""
        progress, file = log()
        progress.phase("tiles", 0, "tiles").close()

        assert "0/0 tiles (100%)" in lines(file)[-1]

    def test_closed_twice(self):
        """The last line is written once."""
        progress, file = log()
        phase = progress.phase("tiles", 1, "tiles")
        phase.close()
        phase.close()

        assert len(lines(file)) == 2

    def test_what_is_said_is_written_as_it_is(self):
        """Brackets in a path are no markup, and long lines are not broken."""
        progress, file = log()
        progress.say("[bold]" + "x" * 300)

        assert lines(file) == ["[bold]" + "x" * 300]


class TestQuiet:
    def test_nothing_is_shown(self, clock):
        """In tests and notebooks."""
        progress, file = log(quiet=True)
        with progress:
            progress.say("hello")
            phase = progress.phase("tiles", 4, "tiles")
            clock.now += 60
            phase.advance(2)
            phase.close()

        assert file.getvalue() == ""
        assert phase.done == 2


class TestTerminal:
    def terminal(self) -> tuple[Progress, io.StringIO]:
        file = io.StringIO()
        return Progress(console=Console(file=file, force_terminal=True, width=200)), file

    def test_a_bar_for_each_phase(self):
        """Name, done of total, rate and note."""
        progress, file = self.terminal()
        with progress:
            tiles = progress.phase("tiles", 400, "tiles", done=100)
            progress.phase("training", 20, "steps").update(5, "loss 0.5")
            tiles.advance(20)
            progress.say("a replica died")

        shown = file.getvalue()
        assert "120/400" in shown
        assert "tiles/s" in shown
        assert "5/20" in shown
        assert "loss 0.5" in shown
        assert "a replica died" in shown

    def test_the_terminal_is_given_back(self):
        """After an error too the cursor is shown again."""
        progress, file = self.terminal()
        progress.__enter__()
        progress.phase("tiles", 4, "tiles")
        progress.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

        assert file.getvalue().rstrip().endswith("\x1b[?25h")

    def test_names_with_brackets(self):
        """A phase may be called anything."""
        progress, file = self.terminal()
        with progress:
            progress.phase("[download] data", 4, "MB").update(2, "a[b]c [/x]")

        assert "[download] data" in file.getvalue()
        assert "a[b]c [/x]" in file.getvalue()
