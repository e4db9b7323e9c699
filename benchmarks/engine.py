"""The engine: how it scales, and what it adds to computing; markdown tables on standard output.

    python benchmarks/engine.py [--data-dir DIR] [simulation scaling overhead writing memory sums]

`simulation`: simulated replicas, up to 1,024, with measured task times, faults, late arrivals and
stragglers; the scheduler is the real one. `scaling`: two replicas of one thread against one.
`overhead`: Ray and the store against the same tiles in one plain loop. `writing`: tiles to the
local disk, alone and beside computing. `memory`: of the driver, as N grows.
`sums`: a study that keeps sums in place of pairs, at up to 60,000 examples.

Both sides of a ratio are measured in turn, several times, and the best of each counts: the machine
may be shared. Networks have random weights; the data are MNIST and CIFAR-10.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from gradients import product_rate
from simulation import Cluster, Outcome, Times, simulate

from distributed_stiffness.checkpoints import METRICS, Checkpoints, TrainingRun
from distributed_stiffness.engine import Run, run_study
from distributed_stiffness.engine.job import Job
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prediction import Speed, predict
from distributed_stiffness.engine.prepare import prepare
from distributed_stiffness.engine.replica import Receipt, Replica
from distributed_stiffness.engine.scheduler import Assignment
from distributed_stiffness.figures.style import heading, save, style
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.plan import Plan, make_plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import Store
from distributed_stiffness.study import Data, Model, Study, Training, training_identity
from distributed_stiffness.tiling import Checkpoint, Task, all_checkpoints, pieces, tasks
from distributed_stiffness.training import build_model

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FIGURE, SUMS_FIGURE = IMAGES / "engine_scaling.png", IMAGES / "sums_scaling.png"
MEMORY = 4 * 10**9  # bytes of a replica, wherever not said otherwise
CPUS = 2  # of the local Ray


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all where none is given")
    parser.add_argument("--data-dir", default=None, help="folder of data sets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--figure", action="store_true", help=f"draw {FIGURE.name}, {SUMS_FIGURE.name}"
    )
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no case is named {', '.join(sorted(unknown))}: expected {', '.join(CASES)}")
    torch.set_num_threads(1)
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores, load"
        f" {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    for case in options.cases or CASES:
        CASES[case](options)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    for line in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(line)} |", flush=True)


# Simulation


@dataclass(frozen=True)
class Simulated:
    """A network on a kind of replica."""

    name: str
    times: Times
    row_bytes: int
    making_bytes: int
    memory: int
    basis: str
    batch_bytes: int = 2**26

    def plan(self, tile: int | None) -> Plan:
        """Plan 40 checkpoints of N = 10,000."""
        return make_plan(
            n_examples=10_000,
            n_checkpoints=40,
            row_bytes=self.row_bytes,
            making_bytes=self.making_bytes,
            memory=self.memory,
            tile=tile,
            batch_bytes=self.batch_bytes,
        )


# Sizes as `fit` gives them. Times of one thread are rounded from receipts on the machine of
# docs/BENCHMARKS.md (ResNet-20's check: one at N = 2,048, and the reading of a matrix). Those of
# the GPU are assumed: 20 TFLOP/s of gradients, 40 of products.
SIMULATED = (
    Simulated(
        "ResNet-20, CPU",
        Times(gradient=3.6e-3, pair=3.4e-6, tile=0.02, load=0.015, check=3.5),
        row_bytes=1_084_460,
        making_bytes=4_907_680,
        memory=4 * 10**9,
        basis="one thread, 4 GB",
    ),
    Simulated(
        "ResNet-18, GPU",
        Times(gradient=1.5e-4, pair=4.2e-7, tile=0.02, load=0.2, check=3.0),
        row_bytes=12_879_932,
        making_bytes=28_536_992,
        memory=64 * 10**9,
        basis="80 GB, times assumed",
        batch_bytes=2**32,
    ),
    Simulated(
        "fully connected, CPU",
        Times(gradient=2e-5, pair=3.3e-8, tile=0.02, load=0.006, check=2.3),
        row_bytes=10_392,
        making_bytes=28_032,
        memory=4 * 10**9,
        basis="one thread, 4 GB",
    ),
)
TILES = (None, 625)
REPLICAS = tuple(2**k for k in range(11))
TROUBLE = {"lost_each": 7200.0, "slow_share": 0.01}
SEEDS = 3


def simulation(options: argparse.Namespace) -> None:
    """Efficiency at 1 to 1,024 replicas, pairs alone; in trouble; and with checks.

    The ideal time is that of replicas which make every gradient once in all; the predicted one is
    `predict`'s, of replicas which share a checkpoint and do not exchange gradients.
    """
    drawn = {}
    for case, tile in itertools.product(SIMULATED, TILES):
        plan = case.plan(tile)
        quiet, rough, rows = [], [], []
        for replicas in REPLICAS:
            calm = Cluster(replicas)
            quiet.append(outcomes(plan, case.times, calm, checks=False))
            # They come within a twentieth of the time that all of them would take.
            soon = quiet[-1].seconds / 20
            trouble = Cluster(replicas, arrive_over=soon, **TROUBLE)
            rough.append(outcomes(plan, case.times, trouble, checks=False))
            rows.append(simulated_row(plan, case.times, quiet[0], quiet[-1], rough[-1]))
        drawn[case.name, plan.tile] = quiet, rough
        table(
            f"{case.name} ({case.basis}): 40 checkpoints of N = 10,000, tile {plan.tile:,}, panels"
            f" of {plan.panel_rows:,} rows; {quiet[0].ideal:,.0f} s of one ideal replica",
            (
                "replicas", "seconds", "tasks a replica", "busy", "speed-up / replicas",
                "making again", "ideal time / time", "predicted / time", "in trouble: busy",
                "speed-up / replicas", "lost", "a decision, µs",
            ),
            rows,
        )  # fmt: skip
        with_checks = outcomes(plan, case.times, Cluster(256), checks=True)
        print(
            f"\nWith checks at 256: {with_checks.seconds:.1f} s, {with_checks.busy_share:.0%} busy."
        )
    if options.figure:
        print(f"\n{draw(drawn)}")


def outcomes(plan: Plan, times: Times, cluster: Cluster, *, checks: bool) -> Outcome:
    """Return the run of median time among a few."""
    found = [simulate(plan, times, cluster, checks=checks, seed=seed) for seed in range(SEEDS)]
    assert all(outcome.all_done for outcome in found)
    return sorted(found, key=lambda outcome: outcome.seconds)[SEEDS // 2]


def simulated_row(
    plan: Plan, times: Times, one: Outcome, calm: Outcome, rough: Outcome
) -> Sequence[str]:
    allowed = predict(plan, replicas=calm.replicas, speed=Speed(times.gradient, times.pair)).seconds
    assert allowed is not None
    return (
        f"{calm.replicas:,}",
        f"{calm.seconds:,.1f}",
        f"{calm.tasks / calm.replicas:,.1f}",
        f"{calm.busy_share:.0%}",
        f"{one.seconds / calm.offered:.0%}",
        f"{max(0.0, calm.recomputed):.0%}",
        f"{calm.efficiency:.0%}",
        f"{allowed / calm.seconds:.0%}",
        f"{rough.busy_share:.0%}",
        f"{one.seconds / rough.offered:.0%}",
        f"{rough.lost}",
        f"{calm.decision * 1e6:,.0f}",
    )


def draw(drawn: dict[tuple[str, int], tuple[list[Outcome], list[Outcome]]]) -> Path:
    """Draw efficiency against replicas, with and without trouble."""
    from matplotlib.figure import Figure

    shown = [key for key in drawn if "fully" not in key[0]]
    with style():
        figure = Figure(figsize=(8.4, 6.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for ax, key in zip(axes.flat, shown, strict=True):
            quiet, rough = drawn[key]
            for runs, line, trouble in ((quiet, "o-", ""), (rough, "s:", ", in trouble")):
                one = quiet[0].seconds
                for color, name, shares in (
                    ("C0", "busy", [o.busy_share for o in runs]),
                    ("C1", "speed-up / replicas", [one / o.offered for o in runs]),
                ):
                    percent = [100 * share for share in shares]
                    ax.plot(REPLICAS, percent, line, color=color, label=name + trouble)
            ax.axhline(90, color="0.45", linewidth=0.8, linestyle="--")
            ax.axvline(256, color="0.45", linewidth=0.8, linestyle="--")
            ax.set_xscale("log", base=2)
            ax.set_xticks(REPLICAS[::2], [f"{r:,}" for r in REPLICAS[::2]])
            ax.set_ylim(0, 104)
            ax.set_title(f"{key[0]}, tile {key[1]:,}")
        for ax in axes[:, 0]:
            ax.set_ylabel("% of the replicas' time")
        for ax in axes[-1]:
            ax.set_xlabel("replicas")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        heading(
            figure,
            "Pair phase on simulated replicas, the real scheduler",
            "40 checkpoints of N = 10,000. In trouble: 1 % of the replicas 5 times slower, one lost"
            " every 2 replica-hours, late arrivals",
        )
    return save(figure, FIGURE)


# A store to begin with


def study_of(name: str, checkpoints: int = 1) -> Study:
    mnist = name == "fully_connected"
    return Study(
        title="benchmark",
        data=Data(
            name="mnist" if mnist else "cifar10", validation_examples=None if mnist else 2048
        ),
        model=Model(name=name),
        training=Training(iterations=tuple(range(checkpoints))),
    )


@dataclass(frozen=True)
class Template:
    """A store with input distances, said to be checked, and checkpoints of random weights."""

    study: Study
    folder: Path
    data_dir: str | None
    plan: Plan
    preparing: float  # seconds: data, self-check, plan

    def run(self, folder: Path, **changes: Any) -> Run:
        """Copy the store there; the checkpoints stay where they are."""
        shutil.copytree(self.folder / "store.zarr", folder / "store.zarr")
        return self._run(folder, self.folder, **changes)

    @staticmethod
    def _run(folder: Path, checkpoints: Path, **changes: Any) -> Run:
        return Run(
            store=str(folder / "store.zarr"),
            checkpoints=str(checkpoints / "checkpoints"),
            threads=1,
            memory=MEMORY,
            device="cpu",
            quiet=True,
            **changes,
        )

    @classmethod
    def make(cls, study: Study, folder: Path, data_dir: str | None) -> Template:
        """Lay it out in a folder."""
        run = cls._run(folder, folder, engine="serial", data_directory=data_dir)
        began = time.perf_counter()
        prepared = prepare(study, run, Progress(quiet=True))
        prepared.plan(MEMORY, "cpu")
        preparing = time.perf_counter() - began
        study, data = prepared.study, prepared.data
        identity = training_identity(study, content=data.training_hash)
        folder_of = Checkpoints(run.checkpoint_folder, identity=identity)
        model = build_model(study, data, seed=0)
        optimizer = torch.optim.Adam(model.parameters())
        for iteration in study.iterations:
            rate = study.training.learning_rates[0]
            metrics = dict.fromkeys(METRICS, 0.0)
            folder_of.save(TrainingRun(rate, 0), iteration, model, optimizer, metrics)
        job = prepared.job(Lease(run.store_url), memory=MEMORY, device="cpu")
        for checkpoint in all_checkpoints(*study.shape):
            job.store.write_values(checkpoint, error_bound=0.0, undecided=0)
        template = cls(study, folder, data_dir, job.plan, preparing)
        replica = template.replica(job)
        for task in task_list("distance", None, job.plan):
            replica.run(task)
        return template

    @staticmethod
    def replica(job: Job) -> Replica:
        """Build a replica in this process."""
        return Replica(
            job.study, job.data, job.plan, store=job.store.url, checkpoints=job.checkpoints
        )

    def job(self, folder: Path) -> Job:
        """Take up a copy of the store in this process."""
        run = self.run(folder, engine="serial", data_directory=self.data_dir)
        prepared = prepare(self.study, run, Progress(quiet=True))
        return prepared.job(Lease(run.store_url), memory=MEMORY, device="cpu")


def task_list(kind: Any, checkpoint: Checkpoint | None, plan: Plan) -> list[Task]:
    return tasks(kind, checkpoint, plan.tiling, panel_chunks=plan.panel_chunks, done=())


@dataclass
class Recorded:
    """What a driver gave and got."""

    began: float = 0.0  # the first task was given
    ended: float = 0.0  # the last receipt came
    whole: float = 0.0  # seconds of run_study
    receipts: list[Receipt] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first task to the last receipt."""
        return self.ended - self.began

    @property
    def making(self) -> float:
        """Seconds of making gradients."""
        return sum(r.making_seconds for r in self.receipts)

    @property
    def multiplying(self) -> float:
        """Seconds of products, and all else that is not making or writing."""
        spent = sum(r.seconds - r.write_seconds for r in self.receipts)
        return spent - self.making


