"""What the tests of faults share: a study to be disturbed, runs as processes of their own, heads.

Every process that a test starts, whoever its parent is by now, has a variable of the test in its
environment: what is left at the end is found by it, and only that is ever killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
import pytest
from ports import free_port
from studies import hears_ctrl_c, tiny_study
from troublesome import FSYNC_SECONDS

from distributed_stiffness.engine.lease import read_lease
from distributed_stiffness.study import Gradients, Model, Study, Training

TESTS = Path(__file__).parents[1]
TILES = "cosine/c/*/*/*/*/[0-9]*"  # and no unfinished file, whose name begins with a dot
PARTIAL = "cosine/c/*/*/*/*/.*.partial"
MARK = "STIFFNESS_TEST"
RAY = str(Path(sys.executable).with_name("ray"))
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}  # room for one replica


def long_study(**changes: object) -> Study:
    """Enough tiles that a run can be disturbed in the middle: 3 checkpoints of 225 tiles."""
    fields: dict[str, object] = {
        "gradients": Gradients(tile=4),
        "training": Training(learning_rates=(1e-3,), iterations=(0, 20, 40)),
    }
    return tiny_study(**(fields | changes))


def slow_study() -> Study:
    """The long study; where `slow_disk` is in the environment, its chunks take long to write."""
    return long_study(model=Model(name="troublesome:slow_disk", options={"widths": [16, 8]}))


def slow_disk(seconds: float) -> dict[str, str]:
    """Return the environment in which each of the 675 chunks takes so long to reach the disk."""
    return {FSYNC_SECONDS: str(seconds)}


def wait_until(what: Callable[[], object], why: str, *, seconds: float = 120) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {why}"
        time.sleep(0.02)


def count_tiles(store: Path) -> int:
    """How many chunks of cosines are there."""
    return len(list(store.glob(TILES)))


class Driver:
    """A run of a study in a process of its own; killed at the end if it still runs."""

    def __init__(
        self,
        study: Study | None,
        store: Path | str,
        *,
        words: Sequence[str] = (),
        before: str = "",
        environment: Mapping[str, str] | None = None,
        **options: object,
    ) -> None:
        """Start it: the command `words`, or a run of a study.

        Args:
            study: that is run, where there are no words.
            store: that it writes.
            words: of a command instead.
            before: a program that is run first.
            environment: that it has besides.
            options: of the run.
        """
        self.store = store
        if study is not None:
            program = textwrap.dedent(before) + textwrap.dedent(
                f"""
                from distributed_stiffness.cli import run_app
                from distributed_stiffness.engine import run_study
                from distributed_stiffness.study import Study
                from studies import run_options
                study = Study.model_validate_json({study.model_dump_json()!r})
                options = run_options({str(store)!r}, **{ {"quiet": False} | options!r})
                run_app(lambda: run_study(study, options))
                """
            )
            words = ("-c", program)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self._last_words = ""
        self.process = subprocess.Popen(
            [sys.executable, *words],
            env=environment_of_a_run() | dict(environment or {}),
            stdout=self._said,
            stderr=self._said,
            preexec_fn=hears_ctrl_c,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill_tree(self.process.pid)
        self.process.wait()
        self._last_words = self.said
        self._said.close()

    @property
    def said(self) -> str:
        """What it has written so far."""
        if self._said.closed:
            return self._last_words
        # Not read(): the driver writes where this file stands.
        return os.pread(self._said.fileno(), 2**24, 0).decode(errors="replace")

    def wait_until(self, what: Callable[[], object], why: str, *, seconds: float = 120) -> None:
        """Look again and again until something holds; the run must not end before."""

        def holds() -> bool:
            if what():
                return True
            if self.process.poll() is not None:
                pytest.fail(f"the run ended before this: {why}\n{self.said}")
            return False

        try:
            wait_until(holds, why, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said}") from None

    def wait_for_tiles(self, count: int) -> None:
        """Wait until that many tiles of cosines are there."""
        self.wait_until(lambda: count_tiles(Path(self.store)) >= count, f"{count} tiles are there")

    def ends(self, *, seconds: float = 120) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run did not end within {seconds:.0f} s:\n{self.said}")

    def wait_for_work_on(self, replicas: int) -> None:
        """Wait until so many replicas have tasks, as the run says of itself."""

        def at_work() -> bool:
            said = read_lease(str(self.store)) or {}
            return sum(map(bool, said.get("replicas", {}).values())) >= replicas

        self.wait_until(at_work, f"{replicas} replicas are at work")

    def replicas(self) -> list[psutil.Process]:
        """Processes of its replicas, where it has started Ray itself."""
        return replicas_below(self.process.pid)


def environment_of_a_run() -> dict[str, str]:
    """Return the environment of a process that computes a study, in which it joins no cluster."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    python = f"{Path(sys.executable).parent}:{environment['PATH']}"
    packages = ":".join(map(str, (TESTS.parent, TESTS, TESTS / "engine")))
    return environment | {"PYTHONPATH": packages, "PATH": python}


def replicas_below(pid: int) -> list[psutil.Process]:
    """Replicas among the descendants of a process: of a driver, of a raylet."""
    return [p for p in descendants(pid) if any("_ReplicaActor" in part for part in _command(p))]


def descendants(pid: int) -> list[psutil.Process]:
    """Return what a process has started, and what those have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL a process and what it has started; stop it first, so that it starts nothing more."""
    try:
        process = psutil.Process(pid)
        process.suspend()
        victims = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def marked(mark: str) -> list[psutil.Process]:
    """Processes with this mark in their environment, but this one."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(MARK) == mark and process.pid != os.getpid()
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def require_nothing_left(mark: str, *, seconds: float = 20) -> None:
    """Wait for the end of all that a test has started; kill what is left, and fail then."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    described = [f"{p.pid}: {' '.join(_command(p))[:100]}" for p in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not described, "processes were left:\n" + "\n".join(described)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Head:
    """A head node of its own on loopback, as `ray start --head` makes it.

    Not `ray stop` ends it, which would end every Ray of this machine.
    """

    def __init__(
        self,
        *words: str,
        port: int | None = None,
        dashboard: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it with more `words` on its command line."""
        self.port, self.dashboard = port or free_port(), dashboard or free_port()
        self.environment = environment_of_a_run() | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            **(environment or {}),
        }
        # Short: the sockets below it may have paths of 107 characters at most.
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={self.port}",
             f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}",
             f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={self._folder.name}",
             f"--object-store-memory={NODE['object_store_memory']}", "--disable-usage-stats",
             *words],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def address(self) -> str:
        """For drivers."""
        return f"127.0.0.1:{self.port}"

    def wait_until_up(self, port: int) -> None:
        """Wait until it listens."""

        def listens() -> bool:
            assert self.process.poll() is None, "the head node did not start"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, f"the head node listens on port {port}")

    def raylets(self) -> int:
        """How many nodes there are, itself included."""
        return sum(_name(process) == "raylet" for process in descendants(self.process.pid))

    def kill(self) -> None:
        """SIGKILL it with everything that it has started."""
        kill_tree(self.process.pid)
        self.process.wait()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
