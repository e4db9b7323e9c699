"""How a command ends: exit codes, signals, and no traceback for what a user can mend."""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console

from distributed_stiffness.errors import StiffnessError

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = {
    DONE: "done",
    FAILED: "a mistake that the message explains; or a study that is not complete",
    MISUSED: "a command or an option that does not exist, or lacks its value",
    INTERRUPTED: "interrupted; the same command goes on where it stopped",
}

# Help text: \b keeps the lines as they are.
EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:>5}  {text}" for code, text in EXIT_CODES.items())


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; typer would swallow a KeyboardInterrupt before it says what is kept."""


def run_app(application: Callable[[], Any]) -> None:
    """Run a command; print what a user can mend without a traceback."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with _interrupted_by_signals():
            application()
    except StiffnessError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(FAILED)
    except (Interrupted, KeyboardInterrupt, SystemExit, SystemError) as ending:
        if not _is_interruption(ending):
            raise
        console.print("interrupted; what is done is kept: run the same command again to go on")
        sys.exit(INTERRUPTED)


def _is_interruption(ending: BaseException) -> bool:
    if isinstance(ending, SystemError):
        # Compiled code (ray.wait) that returns a result although the signal's handler has raised.
        return isinstance(ending.__cause__, Interrupted | KeyboardInterrupt)
    # Ray has a handler of its own while it starts and ends, which exits with the signal.
    return not isinstance(ending, SystemExit) or ending.code == signal.SIGTERM


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C through typer."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted from error


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise Interrupted on Ctrl-C and SIGTERM, in whatever is being done or imported."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # Nothing is left that could be interrupted, but threads that Python waits for before it
        # gets to what is registered for the exit.
        signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        atexit.register(_ignore_signals)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
