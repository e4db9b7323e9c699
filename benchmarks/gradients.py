"""All pairs of gradient cosines against the public tools, and against the floor of this machine.

    python benchmarks/gradients.py

A case is a network with random weights and random examples. A tool makes the N×N matrix of it in a
process of its own, after a warm-up of eight examples; its seconds and the growth of its peak memory
are the table's, all from one run. Ours goes first and last, and counts by the median. "cannot"
means that a tool misses parameters; it says which, compares what there is with ours over the same
parameters, and is not ranked. Ours with all checks is what a user calls; ours is without the long
ones. Without the watch for kinks it does what public tools do, and has their errors. Ours with
little memory is given about a fifth of what N×P numbers take, and makes gradients several times.
The floor is one training pass over the same examples and
N²·P floating-point operations (half the square) at the speed of torch's float32 product, or of the
one that we use if that is faster; where gradients are kept as factors, neither is a lower bound.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from distributed_stiffness.gradients import cosine_matrix
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.precision import product_of_rows
from distributed_stiffness.models import cnn, fully_connected, resnet20
from distributed_stiffness.plan import in_words

BATCH = 128  # examples of a step of the training pass
QUERIES = 512  # gradients that kronfluence holds at a time: more are faster
FEW = 8  # examples of the warm-up
SMALLEST_BUDGET = 300_000_000  # bytes of ours with little memory

Built = tuple[nn.Module, Tensor, Tensor]
Result = dict[str, Any]  # of a process
Matrix = tuple[np.ndarray, list[str]]  # of all pairs, and the parameters it covers


class Attention(nn.Module):
    """Self-attention of all positions, 4 heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """Attention and a perceptron, each after a layer normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.perceptron(self.norm2(x))


class Transformer(nn.Module):
    """A small encoder with a linear classifier on the mean over positions."""

    def __init__(self, tokens: int, length: int, n_classes: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, classes)."""
        return self.head(self.blocks(self.embedding(tokens) + self.position).mean(1))


def images(
    network: Callable[..., nn.Module], shape: tuple[int, ...], n_classes: int
) -> Callable[[int], Built]:
    def build(n: int) -> Built:
        model = network(shape, n_classes)
        inputs = F.normalize(torch.randn(n, int(np.prod(shape)))).reshape(n, *shape)
        return model, inputs, torch.randint(0, n_classes, (n,))

    return build


def sequences(n: int) -> Built:
    model = Transformer(tokens=1000, length=64, n_classes=10)
    return model, torch.randint(0, 1000, (n, 64)), torch.randint(0, 10, (n,))


@dataclass(frozen=True)
class Case:
    """A network and its examples, and what is asked of ours there."""

    build: Callable[[int], Built]
    n: int
    block: int  # examples that a public tool differentiates at a time
    faster: int  # than the best public tool: what is asked
    above_floor: float | None = None


CASES = {
    "fully_connected": Case(images(fully_connected, (1, 28, 28), 10), 1024, 64, 100),
    "cnn": Case(images(cnn, (3, 32, 32), 10), 2048, 128, 2, 1.3),
    "resnet20": Case(images(resnet20, (3, 32, 32), 100), 2048, 128, 2, 1.3),
    "transformer": Case(sequences, 512, 64, 3),
}


def ours(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    memory: int | None = None,
    parameters: list[str] | None = None,
    check: bool = False,
) -> Matrix:
    """Without the checks against float64, which no public tool makes."""
    matrix = cosine_matrix(
        model,
        "cross_entropy",
        (inputs, targets),
        memory=memory,
        parameters=parameters,
        check=check,
    )
    return matrix.values, json.loads(matrix.attrs["parameters"])


def checked(model: nn.Module, inputs: Tensor, targets: Tensor, **settings: Any) -> Matrix:
    """As it is used: with the self-check and the error bound of the matrix."""
    return ours(model, inputs, targets, check=True, **settings)


def unwatched(model: nn.Module, inputs: Tensor, targets: Tensor, **settings: Any) -> Matrix:
    """Like for like: float32 may be on the wrong side of a kink, as in every public tool."""
    with mock.patch.object(PerExampleGradients, "_is_rounded", False):
        return ours(model, inputs, targets, **settings)