def on_ray(template: Template, replicas: int) -> Recorded:
    """Run a study on Ray, which runs already, and note when its first and last task were."""
    found = Recorded()
    assign, task_done = Job.assign, Job.task_done

    def assign_(job: Job) -> list[Assignment]:
        given = assign(job)
        if given and not found.began:
            found.began = time.perf_counter()
        return given

    def task_done_(job: Job, replica: str, receipt: Receipt) -> None:
        if receipt.task.kind == "pairs":  # checks come after them
            found.ended = time.perf_counter()
            found.receipts.append(receipt)
        task_done(job, replica, receipt)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Job, "assign", assign_),
        mock.patch.object(Job, "task_done", task_done_),
    ):
        run = template.run(Path(folder), max_replicas=replicas, data_directory=template.data_dir)
        began = time.perf_counter()
        run_study(template.study, run)
        found.whole = time.perf_counter() - began
    assert sum(r.task.size for r in found.receipts) >= template.plan.n_checkpoints
    return found


@contextlib.contextmanager
def local_ray() -> Iterator[float]:
    """Start Ray for all runs; yield the seconds that took."""
    from distributed_stiffness.engine.ray import ray  # sets Ray's environment first

    began = time.perf_counter()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, **quiet)
    try:
        yield time.perf_counter() - began
    finally:
        ray.shutdown()


