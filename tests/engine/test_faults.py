"""Whatever goes wrong in the middle, the store ends with the bits of an undisturbed run.

Real processes, real signals, real limits of memory and disk, a real S3 server behind a network that
refuses, drops and delays. Nodes that come and go are in test_elastic.py.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
import time
import urllib.parse
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import (
    PARTIAL,
    TESTS,
    Driver,
    count_tiles,
    long_study,
    slow_disk,
    slow_study,
)
from studies import arrays, assert_same_bits, run_options, tiny_study
from test_store import small_disk
from troublesome import SPARE_BYTES

from distributed_stiffness.data.selection import select
from distributed_stiffness.engine import run_study
from distributed_stiffness.store import Store
from distributed_stiffness.study import Data, Gradients, Model, Study, Training

pytestmark = pytest.mark.usefixtures("mark")


def is_a_sentence(said: str) -> bool:
    """Whether an error was told without a traceback."""
    return "error: " in said and "Traceback" not in said


class TestWriters:
    def test_a_writer_killed_in_the_middle_of_a_chunk(
        self, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        SIGKILL while a chunk has its temporary name: no chunk is damaged, the next run sweeps what
        was left and adds the rest.
        """
        store = tmp_path / "long.zarr"
        with Driver(slow_study(), store, environment=slow_disk(0.1)) as driver:
            driver.wait_for_tiles(10)
            driver.wait_until(lambda: list(store.glob(PARTIAL)), "a chunk is being written")
            driver.process.kill()
            driver.process.wait()
        assert list(store.glob(PARTIAL)), "it was killed between two chunks"
        arrays(store)  # reads and checks every chunk

        run_study(slow_study(), run_options(store))

        assert Store(store).leftovers() == []
        assert_same_bits(undisturbed, store)

    @pytest.mark.slow
    def test_a_replica_killed_in_the_middle_of_a_chunk(
        self, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        SIGKILL of every replica while chunks have their temporary names: the same run goes on with
        new ones, and the next run sweeps what was left.
        """
        store = tmp_path / "long.zarr"
        with Driver(slow_study(), store, engine="ray", environment=slow_disk(0.05)) as driver:
            driver.wait_for_tiles(30)
            driver.wait_until(lambda: list(store.glob(PARTIAL)), "a chunk is being written")
            victims = driver.replicas()
            assert victims, "no replica was found to kill"
            for victim in victims:
                victim.kill()
            assert driver.ends() == 0, driver.said
        assert "died" in driver.said
        assert Store(store).leftovers(), "they were killed between two chunks"
        assert_same_bits(undisturbed, store)

        run_study(slow_study(), run_options(store))

        assert Store(store).leftovers() == []


class TestLease:
    def test_two_runs_on_one_store(self, undisturbed: Path, tmp_path: Path) -> None:
        """
        A second run is refused while the first one lives, and goes on at once when it was killed.
        """
        store = tmp_path / "long.zarr"
        with Driver(slow_study(), store, environment=slow_disk(0.1)) as first:
            first.wait_for_tiles(4)
            with Driver(slow_study(), store) as second:
                assert second.ends() == 1
                assert f"process {first.process.pid}" in second.said
                assert "is computing" in second.said
                assert is_a_sentence(second.said)
            assert first.process.poll() is None, "the first run did not go on"
            first.process.kill()
            first.process.wait()

        with Driver(slow_study(), store) as third:
            assert third.ends() == 0, third.said

        assert "waiting" not in third.said
        assert_same_bits(undisturbed, store)


@pytest.mark.slow
class TestStragglers:
    def test_a_replica_that_stands_still(self, undisturbed: Path, tmp_path: Path) -> None:
        """
        SIGSTOP of one of two replicas: the other one does its tasks, and the run ends well while it
        is stopped.
        """
        store = tmp_path / "long.zarr"
        with Driver(
            slow_study(), store, engine="ray", max_replicas=2, environment=slow_disk(0.06)
        ) as driver:
            driver.wait_for_work_on(2)
            driver.wait_until(lambda: stopped_at_work(driver.replicas()[0]), "it stands still")
            assert driver.ends(seconds=90) == 0, driver.said

        assert_same_bits(undisturbed, store)


def stopped_at_work(replica: psutil.Process) -> bool:
    """Stop a replica; let it go on if it is not writing a chunk just now."""
    replica.suspend()
    if any(".partial" in file.path for file in replica.open_files()):
        return True
    replica.resume()
    return False


class TestMemory:
    """The process of a replica may take only so much more than it has: allocations really fail."""

    @pytest.mark.parametrize(
        ("spare", "is_exact"),
        [
            pytest.param(70_000_000, True, id="fewer rows held: the same bits"),
            pytest.param(
                22_000_000,
                False,
                id="smaller blocks: within the last bits",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_out_of_memory_halves_the_blocks(
        self, wide: Path, tmp_path: Path, spare: int, is_exact: bool
    ) -> None:
        """
        A budget that is too large for the machine is halved until it fits, and the run completes.
        """
        store = tmp_path / "wide.zarr"
        with Driver(
            wide_study(), store, memory=240_000_000, environment={SPARE_BYTES: str(spare)}
        ) as driver:
            assert driver.ends() == 0, driver.said

        assert "ran out of memory: going on with" in driver.said
        if is_exact:
            assert_same_bits(wide, store)
        else:
            assert_close(wide, store)

    def test_the_smallest_blocks_do_not_fit(self, tmp_path: Path) -> None:
        """
        Where eight gradients are more than there is, a sentence says so.
        """
        with Driver(
            wide_study(width=14_000, examples=40),
            tmp_path / "wide.zarr",
            memory=500_000_000,
            environment={SPARE_BYTES: "20_000_000"},
        ) as driver:
            assert driver.ends() == 1, driver.said

        assert "do not fit into a replica's memory" in driver.said
        assert is_a_sentence(driver.said), driver.said

    @pytest.mark.slow
    def test_out_of_memory_in_a_replica_on_ray(self, wide: Path, tmp_path: Path) -> None:
        """
        On Ray the same: the replica's process is the one that has no more.
        """
        store = tmp_path / "wide.zarr"
        with Driver(
            wide_study(),
            store,
            engine="ray",
            max_replicas=2,
            memory=240_000_000,
            environment={SPARE_BYTES: "70_000_000"},
        ) as driver:
            assert driver.ends() == 0, driver.said

        assert "ran out of memory: going on with" in driver.said
        # How far blocks are halved depends on what two replicas hold at that moment.
        assert_close(wide, store)


def wide_study(*, width: int = 1500, examples: int = 200) -> Study:
    """A gradient has 74 numbers for each unit: 444 KB."""
    return tiny_study(
        data=Data(name="digits", validation_examples=examples),
        model=Model(name="troublesome:cramped", options={"width": width}),
        training=Training(learning_rates=(1e-3,), iterations=(0,)),
        gradients=Gradients(tile=20),
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide study, computed where nothing is missing."""
    store = tmp_path_factory.mktemp("wide") / "wide.zarr"
    run_study(wide_study(), run_options(store, memory=240_000_000))
    return store


def assert_close(left: Path, right: Path) -> None:
    """All cosines, norms and losses agree to float32 noise."""
    ours, theirs = arrays(left), arrays(right)
    for name in ("cosine", "distance", "gradient_norm", "loss"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-6, err_msg=name)


class TestDisk:
    @pytest.mark.slow
    def test_a_full_disk_is_told_and_the_same_command_goes_on(
        self, undisturbed: Path, tmp_path: Path
    ) -> None:
        """
        A disk that fills up ends the run with a sentence; when there is room, it goes on.
        """
        disk = tmp_path / "disk"
        disk.mkdir()
        with small_disk(disk, "2m"):
            store = disk / "long.zarr"
            with Driver(long_study(), store) as driver:
                assert driver.ends() == 1, driver.said
            assert "No space left" in driver.said
            assert is_a_sentence(driver.said), driver.said
            assert count_tiles(store) > 0
            arrays(store)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)

            with Driver(long_study(), store) as driver:
                assert driver.ends() == 0, driver.said

            assert_same_bits(undisturbed, store)