def with_torch_func(model: nn.Module, inputs: Tensor, targets: Tensor, *, block: int) -> Matrix:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, chosen, (x.unsqueeze(0),))
        return F.cross_entropy(outputs, y.unsqueeze(0))

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def blocks() -> Iterator[list[Tensor]]:
        for part in parts_of(len(targets), block):
            with sdpa_kernel(SDPBackend.MATH):  # vmap loops over the other kernels
                grads = per_example(parameters, inputs[part], targets[part])
            yield list(grads.values())

    return product_of_unit_rows(blocks(), len(targets)), list(parameters)


def with_backpack(model: nn.Module, inputs: Tensor, targets: Tensor, *, block: int) -> Matrix:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(copy.deepcopy(model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    covered: list[str] = []

    def blocks() -> Iterator[list[Tensor]]:
        for part in parts_of(len(targets), block):
            with backpack(BatchGrad()):
                loss(model(inputs[part]), targets[part]).backward()
            found = {n: p for n, p in model.named_parameters() if hasattr(p, "grad_batch")}
            covered[:] = found
            grads = [p.grad_batch for p in found.values()]
            for p in found.values():
                del p.grad_batch
            yield grads

    return product_of_unit_rows(blocks(), len(targets)), covered


def with_kronfluence(model: nn.Module, inputs: Tensor, targets: Tensor, *, block: int) -> Matrix:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.module.tracked_module import TrackedModule
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class SumOfLosses(Task):
        def compute_train_loss(self, batch: list[Tensor], model: nn.Module, **_: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, examples = SumOfLosses(), TensorDataset(inputs, targets)
    model = prepare_model(copy.deepcopy(model), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("pairs", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "identity", examples, factor_args=FactorArguments(strategy="identity")
        )
        analyzer.compute_pairwise_scores(
            "cosines",
            "identity",
            query_dataset=examples,
            train_dataset=examples,
            per_device_query_batch_size=min(QUERIES, len(targets)),
            per_device_train_batch_size=block,
        )
        products = analyzer.load_pairwise_scores("cosines")["all_modules"].numpy()
    covered = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, TrackedModule)
        for parameter, _ in module.original_module.named_parameters()
    ]
    return products, covered


def parts_of(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def product_of_unit_rows(blocks: Iterable[list[Tensor]], n: int) -> np.ndarray:
    """Lay each block's gradients, parameter beside parameter, into one (N, P); multiply once."""
    G, start = torch.empty(0), 0
    for grads in blocks:
        rows = [g.flatten(1) for g in grads]
        if start == 0:
            G = torch.empty(n, sum(r.shape[1] for r in rows))
        stop = start + len(rows[0])
        torch.cat(rows, dim=1, out=G[start:stop])
        start = stop
    G /= torch.linalg.vector_norm(G, dim=1, keepdim=True)
    return (G @ G.T).numpy()


TOOLS: dict[str, Callable[..., Matrix]] = {
    "ours": ours,
    "checked": checked,
    "unwatched": unwatched,
    "torch.func": with_torch_func,
    "BackPACK": with_backpack,
    "kronfluence": with_kronfluence,
}
PACKAGES = {"BackPACK": "backpack", "kronfluence": "kronfluence"}
OURS = ("ours", "checked", "unwatched")
PUBLIC = [tool for tool in TOOLS if tool not in OURS]


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(child(options)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores\n")
    rows, notes = [], []
    for name in options.cases:
        row, found = compare(name, options)
        rows.append(row)
        notes += found
    head = ["case", "N", "P", *options.tools, "ours, first and last", "best public / ours"]
    head += [
        "ours with all checks, as it is used (best public / that)",
        "ours without the watch for kinks (best public / that)",
        "floor",
        "ours / floor",
        "with the fastest product",
    ]
    head += ["ours with little memory", "its memory / best public's"]
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    print("", *notes, sep="\n")


def compare(name: str, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Run one case; return its row of the table and the notes below it."""
    with tempfile.TemporaryDirectory() as folder:
        first = run(name, "ours", options, f"{folder}/ours.npy")
        found = {tool: run(name, tool, options, f"{folder}/{tool}.npy") for tool in options.tools}
        floor = run(name, "floor", options)
        last = run(name, "ours", options, f"{folder}/last.npy")
        whole = run(name, "checked", options, f"{folder}/checked.npy")
        bare = run(name, "unwatched", options, f"{folder}/bare.npy")
        little = run(name, "ours", with_little_memory(options, first), f"{folder}/little.npy")
        notes = [
            f"- {name}, {tool}: {agreement(name, result, first, options)}"
            for tool, result in found.items()
        ]
    if any("why" in result for result in (first, last, whole, bare)):
        row = [name, "-", "-", *(in_cell(result) for result in found.values()), "cannot"]
        why = next(result["why"] for result in (first, last, whole, bare) if "why" in result)
        return [*row, *"--------"], [f"- {name}, ours: {why}", *notes]
    about = "product at {rate:.0f} GFLOP/s by torch, at {fastest:.0f} by ours".format(
        **{key: floor[key] / 1e9 for key in ("rate", "fastest")}
    )
    return as_row(name, found, (first, last, little, bare, whole), floor), [
        f"- {name}, ours: {about}",
        *notes,
    ]


def with_little_memory(options: argparse.Namespace, first: Result) -> argparse.Namespace:
    """Give ours about a fifth of what N×P numbers take."""
    budget = int(first.get("n", 0) * first.get("n_parameters", 0) * 4 / 5)
    return argparse.Namespace(**{**vars(options), "memory": max(budget, SMALLEST_BUDGET)})


def as_row(
    name: str,
    found: Mapping[str, Result],
    ours: tuple[Result, Result, Result, Result, Result],
    floor: Result,
) -> list[str]:
    case = CASES[name]
    little, bare, whole = ours[2:]
    seconds = statistics.median(result["seconds"] for result in ours[:2])
    peak = max(result["peak"] for result in ours[:2])
    above, above_fastest = (
        seconds / (floor["pass"] + floor["product"] * floor["rate"] / floor[rate])
        for rate in ("rate", "fastest")
    )
    ranked = [result for result in found.values() if result.get("missed") == []]
    best = min(ranked, key=lambda result: result["seconds"], default=None)
    against, alike, as_used = ["-", "-"], "", ""
    if best:
        asked = "asked: 0.25" if best["holds_all"] else "not N×P numbers"
        against = [
            f"{best['seconds'] / seconds:.1f} (asked: {case.faster})",
            f"{little['peak'] / best['peak']:.2f} ({asked})" if "peak" in little else "-",
        ]
        alike = f" ({best['seconds'] / bare['seconds']:.1f})"
        as_used = f" ({best['seconds'] / whole['seconds']:.1f})"
    return [
        name,
        f"{ours[0]['n']:,}",
        f"{ours[0]['n_parameters']:,}",
        *(in_cell(result) for result in found.values()),
        f"{in_seconds(ours[0]['seconds'])} and {in_seconds(ours[1]['seconds'])}, {in_words(peak)}",
        against[0],
        f"{in_seconds(whole['seconds'])}{as_used}",
        f"{in_seconds(bare['seconds'])}{alike}",
        f"{in_seconds(floor['pass'])} + {in_seconds(floor['product'])}",
        f"{above:.2f}" + (f" (asked: {case.above_floor})" if case.above_floor else ""),
        f"{above_fastest:.2f}",
        in_cell(little),
        against[1],
    ]


def agreement(name: str, result: Result, first: Result, options: argparse.Namespace) -> str:
    """Say how far a tool's matrix is from ours over the same parameters."""
    if "why" in result:
        return result["why"]
    reference, over = first, ""
    if result["missed"]:
        path = f"{result['out']}.ours.npy"
        reference = run(name, "ours", options, path, result["covered"])
        share = result["share"]
        over = f"; covers {share:.0%} of P, not {', '.join(as_modules(result['missed']))}"
    if "why" in reference:
        return f"ours {reference['why']}{over}"
    worst = np.abs(np.load(result["out"]) - np.load(reference["out"])).max()
    return f"largest difference from ours {worst:.1e}{over}"


def as_modules(parameters: Iterable[str]) -> list[str]:
    """Name the modules of parameters, once each."""
    return list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in parameters))


def in_cell(result: Result) -> str:
    if "seconds" not in result:
        return "cannot" if result["why"].startswith("cannot") else result["why"]
    cell = f"{in_seconds(result['seconds'])}, {in_words(result['peak'])}"
    return f"cannot ({result['share']:.0%} of P: {cell})" if result["missed"] else cell


def in_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def run(
    case: str,
    tool: str,
    options: argparse.Namespace,
    out: str = "",
    parameters: list[str] | None = None,
) -> Result:
    """Run one tool in a process of its own; `why` where it makes no matrix."""
    command = [sys.executable, __file__, "--child", case, tool, "--out", out]
    command += ["--examples", str(options.examples or CASES[case].n)]
    command += ["--memory", str(options.memory)] if options.memory else []
    command += ["--parameters", *parameters] if parameters else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if tool == "floor":
            raise RuntimeError(done.stderr)
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"why": f"cannot: {lines[-1][:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> Result:
    """Time one tool on one case, and keep its matrix."""
    case, tool = options.child
    if tool in PACKAGES and not importlib.util.find_spec(PACKAGES[tool]):
        return {"why": "not installed (pip install 'distributed_stiffness[bench]')"}
    torch.manual_seed(0)
    model, inputs, targets = CASES[case].build(options.examples)
    model.eval()
    if tool == "floor":
        return floor(model, inputs, targets)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    settings: dict[str, Any] = {"block": CASES[case].block}
    if tool in OURS:
        settings = {"memory": options.memory, "parameters": options.parameters}
    TOOLS[tool](model, inputs[:FEW], targets[:FEW], **settings)
    seconds, peak, (products, covered) = measured(
        functools.partial(TOOLS[tool], model, inputs, targets, **settings)
    )
    np.save(options.out, as_cosines(products))
    return {
        "n": options.examples,
        "n_parameters": sum(sizes.values()),
        "seconds": seconds,
        "peak": peak,
        "covered": covered,
        "missed": [name for name in sizes if name not in covered],
        "share": sum(sizes[name] for name in covered) / sum(sizes.values()),
        "holds_all": tool in ("torch.func", "BackPACK"),
        "out": options.out,
        "memory": settings.get("memory"),
    }


def as_cosines(products: np.ndarray) -> np.ndarray:
    """Divide by the norms of rows and columns: N² operations, which no tool's seconds hold."""
    norms = np.sqrt(np.maximum(products.diagonal().astype(np.float64), 1e-300))
    return (products / norms[:, None] / norms).astype(np.float32)


def measured(work: Callable[[], Matrix]) -> tuple[float, int, Matrix]:
    """Return the seconds, the growth of the peak memory over that before, and the result."""
    gc.collect()
    anew = forget_peak()
    before = status_bytes("VmRSS")
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    whole_life = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (status_bytes("VmHWM") if anew else whole_life) - before, result


def forget_peak() -> bool:
    """Let the kernel count the peak of this process from now on, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def floor(model: nn.Module, inputs: Tensor, targets: Tensor) -> Result:
    """Time a training pass; the product's seconds follow from the speed of a large one."""

    def training_pass(n: int) -> float:
        started = time.perf_counter()
        for part in parts_of(n, BATCH):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs[part]), targets[part]).backward()
        return time.perf_counter() - started

    training_pass(FEW)
    rate = product_rate()
    fastest = max(rate, product_rate(product_of_rows))
    n, n_parameters = len(targets), sum(p.numel() for p in model.parameters())
    product = n * n * n_parameters / rate
    return {"pass": training_pass(n), "product": product, "rate": rate, "fastest": fastest}


def product_of_torch(X: Tensor, Y: Tensor) -> Tensor:
    return X @ Y.T


def product_rate(
    product: Callable[[Tensor, Tensor], Tensor] = product_of_torch,
    *,
    rows: int = 2048,
    depth: int = 4096,
) -> float:
    """Floating-point operations a second of a float32 product, the best of five."""
    X, Y = torch.randn(rows, depth), torch.randn(rows, depth)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(X, Y)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * rows * depth / min(seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tools", nargs="*", choices=PUBLIC, default=PUBLIC, help="beside ours")
    parser.add_argument("--examples", type=int, help="N of every case")
    parser.add_argument("--memory", type=int, help="bytes of ours (default: half of what is free)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--parameters", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