def best(runs: Sequence[Recorded]) -> Recorded:
    return min(runs, key=lambda run: run.seconds)


# Two replicas


def scaling(options: argparse.Namespace) -> None:
    """Two one-thread replicas against one: ResNet-20, N = 2,048."""
    rows = []
    for checkpoints in (1, 4):
        with tempfile.TemporaryDirectory() as folder, local_ray():
            study = study_of("resnet20", checkpoints)
            template = Template.make(study, Path(folder), options.data_dir)
            runs: dict[int, list[Recorded]] = {1: [], 2: []}
            for _ in range(options.repeats):
                for replicas, found in runs.items():
                    found.append(on_ray(template, replicas))
            one, two = best(runs[1]), best(runs[2])
            once = checkpoints * template.plan.n_examples
            rows.append(
                (
                    f"{checkpoints}",
                    f"{one.seconds:.1f} s",
                    f"{two.seconds:.1f} s",
                    f"**{one.seconds / two.seconds:.2f}**",
                    f"{two_at_best(one.making, one.multiplying):.2f}" if checkpoints == 1 else "2",
                    f"{one.making:.1f} + {one.multiplying:.1f} s",
                    f"{two.making:.1f} + {two.multiplying:.1f} s",
                    f"{sum(r.gradients for r in two.receipts) / once:.2f}",
                    ", ".join(
                        f"{a.seconds / b.seconds:.2f}" for a, b in zip(*runs.values(), strict=True)
                    ),
                )
            )
    table(
        "Two replicas of one thread against one: the pair phase of ResNet-20, CIFAR-10, N = 2,048,"
        " first task to last receipt (asked: at least 1.85)",
        (
            "checkpoints", "one", "two", "times as fast", "possible", "making + products of one",
            "of two, in all", "each gradient made by two", "each repetition",
        ),
        rows,
    )  # fmt: skip


