"""Progress that reads well on a terminal and in a job log.

On a terminal every phase is a live bar (rich); elsewhere a phase writes one line when it starts,
one every few seconds while it runs, and one when it ends:

    pairs: 120/400 tiles (30%), 12.3 tiles/s, 0:00:23 left
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as LiveBars

LOG_SECONDS = 5.0  # between two lines of one phase in a log


@dataclass
class Phase:
    """One thing that is counted: `total` of `unit`, and how many are done."""

    name: str
    total: float
    unit: str
    progress: Progress = field(repr=False)
    done: float = 0.0
    started: float = field(default_factory=time.monotonic)
    resumed_at: float = 0.0  # done before this run: left out of the rate
    _bar: TaskID | None = None
    _last_line: float = 0.0
    _closed: bool = False
    _begun: bool = False

    def begin(self) -> None:
        """Start the clock of the rate at the first call: what came before was getting ready."""
        if not self._begun:
            self._begun, self.started = True, time.monotonic()

    @property
    def rate(self) -> float:
        """Units a second since the phase started, in this run."""
        seconds = time.monotonic() - self.started
        return (self.done - self.resumed_at) / seconds if seconds > 0 else 0.0

    def describe(self) -> str:
        """One line: done of total, rate, time left."""
        share = self.done / self.total if self.total else 1.0
        line = f"{self.name}: {self.done:,.0f}/{self.total:,.0f} {self.unit} ({share:.0%})"
        if self.rate > 0:
            line += f", {self.rate:,.1f} {self.unit}/s"
            if self.done < self.total:
                line += f", {_clock((self.total - self.done) / self.rate)} left"
        return line

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count `amount` more; `note` (a loss, a path) is shown at the end of the line."""
        self.update(self.done + amount, note)

    def update(self, done: float, note: str = "") -> None:
        """Set how many are done."""
        self.done = done
        self.progress._show(self, note)

    def close(self) -> None:
        """End the phase: its last line stays."""
        if not self._closed:
            self._closed = True
            self.progress._end(self)


class Progress:
    """Every phase of a run, shown as live bars on a terminal and as lines elsewhere.

    `quiet=True` shows nothing (tests, notebooks).
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._live = (
            LiveBars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=self.console,
            )
            if self.console.is_terminal and not quiet
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, message: str) -> None:
        """Write one line above the bars."""
        if not self.quiet:
            self.console.print(message, markup=False)

    def phase(self, name: str, total: float, unit: str, done: float = 0.0) -> Phase:
        """Begin a phase; `done` were finished by an earlier run."""
        phase = Phase(name, total, unit, self, done=done, resumed_at=done)
        if self._live:
            phase._bar = self._live.add_task(
                name, total=total, completed=int(done), rate="", note=""
            )
        elif not self.quiet:
            phase._last_line = time.monotonic()
            self.say(f"{name}: {done:,.0f}/{total:,.0f} {unit}")
        return phase

    def _show(self, phase: Phase, note: str) -> None:
        if self._live and phase._bar is not None:
            rate = f"{phase.rate:,.1f} {phase.unit}/s"
            self._live.update(
                phase._bar, completed=int(phase.done), total=int(phase.total), rate=rate, note=note
            )
        elif not self.quiet and time.monotonic() - phase._last_line >= LOG_SECONDS:
            phase._last_line = time.monotonic()
            self.say(phase.describe() + (f", {note}" if note else ""))

    def _end(self, phase: Phase) -> None:
        if not self._live and not self.quiet:
            seconds = time.monotonic() - phase.started
            self.say(f"{phase.describe()}, took {_clock(seconds)}")


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
