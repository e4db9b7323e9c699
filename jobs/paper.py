"""The paper's claims, tested: the studies behind its figures, and a table of what they show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
import xarray as xr

from distributed_stiffness.analysis.claims import (
    Claim,
    diagonal_at,
    fall_after_onset,
    length_change,
    length_inside,
    rate_effect,
    slope_at,
    superclasses_show,
    table,
    true_minus_permuted,
)
from distributed_stiffness.cli import run_app
from distributed_stiffness.engine import Run, run_study
from distributed_stiffness.errors import StudyError
from distributed_stiffness.study import Data, Model, Study, Training

Scale = Literal["quick", "full"]
EARLY = 500  # optimiser steps: about a quarter of an epoch at batch 32
FIGURES = ("mnist", "fashion_mnist", "cifar10")  # with true labels
_SEEDS = {"quick": (0, 1, 2), "full": (0, 1, 2, 3, 4)}
_RATES = {"quick": (3e-4, 3e-3), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
_LONG = {"quick": 1, "full": 6}  # times the steps


def studies(scale: Scale, *, accept_unverified: bool = False) -> dict[str, Study]:
    """Return the studies by the names of their stores."""
    steps = (0, 50, 150, EARLY, 1000, 2000, 4000, 10_000, 20_000)

    def study(
        name: str, data: str, model: str, last: int, examples: int, **fields: object
    ) -> Study:
        permuted = 1.0 if name == "permuted_labels" else 0.0
        return Study(
            title=name.replace("_", " "),
            data=Data(
                name=data,
                validation_examples=examples,
                permuted_labels=permuted,
                accept_unverified=accept_unverified,
            ),
            model=Model(name=model),
            training=Training(
                **{
                    "learning_rates": _RATES[scale],
                    "seeds": _SEEDS[scale],
                    "iterations": (*(k for k in steps if k < last), last * _LONG[scale]),
                }
                | fields  # type: ignore[arg-type]
            ),
        )

    one = {"learning_rates": (1e-3,), "seeds": (0,)}
    return {
        "mnist": study("mnist", "mnist", "fully_connected", 18_750, 500),
        "permuted_labels": study("permuted_labels", "mnist", "fully_connected", 4500, 500),
        "fashion_mnist": study("fashion_mnist", "fashion_mnist", "fully_connected", 18_750, 500),
        "cifar10": study("cifar10", "cifar10", "cnn", 46_890, 500, **one),
        "cifar100": study("cifar100", "cifar100", "cnn", 12_504, 3000, **one),
    }


def claims(made: dict[str, Study]) -> list[Claim]:
    """Return the paper's claims about these studies."""
    runs = [(n, rate) for n in FIGURES for rate in made[n].training.learning_rates]
    return [
        *(claim for name, rate in runs for claim in _overfitting(made, name, rate)),
        *(c for rate in made["mnist"].training.learning_rates for c in _permuted(made, rate)),
        *(c for name in ("mnist", "fashion_mnist") for c in _rates(name)),
        *(claim for name, rate in runs for claim in _distance(made, name, rate)),
        *_superclasses(made),
    ]


def _overfitting(made: dict[str, Study], name: str, rate: float) -> Iterator[Claim]:
    where = f"{made[name].title}, rate {rate:g}"
    yield Claim(
        number="1a",
        claimed="the diagonal is positive early",
        quantity=f"mean C(a, a), cosine, step {EARLY}: {where}",
        expected="> 0",
        source="v1 fig. 3, 5, 6",
        studies=(name,),
        measure=partial(diagonal_at, study=name, rate=rate, step=EARLY),
    )
    yield Claim(
        number="1b",
        claimed="over-fitting sends it toward 0",
        quantity=f"mean C(a, a), cosine, at least validation loss − at the end: {where}",
        expected="> 0",
        source="v1 sect. 4.1; v3 fig. 3",
        studies=(name,),
        measure=partial(fall_after_onset, study=name, rate=rate),
    )


def _permuted(made: dict[str, Study], rate: float) -> Iterator[Claim]:
    for step in (EARLY, 4000):
        for gap in (False, True):
            what = "gap within − between" if gap else "mean C(a, a)"
            yield Claim(
                number="2b" if gap else "2a",
                claimed="permuted labels: no rise "
                + ("of the class structure" if gap else "within classes"),
                quantity=f"{what}, cosine, true − permuted labels, step {step}:"
                f" {made['mnist'].title}, rate {rate:g}",
                expected="> 0",
                source="v1 fig. 4",
                studies=("mnist", "permuted_labels"),
                measure=partial(
                    true_minus_permuted,
                    true="mnist",
                    permuted="permuted_labels",
                    rate=rate,
                    step=step,
                    gap=gap,
                ),
            )


