"""What every test runs under: seeded, one thread, Hypothesis without a clock or a database."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

# Before anything imports ray: a test run reports nothing, and a task without GPUs sees none.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "project", derandomize=True, deadline=None, database=None, max_examples=25
)
# pytest --hypothesis-profile=thorough draws four times as many networks.
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("project"), max_examples=100
)
hypothesis.settings.load_profile("project")
# The tests' tensors are small: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs in this process; runs join it."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _s3() -> Iterator[str]:
    """A real S3 server on loopback: one for the session, since s3fs keeps its clients."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(_s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": _s3,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"stiffness-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
