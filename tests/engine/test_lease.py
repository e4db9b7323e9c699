"""The lease: one run at a time computes a store, and a dead one keeps nobody away."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from studies import run_options, tiny_study

from distributed_stiffness.engine import lease as module
from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.lease import Lease, is_alive, lease_url, read_lease
from distributed_stiffness.errors import StoreError
from distributed_stiffness.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "EXPIRES_SECONDS", 2.0)


def write(store: str, **said: object) -> None:
    Path(lease_url(store)).write_text(json.dumps(said))


def test_taken_renewed_and_given_back(tmp_path: Path) -> None:
    """While a run is at work the file says so, and what it does; then it is gone."""
    store = str(tmp_path / "x.zarr")
    with Lease(store).held(QUIET) as lease:
        first = read_lease(store)
        lease.status = {"replicas": {"a": ["a task"]}}
        deadline = time.monotonic() + 10
        while (read_lease(store) or {}).get("replicas") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        later = read_lease(store)

    assert first is not None
    assert later is not None
    assert is_alive(later)
    assert later["owner"] == first["owner"]
    assert later["beats"] > first["beats"]
    assert later["replicas"] == {"a": ["a task"]}
    assert read_lease(store) is None
    assert not list(tmp_path.iterdir())


def test_two_runs_on_one_store(tmp_path: Path) -> None:
    """The second is refused, and told by whom; the first goes on."""
    store = tmp_path / "x.zarr"
    with (
        Lease(str(store)).held(QUIET) as lease,
        pytest.raises(StoreError, match=r"process \d+ on .* is computing .*x\.zarr"),
    ):
        run_study(tiny_study(), run_options(store))

    assert not store.exists()
    lease.require()


def test_the_lease_is_given_back_after_a_mistake(tmp_path: Path) -> None:
    """An error inside a run does not keep the next one away."""
    store = str(tmp_path / "x.zarr")
    with pytest.raises(KeyError), Lease(store).held(QUIET):
        raise KeyError

    assert read_lease(store) is None


def test_a_killed_run_of_this_machine(tmp_path: Path) -> None:
    """What SIGKILL left behind is taken over at once."""
    store = str(tmp_path / "x.zarr")
    program = textwrap.dedent(
        f"""
        import os, signal
        from distributed_stiffness.engine.lease import Lease
        from distributed_stiffness.progress import Progress
        with Lease({store!r}).held(Progress(quiet=True)):
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    left = read_lease(store)
    assert left is not None
    assert not is_alive(left)

    started = time.monotonic()
    with Lease(store).held(QUIET):
        assert time.monotonic() - started < 1.0


def test_another_process_with_the_same_number(tmp_path: Path) -> None:
    """A number that was given again does not pass for the process that died."""
    store = str(tmp_path / "x.zarr")
    with Lease(store).held(QUIET):
        said = read_lease(store)
    assert said is not None

    assert is_alive(said)
    assert is_alive({**said, "process_began": said["process_began"] - 1}) is False


def test_a_dead_run_of_another_machine(tmp_path: Path) -> None:
    """Its file does not change any more: after a while it is taken over."""
    store = str(tmp_path / "x.zarr")
    write(store, owner="another", host="elsewhere", pid=1, beats=7)

    started = time.monotonic()
    with Lease(store).held(QUIET):
        assert time.monotonic() - started > 1.5
        said = read_lease(store)
    assert said is not None
    assert said["owner"] != "another"


def test_a_living_run_of_another_machine(tmp_path: Path) -> None:
    """Its file changes: refused, whatever its clock says."""
    store = str(tmp_path / "x.zarr")
    write(store, owner="another", host="elsewhere", pid=1, beats=0)
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.1):
            beats += 1
            write(store, owner="another", host="elsewhere", pid=1, beats=beats)

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(StoreError, match="elsewhere is computing"), Lease(store).held(QUIET):
            pass
    finally:
        over.set()
        other.join()


def test_a_run_that_was_taken_over_stops(tmp_path: Path) -> None:
    """It finds another's name in its file: it ends, and leaves the file to the other."""
    store = str(tmp_path / "x.zarr")
    with Lease(store).held(QUIET) as lease:
        write(store, owner="another", host="elsewhere", pid=1, beats=1)
        deadline = time.monotonic() + 10
        while lease.lost_to is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(StoreError, match="elsewhere"):
            lease.require()

    said = read_lease(store)
    assert said is not None
    assert said["owner"] == "another"