def _rates(name: str) -> Iterator[Claim]:
    for loss, which in enumerate(("high", "middle", "low")):
        yield Claim(
            number="3",
            claimed="a higher rate gives higher between-class stiffness at equal loss",
            quantity=f"S_between, sign, highest − lowest rate, {which} loss:"
            f" {name.replace('_', ' ')}",
            expected="> 0",
            source="v1 fig. 8; v2 the opposite",
            studies=(name,),
            measure=partial(rate_effect, study=name, loss=loss),
        )


def _distance(made: dict[str, Study], name: str, rate: float) -> Iterator[Claim]:
    where, last = f"{made[name].title}, rate {rate:g}", made[name].iterations[-1]
    for step in (EARLY, last):
        yield Claim(
            number="4a",
            claimed="stiffness falls with distance",
            quantity=f"slope within classes, cosine, step {step}: {where}",
            expected="< 0",
            source="v1 fig. 9; v3",
            studies=(name,),
            measure=partial(slope_at, study=name, rate=rate, step=step),
        )
        yield Claim(
            number="4b",
            claimed="and crosses zero at ξ, among the distances that occur",
            quantity=f"ξ within classes, cosine, step {step}: {where}",
            expected="inside",
            source="v2, v3",
            studies=(name,),
            measure=partial(length_inside, study=name, rate=rate, step=step),
        )
    yield Claim(
        number="4c",
        claimed="ξ shrinks with training",
        quantity=f"ξ at step {last} − at step {EARLY}: {where}",
        expected="< 0",
        source="v2 abstract",
        studies=(name,),
        measure=partial(length_change, study=name, rate=rate, steps=(EARLY, last)),
    )


def _superclasses(made: dict[str, Study]) -> Iterator[Claim]:
    training = made["cifar100"].training
    for step in (EARLY, 4000, made["cifar100"].iterations[-1]):
        yield Claim(
            number="5",
            claimed="CIFAR-100's matrix shows its super-classes",
            quantity=f"C(a, b), cosine, within − across super-classes, step {step}: cifar100",
            expected="> 0",
            source="v1, v3 abstracts",
            studies=("cifar100",),
            measure=partial(
                superclasses_show, study="cifar100", rate=training.learning_rates[0], step=step
            ),
        )


command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@command.command(help=__doc__)
def main(
    store: Annotated[Path, typer.Option(help="Folder of the stores.")] = Path("results/paper"),
    data_dir: Annotated[str | None, typer.Option(help="Folder of data sets.")] = None,
    download: Annotated[bool, typer.Option(help="Download what is missing.")] = True,
    accept_unverified_data: Annotated[
        bool,
        typer.Option(
            "--accept-unverified-data",
            help="Read files whose checksums are not the published ones; the stores say so.",
        ),
    ] = False,
    scale: Annotated[
        str, typer.Option(help="quick: minutes on two cores; full: more rates, seeds and steps.")
    ] = "quick",
    only: Annotated[
        str | None, typer.Option(help="Comma-separated studies to run now; no table of the others.")
    ] = None,
    engine: Annotated[str, typer.Option(help="ray, or serial: this process alone.")] = "ray",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a replica.")] = None,
) -> None:
    made = studies(_scale(scale), accept_unverified=accept_unverified_data)
    chosen = _chosen(only, made)
    how = Run(
        data_directory=data_dir,
        download=download,
        engine="serial" if engine == "serial" else "ray",
        address=address,
        threads=threads,
    )
    paths = {name: str(store / scale / f"{name}.zarr") for name in chosen}
    for name, path in paths.items():
        run_study(made[name], replace(how, store=path))
    opened = {name: xr.open_zarr(path) for name, path in paths.items()}
    ready = [claim for claim in claims(made) if set(claim.studies) <= set(opened)]
    typer.echo(table(ready, [claim.measure(opened) for claim in ready]))


def _scale(text: str) -> Scale:
    if text == "quick":
        return "quick"
    if text == "full":
        return "full"
    raise StudyError(f"--scale is {text!r}: expected quick or full")


def _chosen(only: str | None, made: dict[str, Study]) -> list[str]:
    wanted = list(made) if only is None else [name.strip() for name in only.split(",")]
    if unknown := sorted(set(wanted) - set(made)):
        raise StudyError(f"--only names {unknown[0]!r}: expected some of {', '.join(made)}")
    return wanted


if __name__ == "__main__":
    run_app(command)
