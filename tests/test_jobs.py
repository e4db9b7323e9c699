"""A job script that is submitted to a real Ray cluster joins it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mine
import pytest
import torch
import xarray as xr
from ports import free_port

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head node on loopback with its dashboard; yields the environment of its clients."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose `python` it is
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={agent}",
         "--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats"],
        env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_up(dashboard, head)
        yield environment
    finally:
        head.terminate()
        head.wait(timeout=60)


def wait_until_up(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head node did not start"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail("the dashboard did not come up")


def test_ray_job_submit(cluster: dict[str, str], tmp_path: Path) -> None:
    """
    `ray job submit --working-dir . -- python jobs/mnist.py` joins the cluster that it is
    submitted to, and its store, figures and report are where --store says.
    """
    upload = tmp_path / "upload"
    for part in ("distributed_stiffness", "jobs"):
        shutil.copytree(ROOT / part, upload / part, ignore=shutil.ignore_patterns("__pycache__"))
    store = tmp_path / "x.zarr"

    ended = subprocess.run(
        [RAY, "job", "submit", "--working-dir", str(upload), "--",
         "python", "jobs/mnist.py", "--data=digits", "--examples=60", "--model-option=widths=[16]",
         "--iterations=0,20", "--learning-rates=0.01", f"--store={store}"],
        env=cluster, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "joined" in ended.stdout
    assert xr.open_zarr(str(store)).attrs["finished"]
    assert (tmp_path / "x" / "report.html").exists()


def test_checkpoints_of_ones_own(cluster: dict[str, str], tmp_path: Path) -> None:
    """
    `ray job submit --working-dir . -- stiffness gram …`: network, data and checkpoints are those of
    the folder, on every node.
    """
    upload, store = tmp_path / "upload", tmp_path / "out.zarr"
    shutil.copytree(ROOT / "distributed_stiffness", upload / "distributed_stiffness")
    shutil.copy(ROOT / "tests/mine.py", upload / "own.py")
    (upload / "runs").mkdir()
    for step in (0, 5):
        torch.save(mine.weights(step), upload / f"runs/step-{step}.pt")

    ended = subprocess.run(
        [RAY, "job", "submit", "--working-dir", str(upload), "--",
         "python", "-m", "distributed_stiffness", "gram", "--model=own:build",
         "--data=own:validation", "--checkpoints", "runs/step-*.pt", f"--store={store}"],
        env=cluster, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert xr.open_zarr(str(store)).attrs["finished"]
    assert xr.open_zarr(str(store)).iteration.values.tolist() == [0, 5]