def two_at_best(making: float, products: float) -> float:
    """Return how much faster two replicas can do one matrix without exchange of gradients.

    If each of them lacked an example, the pair of these two would be nobody's: so one of them makes
    all gradients, m seconds. The other one makes a share b of them, and can have b² of the
    products, p seconds. Both end together where m + (1 − b²) p = b m + b² p.
    """
    m, p = making, products
    b = min(1.0, (math.sqrt(m * m + 8 * p * (m + p)) - m) / (4 * p))
    share = 0.5 if b == 1.0 else b * b
    return (m + p) / (m + (1 - share) * p)


# What Ray and the store add


def overhead(options: argparse.Namespace) -> None:
    """One replica of one thread against a plain loop over the same tiles."""
    rows = []
    for name, asked in (("fully_connected", 0.10), ("resnet20", 0.05)):
        with tempfile.TemporaryDirectory() as folder, local_ray() as starting:
            template = Template.make(study_of(name), Path(folder), options.data_dir)
            plain, engine = [], []
            for _ in range(options.repeats):
                plain.append(in_a_plain_loop(template))
                engine.append(on_ray(template, 1))
            loop, ray_run = min(plain), best(engine)
            added = ray_run.seconds / loop - 1
            rows.append(
                (
                    f"{name}, N = {template.plan.n_examples:,}",
                    f"{loop:.2f} s",
                    f"{ray_run.seconds:.2f} s",
                    f"**{added:+.0%}**",
                    f"{asked:.0%}",
                    f"{sum(r.write_seconds for r in ray_run.receipts):.2f} s",
                    f"{template.preparing:.1f} s",
                    f"{ray_run.whole - ray_run.seconds:.1f} s",
                    f"{starting:.1f} s",
                )
            )
    table(
        "One replica of one thread, first task to last receipt, against the same tiles in one plain"
        " process with no store",
        (
            "case", "plain", "engine", "more", "asked", "writing, beside computing",
            "data, self-check, plan", "run_study beside the tiles", "start of Ray",
        ),
        rows,
    )  # fmt: skip


