"""Nodes come, go and die while a study is computed: it ends well on those that there are.

Real Ray clusters on loopback: every node is a raylet of its own, which is killed for real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import (
    MARK,
    NODE,
    RAY,
    TESTS,
    Driver,
    Head,
    count_tiles,
    environment_of_a_run,
    replicas_below,
    slow_disk,
    slow_study,
    wait_until,
)
from ports import free_port
from ray.cluster_utils import Cluster
from studies import assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mark")]


@pytest.fixture
def cluster(mark: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head node and another one, each with room for one replica whose chunks are slow."""
    assert os.environ[MARK] == mark  # what the cluster starts is looked for at the end
    for name, value in (environment_of_a_run() | slow_disk(0.06)).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def raylet(node: Any) -> subprocess.Popen[bytes]:
    """The process that makes a node."""
    (started,) = node.all_processes["raylet"]
    return started.process


class TestNodes:
    def test_a_node_that_is_killed(
        self, cluster: Cluster, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        SIGKILL of a raylet in the middle: the run ends well on the node that is left.
        """
        store = tmp_path / "long.zarr"
        other = raylet(cluster.list_all_nodes()[1])
        with Driver(slow_study(), store, engine="ray", address=cluster.address) as driver:
            driver.wait_for_work_on(2)
            assert replicas_below(other.pid), "no replica is on that node"
            other.kill()
            other.wait()  # its workers look whether its number is still taken
            assert driver.ends() == 0, driver.said

        assert "died" in driver.said
        assert_same_bits(undisturbed, store)

    def test_a_node_that_goes_and_one_that_comes(
        self, cluster: Cluster, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        A node is taken away and another one added: a replica works on the new one.
        """
        store = tmp_path / "long.zarr"
        _, other = cluster.list_all_nodes()
        with Driver(slow_study(), store, engine="ray", address=cluster.address) as driver:
            driver.wait_for_work_on(2)
            cluster.remove_node(other, allow_graceful=False)
            new = raylet(cluster.add_node(**NODE))
            driver.wait_until(lambda: replicas_below(new.pid), "a replica is on the new node")
            driver.wait_for_work_on(2)
            assert driver.ends() == 0, driver.said

        assert "died" in driver.said
        assert_same_bits(undisturbed, store)


class TestAutoscaler:
    def test_from_no_node_up_and_down_again(self, undisturbed: Path, tmp_path: Path) -> None:
        """
        Ray's own autoscaler starts nodes while tasks wait, and takes them away when they are idle.
        """
        config, store = tmp_path / "cluster.json", tmp_path / "long.zarr"
        port = free_port()
        config.write_text(json.dumps(autoscaled(port, most=2)))
        words = (f"--autoscaling-config={config}", "--num-cpus=0", "--include-dashboard=false")
        with Head(*words, port=port, environment=AUTOSCALER | slow_disk(0.06)) as head:
            head.wait_until_up(head.port)
            wait_until(lambda: head.raylets() == 1, "the head node is up")
            with Driver(
                slow_study(),
                store,
                environment=head.environment,
                engine="ray",
                address=head.address,
                max_replicas=2,
                wait_for_nodes=60.0,
            ) as driver:
                driver.wait_until(lambda: head.raylets() == 3, "two nodes came")
                assert driver.ends() == 0, driver.said
            wait_until(lambda: head.raylets() == 1, "the nodes went", seconds=60)

        assert_same_bits(undisturbed, store)


class TestHead:
    def test_a_head_that_is_restarted(self, undisturbed: Path, tmp_path: Path) -> None:
        """
        SIGKILL of the head node with all that runs on it; it is started again and the same job is
        submitted again: it goes on from what is in the store.
        """
        store, upload = tmp_path / "long.zarr", tmp_path / "upload"
        for part in ("distributed_stiffness", "jobs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(TESTS.parent / part, upload / part, ignore=ignored)
        shutil.copy(TESTS / "engine/troublesome.py", upload)
        with Head("--num-cpus=2", environment=slow_disk(0.05)) as head:
            submit(head, upload, store, wait=False)
            wait_until(lambda: count_tiles(store) >= 30, "30 tiles are there")
            head.kill()
        kept = count_tiles(store)
        assert kept < 3 * 225, "the job had ended"

        with Head("--num-cpus=2") as head:
            submit(head, upload, store, wait=True)

        assert_same_bits(undisturbed, store)
        assert (tmp_path / "long" / "report.html").exists()


def submit(head: Head, upload: Path, store: Path, *, wait: bool) -> None:
    """Submit the slow study as a job."""
    head.wait_until_up(head.dashboard)
    words = [
        RAY, "job", "submit", f"--address=http://127.0.0.1:{head.dashboard}",
        f"--working-dir={upload}", *([] if wait else ["--no-wait"]), "--",
        "python", "jobs/mnist.py", "--data=digits", "--examples=60", "--tile=4",
        "--model=troublesome:slow_disk", "--model-option=widths=[16,8]", "--iterations=0,20,40",
        "--learning-rates=0.001", "--threads=1", "--memory=200MB", f"--store={store}",
    ]  # fmt: skip
    ended = subprocess.run(
        words, env=head.environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


AUTOSCALER = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}


def autoscaled(port: int, *, most: int) -> dict[str, object]:
    """A cluster file for Ray's provider of nodes that are processes on this machine.

    Its own example (`AutoscalingCluster`) is not in the wheel.
    """
    lists = (
        "initialization_commands", "setup_commands", "head_setup_commands",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_exclude", "rsync_filter",
    )  # fmt: skip
    worker = {"CPU": NODE["num_cpus"], "object_store_memory": NODE["object_store_memory"]}
    return {
        "cluster_name": "test",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.3,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }  # fmt: skip
