"""The Ray engine adds placement and retries to the serial one, and nothing numeric.

Real Ray, real processes, real SIGKILLs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import TESTS, TILES, long_study
from studies import arrays, assert_same_bits, hears_ctrl_c, run_options, tiny_study

from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import ClusterError, StoreError


def start_driver(store: Path, study: str = "long_study()", then: str = "") -> subprocess.Popen[str]:
    """Run a study on a Ray of its own, in a process of its own, and do something after it."""
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(TESTS / "engine")!r})
        from distributed_stiffness.cli import run_app
        from distributed_stiffness.engine import run_study
        import os, signal
        from studies import run_options, tiny_study
        from faults import long_study

        def work():
            run_study({study}, run_options({str(store)!r}, engine="ray", quiet=False))
            {then or "pass"}

        run_app(work)
        """
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {"PYTHONPATH": str(TESTS)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )


def wait_for_tiles(store: Path, count: int, driver: subprocess.Popen[str]) -> None:
    """Wait until that many tiles of cosines are there."""
    deadline = time.monotonic() + 120
    while len(list(store.glob(TILES))) < count:
        if driver.poll() is not None:
            pytest.fail(f"the run ended early: {driver.communicate()[1]}")
        assert time.monotonic() < deadline, "no tiles came"
        time.sleep(0.05)


def replicas_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of the driver's replicas."""
    processes = psutil.Process(driver.pid).children(recursive=True)
    return [p for p in processes if any("_ReplicaActor" in part for part in p.cmdline())]


class TestEqualsSerial:
    @pytest.mark.usefixtures("local_ray")
    def test_sums_too(self, tmp_path: Path) -> None:
        """
        What is kept in place of pairs does not depend on who folded which tile.
        """
        study, checkpoints = tiny_study(keep="sums"), str(tmp_path / "checkpoints")
        alone, together = tmp_path / "alone.zarr", tmp_path / "together.zarr"

        run_study(study, run_options(alone, checkpoints=checkpoints))
        run_study(study, run_options(together, checkpoints=checkpoints, engine="ray"))

        assert_same_bits(alone, together)

    @pytest.mark.usefixtures("local_ray")
    def test_ray_gives_the_serial_bits(self, undisturbed: Path, tmp_path: Path) -> None:
        """
        Two replicas on Ray write the same store as one process, bit for bit.
        """
        store = tmp_path / "long.zarr"

        run_study(long_study(), run_options(store, engine="ray", max_replicas=2))

        assert_same_bits(undisturbed, store)


class TestKills:
    def test_a_killed_replica_costs_its_task_not_the_run(
        self, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        SIGKILL of a replica in the middle: the same run ends well, with the same bits.
        """
        store = tmp_path / "long.zarr"
        driver = start_driver(store)
        wait_for_tiles(store, 30, driver)
        victims = replicas_of(driver)
        assert victims, "no replica was found to kill"
        victims[0].kill()

        _, errors = driver.communicate(timeout=180)

        assert driver.returncode == 0, errors
        assert "died" in errors
        assert_same_bits(undisturbed, store)

    def test_a_killed_driver_leaves_a_store_that_continues(
        self, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        SIGKILL of the driver in the middle: what is there is kept, the next run adds the rest.
        """
        store = tmp_path / "long.zarr"
        driver = start_driver(store)
        wait_for_tiles(store, 30, driver)
        driver.kill()
        driver.communicate(timeout=60)
        kept = {p: p.stat().st_mtime_ns for p in store.glob(TILES)}
        assert 0 < len(kept) < 3 * 225
        assert np.isnan(arrays(store)["cosine"]).any()

        again = start_driver(store)
        _, errors = again.communicate(timeout=180)

        assert again.returncode == 0, errors
        assert_same_bits(undisturbed, store)
        both = [p for p in kept if p.stat().st_mtime_ns != kept[p]]
        assert len(both) <= 8, "tiles that were there were computed again"

    def test_ctrl_c_says_how_to_go_on(self, undisturbed: Path, tmp_path: Path) -> None:
        """
        Ctrl-C ends with exit code 130 and a sentence; the next run completes the store.
        """
        store = tmp_path / "long.zarr"
        driver = start_driver(store)
        wait_for_tiles(store, 30, driver)
        driver.send_signal(signal.SIGINT)

        _, errors = driver.communicate(timeout=60)

        assert driver.returncode == 130
        assert "run the same command again" in errors
        assert "Traceback" not in errors
        run_study(long_study(), run_options(store))
        assert_same_bits(undisturbed, store)

    def test_a_signal_when_ray_has_ended(self, tmp_path: Path) -> None:
        """
        Ray leaves SIGTERM to the kernel when it ends; figures are drawn after that.
        """
        driver = start_driver(
            tmp_path / "x.zarr", "tiny_study()", "os.kill(os.getpid(), signal.SIGTERM)"
        )

        said = driver.communicate(timeout=120)[1]

        assert driver.returncode == 130, said
        assert "run the same command again to go on" in said


@pytest.mark.usefixtures("local_ray")
class TestMetrics:
    def test_what_the_dashboard_shows(self, tmp_path: Path) -> None:
        """
        Tiles, operations, bytes and seconds are counted where Prometheus finds them.
        """
        import ray

        run_study(tiny_study(), run_options(tmp_path / "x.zarr", engine="ray", max_replicas=1))

        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline, counted = time.monotonic() + 60, 0.0
        while counted < 45 and time.monotonic() < deadline:
            time.sleep(0.5)
            with urllib.request.urlopen(url) as answer:
                text = answer.read().decode()
            found = re.findall(r"^ray_stiffness_tiles(?:_total)?{.*} ([0-9.]+)$", text, re.M)
            counted = sum(map(float, found))
        assert counted >= 45  # of five matrices; other tests of this cluster may have added theirs
        for name in ("operations", "bytes_written", "seconds", "peak_memory_bytes"):
            assert f"ray_stiffness_{name}" in text


@pytest.mark.usefixtures("local_ray")
class TestRefusals:
    def test_a_cluster_without_room_says_what_was_asked_and_what_there_is(
        self, tmp_path: Path
    ) -> None:
        """
        More threads than any node has are refused before the store is made.
        """
        with pytest.raises(
            ClusterError, match=r"asks for 64 CPUs on one node, the cluster has 2 CPUs"
        ):
            run_study(tiny_study(), run_options(tmp_path / "x.zarr", engine="ray", threads=64))

        assert not (tmp_path / "x.zarr").exists()

    def test_no_gpu(self, tmp_path: Path) -> None:
        """
        --device cuda on a cluster without GPUs is refused.
        """
        with pytest.raises(ClusterError, match="one GPU"):
            run_study(tiny_study(), run_options(tmp_path / "x.zarr", engine="ray", device="cuda"))

    def test_an_error_of_the_store_comes_back_whole(self, undisturbed: Path) -> None:
        """
        A store of another study is refused by the Ray engine as by the serial one.
        """
        with pytest.raises(StoreError, match="belongs to another study"):
            run_study(tiny_study(), run_options(undisturbed, engine="ray"))