def in_a_plain_loop(template: Template) -> float:
    """Compute every tile with the plan's shapes, write nothing; return seconds."""
    with tempfile.TemporaryDirectory() as folder:
        job = template.job(Path(folder))
        plan, tiling = job.plan, job.plan.tiling
        assert plan.holds_all
        replica = Template.replica(job)
        (checkpoint,) = all_checkpoints(*job.study.shape)
        torch.set_num_threads(1)
        began = time.perf_counter()
        gradients = replica._gradients_of(checkpoint)
        held = [
            rows
            for chunk in range(tiling.n_chunks)
            for rows in gradients.rows_of(
                replica._examples,
                tiling.examples(chunk),
                batch=plan.batch,
                mended_together=plan.block,
            )
        ]
        for i, j in tiling.upper():
            tile = torch.empty(tiling.size(i), tiling.size(j))
            if i == j:
                tile.copy_(cosine(held[i], held[i], gradients.precision))
                continue
            for block in pieces(slice(0, tiling.size(j)), plan.block):
                tile[:, block] = cosine(held[i], held[j][block], gradients.precision)
        return time.perf_counter() - began


# Writing


def writing(options: argparse.Namespace) -> None:
    """Tiles of a real matrix to the local disk."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        template = Template.make(study_of("fully_connected"), Path(folder), options.data_dir)
        tiles = template.plan.tiling.n_chunks**2
        rates: dict[int, list[float]] = {1: [], 2: []}
        alone: list[float] = []
        with concurrent.futures.ProcessPoolExecutor(
            2, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads,
            initargs=(1,),
        ) as pool:  # fmt: skip
            values = one_tile(template)
            for warm in [pool.submit(write_some, None, values, ()) for _ in range(2)]:
                warm.result()
            for _ in range(options.repeats):
                for writers, found in rates.items():
                    with tempfile.TemporaryDirectory() as copy:
                        url = template.run(Path(copy)).store_url
                        parts = [range(k, tiles, writers) for k in range(writers)]
                        jobs = [pool.submit(write_some, url, values, part) for part in parts]
                        began, ended = zip(*(job.result() for job in jobs), strict=True)
                        found.append(tiles * values.nbytes / (max(ended) - min(began)) / 1e6)
                alone.append(written_alone(tiles, values))
        for writers, found in rates.items():
            each = ", ".join(f"{rate:,.0f}" for rate in found)
            rows.append(
                (f"{writers} writer(s)", f"{max(found):,.0f} MB/s (each time: {each})", "300 MB/s")
            )
        each = ", ".join(f"{rate:,.0f}" for rate in alone)
        rows.append(
            ("the same bytes, files with fsync alone", f"{max(alone):,.0f} MB/s ({each})", "-")
        )
        seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for _ in range(options.repeats):
            for writes, runs in seconds.items():
                runs.append(beside_computing(template, writes=writes))
        (with_it, took), (without, _) = min(seconds[True]), min(seconds[False])
        rows.append(
            (
                "a replica's two threads: a matrix with writing, and without",
                f"{with_it:.2f} s, {without:.2f} s",
                "overlapped",
            )
        )
        rows.append(
            (
                "of the seconds that writing took there, hidden behind computing",
                f"{1 - (with_it - without) / took:.0%} of {took:.2f} s",
                "overlapped",
            )
        )
    table(
        "Writing float32 tiles of 1,250² to the local disk, each with fsync",
        ("what", "reached", "asked"),
        rows,
    )


def one_tile(template: Template) -> np.ndarray:
    """Return a tile of real cosines: random numbers would compress otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        job = template.job(Path(folder))
        replica = Template.replica(job)
        (checkpoint,) = all_checkpoints(*job.study.shape)
        tile = replica._computed(Task("pairs", checkpoint, (0,), 1, 0)).tiles[0]
        return np.ascontiguousarray(tile)


