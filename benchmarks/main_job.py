"""Numbers of the main job, on this machine, in one run: a table on standard output.

    python benchmarks/main_job.py --data-dir DIR

1. Tile computation against `torch.func` vmap(grad) and one product, fully connected net, N = 2,000.
2. All pairs of the 10,000 MNIST validation images for one checkpoint, forward passes to finished
   store, with the memory of all processes beside Ray's own.
3. Every sign and cosine against float64 autograd, one example at a time, on a trained net.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.models import fully_connected
from distributed_stiffness.study import Data, Study, Training, training_identity
from distributed_stiffness.training import build_model, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="folder of data sets")
    parser.add_argument("--iterations", type=int, default=1875, help="training steps before")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    against_vmap()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            title="benchmark",
            data=Data(name="mnist", validation_examples=None),
            training=Training(learning_rates=(1e-3,), iterations=(options.iterations,)),
        )
        data = select(study.data, directory=options.data_dir)
        store = all_pairs(study, data, Path(folder), options.data_dir)
        against_float64(study, data, Path(folder), store)


def row(what: str, value: str, asked: str) -> None:
    print(f"{what:72} {value:>22}   asked: {asked}")


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def against_vmap(n: int = 2000) -> None:
    """Same matrix, both ways, in turn; the median of three of ours."""
    torch.manual_seed(0)
    model = fully_connected((1, 28, 28), 10).eval()
    inputs = F.normalize(torch.randn(n, 784)).reshape(n, 1, 28, 28)
    targets = torch.randint(0, 10, (n,))

    def ours() -> Tensor:
        gradients = PerExampleGradients(model, "cross_entropy", (inputs[:3], targets[:3]))
        rows = gradients.rows(inputs, targets)
        return cosine(rows, rows)

    ours()
    seconds = sorted(timed(ours)[0] for _ in range(3))[1]
    seconds_vmap, matrix = timed(lambda: vmap_and_product(model, inputs, targets))
    difference = float((matrix - ours()).abs().max())
    row(
        f"fully connected, N = {n:,}: vmap(grad) + product / ours",
        f"{seconds_vmap:.1f} s / {seconds:.3f} s = {seconds_vmap / seconds:.0f}",
        "at least 50",
    )
    row("  largest difference between the two", f"{difference:.1e}", "-")


def vmap_and_product(model: nn.Module, inputs: Tensor, targets: Tensor, block: int = 250) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, chosen, (x.unsqueeze(0),))
        return F.cross_entropy(outputs, y.unsqueeze(0))

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    rows = []
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        grads = per_example(parameters, inputs[part], targets[part])
        rows.append(torch.cat([g.flatten(1) for g in grads.values()], dim=1))
    G = torch.cat(rows)
    G /= torch.linalg.vector_norm(G, dim=1, keepdim=True)
    return G @ G.T


def all_pairs(study: Study, data: StudyData, folder: Path, data_dir: str | None) -> Path:
    """Train first; then measure a fresh driver, from the start of Ray on, as a person runs it."""
    checkpoints, store = folder / "checkpoints", folder / "store.zarr"
    identity = training_identity(study, content=data.labelled.content_hash())
    for _ in train(study, TrainingRun(1e-3, 0), data, Checkpoints(checkpoints, identity=identity)):
        pass
    run = {"store": str(store), "checkpoints": str(checkpoints), "data_directory": data_dir}
    program = (
        "from distributed_stiffness import Run, Study, run_study\n"
        f"run_study(Study.model_validate_json({study.model_dump_json()!r}), Run(**{run!r}))"
    )
    started = time.perf_counter()
    driver = subprocess.Popen([sys.executable, "-c", program])
    peak = watch_memory(driver)
    seconds = time.perf_counter() - started
    n = data.n_examples
    row(f"all pairs of {n:,} images: a process from start to end", f"{seconds:.1f} s", "30 s")
    row("  peak memory, driver and replicas together", f"{peak / 2**30:.2f} GiB", "3 GiB")
    return store


def watch_memory(driver: subprocess.Popen[bytes]) -> int:
    """Return the largest sum of proportional set sizes of a driver and its workers."""
    peak = 0
    while driver.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error, OSError):
            root = psutil.Process(driver.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error, OSError):
                    if process == root or is_ours(process):
                        total += process.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(0.1)
    assert driver.returncode == 0
    return peak


def is_ours(process: psutil.Process) -> bool:
    """Whether a child process is a replica or a training run, not a part of Ray."""
    line = " ".join(process.cmdline())
    return "ray::" in line and "IDLE" not in line


def against_float64(
    study: Study, data: StudyData, folder: Path, store: Path, n: int = 1000
) -> None:
    """Compare the first n examples' pairs with the definition."""
    run, (iteration,) = TrainingRun(1e-3, 0), study.iterations
    model = build_model(study, data, 0)
    weights = Checkpoints(folder / "checkpoints").load_weights(run, iteration)
    model.load_state_dict(dict(weights.tensors))
    inputs = torch.from_numpy(data.inputs(slice(0, n)))
    targets = torch.from_numpy(np.array(data.examples.labels[:n]))
    names = [name for name, _ in model.named_parameters()]
    truth = (
        Reference(model.eval(), "cross_entropy", names)
        .cosines(inputs, targets, memory=8 * 2**30)
        .numpy()
    )
    dataset = xr.open_zarr(str(store))
    stored = dataset.cosine[0, 0, 0, :n, :n].values
    certain = np.abs(truth) > 1e-6
    wrong = int((np.sign(stored) != np.sign(truth))[certain].sum())
    row(f"wrong signs where |cosine| > 1e-6, {n:,}² pairs", f"{wrong}", "0")
    row("largest difference of a cosine", f"{np.abs(stored - truth).max():.1e}", "2e-6")
    row("  error bound in the store", f"{float(dataset.error_bound[0, 0, 0]):.1e}", "-")


if __name__ == "__main__":
    main()
