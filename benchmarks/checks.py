"""What the checks of a study take: a markdown table on standard output.

    python benchmarks/checks.py [fully_connected cnn resnet20 transformer resnet18]

A case is one checkpoint with random weights and random examples, measured by `measure_checkpoints`
on the serial engine. Each check is timed where it stands in the run. Asked: of a run longer than a
minute the comparison of every batch takes at most a twentieth, and all checks together a tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from gradients import CASES, Built, images
from torch import Tensor, nn

from distributed_stiffness import Run, measure_checkpoints
from distributed_stiffness.engine import prepare, replica
from distributed_stiffness.gradients.batch_check import BatchCheck
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.models import resnet18

BUILT: dict[str, tuple[Callable[[int], Built], int]] = {
    **{name: (case.build, case.n) for name, case in CASES.items()},
    "resnet18": (images(resnet18, (3, 32, 32), 100), 1000),
}
ORDER = SELF, BATCH, SAMPLE, WHOLE = "self-check", "every batch", "sample", "whole matrix"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=list(BUILT))
    parser.add_argument("--examples", type=int, help="N of every case")
    parser.add_argument("--memory", type=int, help="bytes (default: a share of what is free)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    columns = ["case", "N", "P", "run", *ORDER, "together", "without a check"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns), flush=True)
    for name in options.cases:
        build, n = BUILT[name]
        print(row(name, build, options.examples or n, options.memory), flush=True)


def row(name: str, build: Callable[[int], Built], n: int, memory: int | None) -> str:
    """Run one case, and return its row of the table."""
    torch.manual_seed(0)
    model, inputs, targets = build(n)
    study(model, inputs[:16], targets[:16], memory)  # compiles and loads what it needs
    with timed() as seconds:
        started = time.perf_counter()
        study(model, inputs, targets, memory)
        whole = time.perf_counter() - started
    checks = sum(seconds.values())
    shares = (f"{seconds[what]:.3g} s ({seconds[what] / whole:.1%})" for what in ORDER)
    size = sum(p.numel() for p in model.parameters())
    cells = [name, f"{n:,}", f"{size:,}", f"{whole:.3g} s", *shares]
    return "| " + " | ".join([*cells, f"{checks / whole:.1%}", f"{whole - checks:.3g} s"]) + " |"


def study(model: nn.Module, inputs: Tensor, targets: Tensor, memory: int | None) -> None:
    """Measure one checkpoint of the network."""
    case: Any = sys.modules.setdefault("case", ModuleType("case"))
    case.network, case.data = (lambda: model), (lambda: (inputs, targets))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "step1.pt")
        measure_checkpoints(
            "case:network",
            "case:data",
            Path(folder) / "step1.pt",
            run=Run(store=Path(folder) / "s.zarr", engine="serial", quiet=True, memory=memory),
        )


@contextlib.contextmanager
def timed() -> Iterator[Counter[str]]:
    """Add up what each check takes; a check within another belongs to that one."""
    seconds: Counter[str] = Counter()
    within: list[str] = []

    def timing(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if within:
                return function(*args, **kwargs)
            within.append(what)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[what] += time.perf_counter() - started
                within.pop()

        return call

    places = (
        (prepare, "check_gradients", SELF),
        (BatchCheck, "agrees", BATCH),
        (replica, "sample_examples", SAMPLE),
        (Reference, "cosines", SAMPLE),
        (replica.Replica, "_undecided", SAMPLE),
        (replica.Replica, "_compared", WHOLE),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, what in places:
            made = timing(getattr(owner, name), what)
            stack.enter_context(mock.patch.object(owner, name, made))
        yield seconds


if __name__ == "__main__":
    sys.exit(main())