def write_some(url: str | None, values: np.ndarray, part: Sequence[int]) -> tuple[float, float]:
    """Write tiles, in a process of its own; return when it began and ended."""
    if url is None:
        return 0.0, 0.0
    store = Store(url)
    tiling = Plan.from_json(store.attrs["plan"]).tiling
    began = time.perf_counter()  # one clock for all processes of a machine
    for index in part:
        tile = divmod(index, tiling.n_chunks)
        store.write_tile("cosine", Checkpoint(0, 0, 0), tile, tiling, values)
    return began, time.perf_counter()


def written_alone(tiles: int, values: np.ndarray) -> float:
    """Write as many bytes as tiles have, uncompressed, one file with fsync each; return MB/s."""
    content = values.tobytes()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for index in range(tiles):
            with Path(folder, str(index)).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        return tiles * len(content) / (time.perf_counter() - began) / 1e6


def beside_computing(template: Template, *, writes: bool) -> tuple[float, float]:
    """Compute a matrix on two threads; return seconds, and those of writing."""
    with tempfile.TemporaryDirectory() as folder:
        job = template.job(Path(folder))
        replica = Template.replica(job)
        (checkpoint,) = all_checkpoints(*job.study.shape)
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        patch = (
            contextlib.nullcontext() if writes else mock.patch.object(replica, "_write", nothing)
        )
        with patch, concurrent.futures.ThreadPoolExecutor(2) as pool:
            began = time.perf_counter()
            receipts = list(pool.map(replica.run, task_list("pairs", checkpoint, job.plan)))
            return time.perf_counter() - began, sum(r.write_seconds for r in receipts)