class TestStoreErrors:
    @pytest.mark.slow
    @pytest.mark.parametrize("engine", ["serial", "ray"])
    def test_a_store_that_fails_in_passing(
        self, finished: Path, bucket: str, tmp_path: Path, engine: str
    ) -> None:
        """
        Requests for chunks that are refused, dropped or slow are made again, and counted.
        """
        url = f"{bucket}/tiny.zarr"
        with FaultyNetwork(os.environ["AWS_ENDPOINT_URL"], share=0.08) as network:
            with Driver(
                tiny_study(),
                url,
                engine=engine,
                checkpoints=str(tmp_path / "checkpoints"),
                environment=network.environment,
            ) as driver:
                assert driver.ends(seconds=200) == 0, driver.said
            assert network.faults > 3

        assert re.search(r"\d+ requests to the store were made again", driver.said)
        assert_same_bits(finished, url)

    def test_a_store_that_fails_for_good(self, finished: Path, bucket: str, tmp_path: Path) -> None:
        """
        Where trying again does not help, a sentence says so; when the store is back, the same
        command goes on.
        """
        url, checkpoints = f"{bucket}/tiny.zarr", str(tmp_path / "checkpoints")
        with (
            FaultyNetwork(os.environ["AWS_ENDPOINT_URL"], share=1.0) as network,
            Driver(
                tiny_study(),
                url,
                checkpoints=checkpoints,
                environment=network.environment,
                before="import distributed_stiffness.store as s; s.RETRY_SECONDS = 2.0",
            ) as driver,
        ):
            assert driver.ends() == 1, driver.said
        assert f"cannot write to {url}" in driver.said
        assert is_a_sentence(driver.said), driver.said

        run_study(tiny_study(), run_options(url, checkpoints=checkpoints))

        assert_same_bits(finished, url)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study, computed in one process on a disk."""
    store = tmp_path_factory.mktemp("tiny") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


class FaultyNetwork:
    """Stands before a server and spoils a share of the requests for chunks, drawn from a seed.

    A spoilt request is refused (503, 500), its connection is closed before the request or the
    answer got through, or it is delayed.
    """

    def __init__(self, server: str, *, share: float) -> None:
        """Listen on loopback, before `server`."""
        self.faults = 0
        draw, network = random.Random(0), self
        host = urllib.parse.urlsplit(server).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = None
                spoilt = self.command in ("GET", "PUT") and IS_CHUNK.search(self.path)
                if spoilt and draw.random() < share:
                    network.faults += 1
                    kinds = ["refused", "broken"] if share == 1 else FAULTS
                    fault = draw.choice(kinds)
                if fault == "slow":
                    time.sleep(0.3)
                if fault == "dropped":
                    self.close_connection = True
                    return
                if fault in ("refused", "broken"):
                    self.answer(503 if fault == "refused" else 500, {}, b"")
                    return
                upstream = HTTPConnection(host)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                upstream.close()
                if fault == "lost":
                    self.close_connection = True
                    return
                self.answer(answer.status, dict(answer.getheaders()), content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                length = headers.pop("Content-Length", str(len(content)))
                skipped = ("transfer-encoding", "connection", "content-length", "date", "server")
                for name, value in headers.items():
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        # botocore's own patience is switched off: the engine's is what is tried.
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def __enter__(self) -> FaultyNetwork:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# Of results: while the store is laid out, nothing is lost yet when it has to be done again.
IS_CHUNK = re.compile("/(cosine|distance|gradient_norm|loss|correct|undecided)/c/")
FAULTS = ("refused", "broken", "dropped", "lost", "slow")


class TestPoison:
    def test_a_checkpoint_that_cannot_be_computed(self, tmp_path: Path) -> None:
        """
        A network that fails at one checkpoint only: the rest is computed; checkpoint, error and
        traceback are told, the exit code is 1.
        """
        store, log = tmp_path / "x.zarr", tmp_path / "log"
        with Driver(poisoned_study(log, after=30), store) as driver:
            assert driver.ends() == 1, driver.said

        assert "learning rate 0.001, seed 0, iteration 30: " in driver.said
        assert "RuntimeError: this cannot be computed: poison" in driver.said
        cosine = arrays(store)["cosine"]
        assert np.isfinite(cosine[0, 0, 0]).all()
        assert np.isnan(cosine[0, 0, 1]).all()

    @pytest.mark.parametrize("engine", ["serial", pytest.param("ray", marks=pytest.mark.slow)])
    def test_an_example_that_cannot_be_computed(self, tmp_path: Path, engine: str) -> None:
        """
        A network that fails for one example: tiles without it are computed, each of the others is
        tried three times and then left.
        """
        store, log = tmp_path / "x.zarr", tmp_path / "log"
        inputs = select(tiny_study().data).inputs(slice(45, 46))
        study = poisoned_study(log, poison=float(inputs.astype(np.float64).sum()))
        with Driver(study, store, engine=engine) as driver:
            assert driver.ends() == 1, driver.said

        assert "iteration 30: " in driver.said
        assert "RuntimeError: this cannot be computed: poison" in driver.said
        cosine = arrays(store)["cosine"]
        assert np.isfinite(cosine[0, 0, :, :40, :40]).all()
        assert np.isnan(cosine[0, 0, :, 40:]).all()
        assert np.isnan(cosine[0, 0, :, :, 40:]).all()


def poisoned_study(log: Path, **options: object) -> Study:
    """One rate, two checkpoints, three tiles a side."""
    network = {"widths": [16, 8], "log": str(log), **options}
    return tiny_study(
        model=Model(name="troublesome:poisoned", options=network),
        training=Training(learning_rates=(1e-3,), iterations=(0, 30)),
    )


class TestInterruptions:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "engine",
        [
            "serial",
            pytest.param(
                "ray",
                marks=pytest.mark.skipif(
                    "STIFFNESS_INTERRUPTIONS" not in os.environ,
                    reason="a soak: set STIFFNESS_INTERRUPTIONS to a number of signals",
                ),
            ),
        ],
    )
    @pytest.mark.timeout(3000)
    def test_random_moments(self, undisturbed: Path, tmp_path: Path, engine: str) -> None:
        """
        Ctrl-C or SIGTERM at any moment: exit code 130 and a sentence; the same command goes on, and
        the store ends with the same bits.
        """
        wanted = int(os.environ.get("STIFFNESS_INTERRUPTIONS", "3"))
        draw, done, stores = random.Random(0), 0, 0
        store = tmp_path / "0.zarr"
        while True:
            with Driver(None, store, words=command(store, engine)) as driver:
                driver.wait_until(lambda: catches_sigterm(driver.process.pid), "it is ready")
                if done < wanted:
                    number = draw.choice([signal.SIGINT, signal.SIGTERM])
                    delay = draw.uniform(0, 8 if engine == "serial" else 16)
                    if not ends_within(driver, delay):
                        driver.process.send_signal(number)
                        code = driver.ends()
                        done += 1
                        print(f"{done}: {number.name} after {delay:.1f} s: {code}")
                        assert code in (130, 0), f"{number} after {delay}: {driver.said}"
                        assert "Traceback" not in driver.said, f"{number} after {delay}"
                        if code == 130:
                            assert "run the same command again" in driver.said
                            continue
                assert driver.ends() == 0, driver.said
            assert_same_bits(undisturbed, store)
            if done >= wanted:
                return
            stores += 1
            store = tmp_path / f"{stores}.zarr"


def command(store: Path, engine: str) -> list[str]:
    """The long study, as a person runs it."""
    return [
        str(TESTS.parent / "jobs/mnist.py"), "--data=digits", "--examples=60", "--tile=4",
        "--model-option=widths=[16,8]", "--iterations=0,20,40", "--learning-rates=0.001",
        "--threads=1", "--memory=200MB", f"--engine={engine}", f"--store={store}",
    ]  # fmt: skip


def catches_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM by now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE) or ["0"]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def ends_within(driver: Driver, seconds: float) -> bool:
    """Whether a run ends by itself before that."""
    try:
        driver.process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
