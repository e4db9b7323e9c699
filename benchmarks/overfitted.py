"""What over-fitting does to signs and cosines: plain float32 against ours, against float64.

    python benchmarks/overfitted.py --data-dir DIR --figure docs/images/overfitted.png

A network is trained far beyond the point where its validation loss is least. At some epochs all
pairs of validation examples are computed: by one-example float64 autograd, which is the truth
here; by the public tools in plain float32, as they do it; and by `cosine_matrix` in three
precisions, each with the error bound that it states. A sign is wrong where it is not that of the
truth; a pair with a gradient that vanished has none. Prints a Markdown table for each network; the
figure shows what the wrong numbers make of the means within and between classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradients import with_backpack, with_torch_func
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.gradients import cosine_matrix
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.models import cnn, fully_connected, resnet20
from distributed_stiffness.study import Data

BATCH, RATE = 32, 1e-3  # Adam
BLOCK = 64  # examples that a public tool differentiates at a time
SATURATED = 1e-7  # 1 − p of an example that float32 takes for a perfect fit
PRECISIONS = ("float32", "float64", "bf16")
MEMORY = 3 * 10**9  # bytes of float64 gradients of the truth


@dataclass(frozen=True)
class Case:
    """A network, its data, and how long it is trained."""

    title: str
    build: Callable[..., nn.Module]
    data: str
    n_train: int
    epochs: tuple[int, ...]


CASES = {
    "fully_connected": Case(
        "Fully connected net, MNIST", fully_connected, "mnist", 20_000, (1, 5, 10, 20, 40)
    ),
    "cnn": Case("CNN, CIFAR-10", cnn, "cifar10", 2_000, (10, 50, 100, 200, 400)),
    "resnet20": Case("ResNet-20, CIFAR-10", resnet20, "cifar10", 2_000, (5, 20, 40, 60, 100)),
}


@dataclass(frozen=True)
class Column:
    """One way to compute all pairs, at one epoch, against the truth."""

    wrong: int  # signs
    largest: float  # |Δcosine|
    within: float  # mean cosine within classes, self-pairs left out
    between: float  # mean sign between classes
    bound: float | None = None  # that it states itself
    wrong_outside: int = 0  # wrong signs of pairs whose |cosine| is above the bound


@dataclass(frozen=True)
class Row:
    """One epoch."""

    epoch: int
    train_loss: float
    validation_loss: float
    saturated: int  # examples of the matrix with 1 − p < SATURATED
    vanished: int  # examples whose gradient is zero in plain float32
    truth_within: float
    truth_between: float
    columns: dict[str, Column]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Full backward hook")  # BackPACK's, of no consequence here
    print(f"torch {torch.__version__}, {options.threads} threads, {os.cpu_count()} cores\n")
    found = {name: run(name, options) for name in options.cases}
    for name, rows in found.items():
        print(table(name, rows, options.examples))
    if options.json:
        options.json.write_text(json.dumps(found, default=dataclasses.asdict, indent=1))
    if options.figure:
        draw(found, options.figure)


def run(name: str, options: argparse.Namespace) -> list[Row]:
    """Train a case; return what was found at each of its epochs."""
    case = CASES[name]
    data = select(
        Data(
            name=case.data,
            validation_examples=options.examples,
            accept_unverified=options.accept_unverified_data,
        ),
        directory=options.data_dir,
    )
    labels = torch.from_numpy(data.examples.labels).long()
    inputs = torch.from_numpy(data.inputs(slice(None)))
    rows = []
    for epoch, model, train_loss in trained(case, data, options.shrink):
        began = time.perf_counter()
        row = look(epoch, model, train_loss, inputs, labels, options.backpack)
        rows.append(row)
        took = time.perf_counter() - began
        print(f"{name}, epoch {epoch}: loss {train_loss:.2g}, {took:.0f} s", flush=True)
    return rows


def trained(case: Case, data: StudyData, shrink: int) -> Iterator[tuple[int, nn.Module, float]]:
    """Train; yield the epoch, the network and its training loss at each of the case's epochs."""
    train = data.labelled.train
    if train is None:
        raise ValueError(f"{case.data} has no training split")
    chosen = np.sort(np.random.default_rng(0).permutation(len(train.labels))[: case.n_train])
    inputs = torch.from_numpy(data.preprocessing(train.inputs[chosen]))
    labels = torch.from_numpy(train.labels[chosen]).long()
    torch.manual_seed(0)
    model = case.build(data.labelled.input_shape, data.labelled.n_classes)
    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    for epoch in range(1, case.epochs[-1] // shrink + 1):
        model.train()
        for batch in torch.randperm(len(labels)).split(BATCH):
            adam.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            adam.step()
        if epoch in [max(1, e // shrink) for e in case.epochs]:
            model.eval()
            yield epoch, model, mean_loss(model, inputs, labels)


@torch.no_grad()
def mean_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    parts = zip(inputs.split(500), labels.split(500), strict=True)
    return sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in parts) / len(labels)


def look(
    epoch: int,
    model: nn.Module,
    train_loss: float,
    inputs: Tensor,
    labels: Tensor,
    backpack: bool,
) -> Row:
    """Compute all pairs in every way."""
    truth = Reference(model, "cross_entropy", [name for name, _ in model.named_parameters()])
    true = truth.cosines(inputs, labels, memory=MEMORY).numpy()
    columns, vanished = {}, 0
    tools = {"torch.func": with_torch_func} | ({"BackPACK": with_backpack} if backpack else {})
    for tool, make in tools.items():
        products, covered = make(model, inputs, labels, block=BLOCK)
        if len(covered) < len(list(model.parameters())):
            continue  # a tool that cannot have all parameters has no column
        vanished = int(np.isnan(products.diagonal()).sum())  # 0 / 0
        columns[tool] = compared(np.nan_to_num(products), true, labels.numpy())
    for precision in PRECISIONS:
        made = cosine_matrix(model, "cross_entropy", (inputs, labels), precision=precision)
        bound = float(made.attrs["error_bound"])
        columns[f"ours, {precision}"] = compared(made.values, true, labels.numpy(), bound)
    within, between = means(true, labels.numpy())
    return Row(
        epoch=epoch,
        train_loss=train_loss,
        validation_loss=mean_loss(model, inputs, labels),
        saturated=count_saturated(model, inputs, labels),
        vanished=vanished,
        truth_within=within,
        truth_between=between,
        columns=columns,
    )


@torch.no_grad()
def count_saturated(model: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    logits = model(inputs).double()
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    odds = others - logits.gather(1, labels[:, None])[:, 0]
    return int((torch.sigmoid(odds) < SATURATED).sum())


def compared(
    made: np.ndarray, true: np.ndarray, labels: np.ndarray, bound: float | None = None
) -> Column:
    pairs = np.triu_indices(len(true), 1)
    ours, truth = made[pairs].astype(np.float64), true[pairs]
    wrong = np.sign(ours) != np.sign(truth)
    within, between = means(made, labels)
    return Column(
        wrong=int(wrong.sum()),
        largest=float(np.abs(ours - truth).max()),
        within=within,
        between=between,
        bound=bound,
        wrong_outside=0 if bound is None else int((wrong & (np.abs(ours) > bound)).sum()),
    )


def means(cosines: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the mean cosine of pairs within a class and the mean sign of pairs between classes."""
    same = labels[:, None] == labels
    others = ~np.eye(len(labels), dtype=bool)
    return float(cosines[same & others].mean()), float(np.sign(cosines[~same]).mean())


def table(name: str, rows: list[Row], n: int) -> str:
    """Write a case's rows in Markdown."""
    case, columns = CASES[name], list(rows[0].columns)
    head = ["epoch", "training loss", "validation loss", f"1 − p < {SATURATED:.0e}"]
    head += [f"{column}: wrong signs, largest Δcosine" for column in columns]
    lines = [f"{case.title}, {case.n_train:,} training images, {n * (n - 1) // 2:,} pairs:", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row.epoch}", f"{row.train_loss:.2g}", f"{row.validation_loss:.2g}"]
        cells += [f"{row.saturated:,} of {n:,}"]
        cells += [in_cell(column, n) for column in row.columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| epoch | cosine within classes: truth | " + " | ".join(columns[:1])]
    lines[-1] += " | sign between classes: truth | " + " | ".join(columns[:1]) + " |"
    lines.append("|" + "---|" * 5)
    for row in rows:
        plain = row.columns[columns[0]]
        lines.append(
            f"| {row.epoch} | {row.truth_within:.3f} | {plain.within:.3f} |"
            f" {row.truth_between:.3f} | {plain.between:.3f} |"
        )
    return "\n".join([*lines, ""])


def in_cell(column: Column, n: int) -> str:
    share = column.wrong / (n * (n - 1) / 2)
    cell = f"{column.wrong:,}" + (f" ({share:.1%})" if share >= 1e-3 else "")
    cell += f", {column.largest:.0e}"
    if column.bound is not None:
        cell += f" (bound {column.bound:.0e}"
        cell += f", {column.wrong_outside} outside)" if column.wrong_outside else ")"
    return cell


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """Draw the two means over epochs, true and in plain float32, a column for each network."""
    from matplotlib.figure import Figure

    from distributed_stiffness.figures import save
    from distributed_stiffness.figures.style import heading, style

    with style():
        figure = Figure(figsize=(3.4 * len(found) + 0.6, 5.4), layout="constrained")
        axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
        for (name, rows), column in zip(found.items(), axes.T, strict=True):
            draw_case(column, CASES[name], rows)
        axes[0, 0].set_ylabel("mean cosine,\nwithin classes")
        axes[1, 0].set_ylabel("mean sign,\nbetween classes")
        axes[0, 0].legend()
        heading(
            figure,
            "Late in training, plain float32 shows a network that is not there",
            "all pairs of validation examples; truth: one-example float64 autograd",
        )
    save(figure, path)


def draw_case(axes: Any, case: Case, rows: list[Row]) -> None:
    epochs = [row.epoch for row in rows]
    plain, ours = ([row.columns[c] for row in rows] for c in ("torch.func", "ours, float32"))
    for ax, true, mean in (
        (axes[0], [r.truth_within for r in rows], lambda c: c.within),
        (axes[1], [r.truth_between for r in rows], lambda c: c.between),
    ):
        ax.plot(epochs, true, color="black", lw=5, alpha=0.25, label="truth (float64)")
        ax.plot(epochs, [mean(c) for c in ours], "o-", color="C0", label="ours, float32")
        ax.plot(epochs, [mean(c) for c in plain], "s--", color="C1", label="plain float32")
        ax.axhline(0, color="0.5", lw=0.8, zorder=0)
    axes[0].set_title(case.title.replace(", ", ",\n"))
    axes[1].set_xlabel("epoch")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--examples", type=int, default=1000, help="of the matrix")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--data-dir", help="folder of data sets")
    parser.add_argument("--accept-unverified-data", action="store_true")
    parser.add_argument("--shrink", type=int, default=1, help="divide the epochs: for a trial")
    parser.add_argument("--figure", type=Path, help="where the figure goes")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    parser.add_argument("--no-backpack", dest="backpack", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