# The driver's memory


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a driver's own process, for a band of one tile's rows."""
    rows = []
    for n in (2_000, 10_000, 50_000):
        with tempfile.TemporaryDirectory() as folder:
            study = Study(
                title="benchmark",
                data=Data(name="cifar10", train_examples=n, validation_examples=0),
                model=Model(name="fully_connected", options={"widths": [32]}),
                training=Training(iterations=(0,)),
            )
            run = {
                "store": str(Path(folder, "store.zarr")),
                "data_directory": options.data_dir,
                "max_replicas": 1,
                "threads": 1,
                "memory": MEMORY,
                "rows": (0, 1000),
                "quiet": True,
            }
            program = (
                "import resource\n"
                "from distributed_stiffness import Run, Study, run_study\n"
                "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                "import distributed_stiffness.engine.ray\n"
                "print(peak())\n"
                f"study = Study.model_validate_json({study.model_dump_json()!r})\n"
                f"run_study(study, Run(**{run!r}))\n"
                "print(peak())\n"
            )
            began = time.perf_counter()
            driver = subprocess.Popen(
                [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
            )
            pss = peak_of(driver)
            seconds = time.perf_counter() - began
            assert driver.stdout is not None
            before, resident = (int(line) / 1024 for line in driver.stdout.read().split())
            store = Store(run["store"])
            plan = Plan.from_json(store.attrs["plan"])
            written = len(store.listing("cosine"))
            rows.append(
                (
                    f"{n:,}",
                    f"{plan.tiling.n_chunks**2:,}",
                    f"{written:,}",
                    f"{before:,.0f} MiB",
                    f"{resident:,.0f} MiB",
                    f"{pss / 2**20:,.0f} MiB",
                    f"{n * 3072 / 2**20:,.0f} MiB",
                    f"{seconds:.0f} s",
                )
            )
    table(
        "Memory of the driver's process: CIFAR-10's training images, a small fully connected net, a"
        " band of the first 1,000 rows",
        (
            "N", "tiles of a matrix", "written here", "libraries alone (RSS)", "peak RSS",
            "peak PSS", "the examples in play, as bytes", "a process from start to end",
        ),
        rows,
    )  # fmt: skip


# Sums in place of pairs


def sums(options: argparse.Namespace) -> None:
    """All pairs of up to 60,000 MNIST images, of which sums are kept: time, memory, disk."""
    torch.set_num_threads(CPUS)
    rows, drawn = [], []
    for n in (15_000, 30_000, 60_000):
        with tempfile.TemporaryDirectory() as folder:
            study = Study(
                title="benchmark",
                data=Data(name="mnist", train_examples=n, validation_examples=0),
                model=Model(name="fully_connected"),
                training=Training(iterations=(0,)),
                keep="sums",
            )
            store = Path(folder, "store.zarr")
            run = {
                "store": str(store),
                "data_directory": options.data_dir,
                "engine": "serial",
                "threads": CPUS,
                "memory": 1_500_000_000,
                "quiet": True,
            }
            program = (
                "import resource, time\n"
                "from distributed_stiffness import Run, Study, run_study\n"
                f"study = Study.model_validate_json({study.model_dump_json()!r})\n"
                "began = time.perf_counter()\n"
                f"run_study(study, Run(**{run!r}))\n"
                "print(time.perf_counter() - began)\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
            )
            rate = product_rate(rows=4096)
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True,
                env=os.environ | {"OMP_NUM_THREADS": str(CPUS)},
            )  # fmt: skip
            rate = max(rate, product_rate(rows=4096))
            seconds, peak = (float(line) for line in done.stdout.split())
            plan, pairs = Plan.from_json(Store(store).attrs["plan"]), n * (n + 1) / 2
            floor = 2 * pairs * (plan.pair_work + 784) / rate
            size = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
            drawn.append((pairs, seconds, floor, peak / 2**20))
            rows.append(
                (
                    f"{n:,}",
                    f"{pairs:.2g}",
                    f"{seconds:.1f} s",
                    f"{seconds / pairs * 1e9:.0f} ns",
                    f"{floor:.1f} s ({rate / 1e9:,.0f} GFLOP/s)",
                    f"**{seconds / floor:.2f}**",
                    f"{peak / 2**20:.2f} GiB",
                    f"{size / 1e6:,.0f} MB",
                    f"{4 * n * n / 1e6:,.0f} MB",
                )
            )
    table(
        "Sums in place of pairs: fully connected net, MNIST, one checkpoint, one process of two"
        " threads, from nothing to the finished store",
        (
            "N", "pairs", "took", "a pair", "the products alone, at the rate of one large product",
            "times that (asked: 2)", "peak memory (asked: 4 GiB)", "store", "a matrix would be",
        ),
        rows,
    )  # fmt: skip
    if options.figure:
        print(f"\nFigure: {draw_sums(drawn)}")


def draw_sums(drawn: list[tuple[float, float, float, float]]) -> Path:
    """Draw seconds and memory against pairs.

    Args:
        drawn: pairs, seconds, seconds of the products alone, GiB; of each N.
    """
    from matplotlib.figure import Figure

    pairs, seconds, floor, memory = zip(*drawn, strict=True)
    with style():
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(pairs, seconds, "o-", label="sums of all pairs")
        left.plot(pairs, [2 * f for f in floor], ":", color="0.4", label="twice the products")
        left.plot(pairs, floor, "--", color="0.4", label="the products alone")
        left.set(xlabel="pairs", ylabel="seconds", xlim=(0, None), ylim=(0, None))
        left.legend()
        right.plot(pairs, memory, "o-")
        right.axhline(4, color="0.4", ls=":")
        right.annotate("asked: at most 4 GiB", (pairs[0], 3.8), va="top")
        right.set(xlabel="pairs", ylabel="peak memory (GiB)", xlim=(0, None), ylim=(0, 4.4))
        heading(
            figure,
            "Sums in place of pairs",
            "MNIST, fully connected net, N = 15,000, 30,000 and 60,000; two CPU threads",
        )
    return save(figure, SUMS_FIGURE)


def peak_of(process: subprocess.Popen[str]) -> int:
    """Return the largest proportional set size of a process, without its children."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):
            peak = max(peak, psutil.Process(process.pid).memory_full_info().pss)
        time.sleep(0.1)
    assert process.returncode == 0
    return peak


CASES: dict[str, Callable[[argparse.Namespace], None]] = {
    "simulation": simulation,
    "scaling": scaling,
    "overhead": overhead,
    "writing": writing,
    "memory": memory,
    "sums": sums,
}

if __name__ == "__main__":
    main()
