"""The tables of the report: cells as people read them, and as software does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness.analysis import Summary
from distributed_stiffness.figures.checkpoints import (
    RUN,
    Names,
    of_seed,
    seeds_note,
    with_run_dims,
)
from distributed_stiffness.report.findings import interval_text
from distributed_stiffness.report.words import bound, measured, number, percent
from distributed_stiffness.study import rate_in_words

MEASURES = ("sign", "cosine")
_CURVES = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "train_accuracy": "training accuracy",
    "validation_accuracy": "validation accuracy",
}


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and the columns of a CSV that it becomes."""

    text: str
    values: Mapping[str, Any]  # by what is added to the name of the column

    @property
    def csv(self) -> str:
        """The values as JSON; null is not known."""
        known = {k: None if _is_nan(v) else v for k, v in self.values.items()}
        return json.dumps(known)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a heading."""

    name: str  # of its element in the page
    title: str
    note: str = ""
    head: Sequence[tuple[str, str]]  # name of a column in a CSV, and as people read it
    rows: Sequence[Sequence[Cell]]


def tables(numbers: Summary) -> list[Table]:
    """Return every table that a study has the numbers for."""
    made = [_stages(numbers), _lengths(numbers), _training(numbers), _exactness(numbers)]
    return [table for table in made if table is not None]


def _stages(numbers: Summary) -> Table:
    """Within and between at every checkpoint, means over seeds."""
    means, names = of_seed(numbers.within_between, None), Names.of(numbers.curves)
    rows = []
    for place, at in _checkpoints(means, names):
        cells = []
        for measure, digits in (("sign", 2), ("cosine", 3)):
            related = (at.sel(relation=r) for r in ("within", "between"))
            cells += [_mean(one, measure, digits) for one in related]
            cells.append(_mean(at, f"{measure}_gap", digits))
        rows.append([*place, *cells, _count(at["pairs"].sum())])
    seeds = seeds_note(numbers.within_between, None)
    return Table(
        name="stages",
        title="Stiffness within and between classes" + (f" ({seeds})" if seeds else ""),
        head=[
            *_place_names(means, names),
            *((f"{m}_{r}", f"{m}, {r}") for m in MEASURES for r in ("within", "between", "gap")),
            ("pairs", "pairs"),
        ],
        rows=rows,
    )


def _lengths(numbers: Summary) -> Table | None:
    """ξ at every checkpoint, or None where there are no distances."""
    if numbers.critical_length is None:
        return None
    length, names = with_run_dims(numbers.critical_length), Names.of(numbers.curves)
    rows = [
        [*place, *(cell for measure in MEASURES for cell in _fit(at, measure))]
        for place, at in _checkpoints(length, names)
    ]
    columns = (("length", "ξ"), ("length_interval", "interval"), ("slope", "slope"))
    return Table(
        name="lengths",
        title="Critical length ξ within a class",
        note="Zero of the line through mean stiffness against input distance, weighted by pairs."
        " The interval holds the distances at which the line is within two of its errors of zero."
        " Extrapolated: ξ lies outside the distances that occur. Not determined: the slope is not"
        " below zero by two of its errors, so there is no interval. A dash: too few pairs.",
        head=[
            *_place_names(length, names),
            *((f"{m}_{name}", f"{text}, {m}") for m in MEASURES for name, text in columns),
        ],
        rows=rows,
    )


def _fit(at: xr.Dataset, measure: str) -> list[Cell]:
    """Return ξ (with a note where it is an extrapolation), its interval and the slope."""
    name = f"{measure}_length"
    slope = _mean(at, f"{measure}_slope")
    ends = {f"_{end}": float(at[f"{name}_{end}"]) for end in ("low", "high")}
    if not np.isfinite(at[name]):
        text = "not determined" if np.isfinite(at[f"{measure}_slope"]) else "–"
        unknown = dict.fromkeys(("", "_error"), np.nan) | {"_inside": None}
        return [Cell(text, unknown), Cell("–", ends), slope]
    inside = bool(at[f"{measure}_inside"])
    text = measured(at, name) + ("" if inside else " (extrapolated)")
    length = Cell(text, {**_mean(at, name).values, "_inside": inside})
    return [length, Cell(interval_text(at, measure), ends), slope]


def _training(numbers: Summary) -> Table | None:
    """Training curves at every checkpoint."""
    curves, names = with_run_dims(numbers.curves), Names.of(numbers.curves)
    known = [name for name in _CURVES if name in curves and curves[name].notnull().any()]
    there = {name: _CURVES[name] for name in known}
    if not there:
        return None
    rows = [
        [*place, *(_number(float(at[name]), partial(number, digits=3)) for name in there)]
        for place, at in _checkpoints(curves, names)
    ]
    return Table(
        name="training",
        title="Training" if names.trained_here else "Loss and accuracy",
        head=[*_place_names(curves, names), *there.items()],
        rows=rows,
    )


def _exactness(numbers: Summary) -> Table | None:
    """Error bounds, open signs and zero gradients of every checkpoint."""
    curves, names = with_run_dims(numbers.curves), Names.of(numbers.curves)
    columns = {
        "error_bound": ("error bound of a cosine", bound),
        "undecided": ("undecided pairs", lambda n: f"{n:,.0f}" if n >= 0 else "–"),
        "undecided_share": ("share of all pairs", _share),
        "zero_gradients": ("examples with a gradient of zero", lambda n: f"{n:,.0f}"),
    }
    there = {name: column for name, column in columns.items() if name in curves}
    if not there:
        return None
    rows = [
        [*place, *(_number(float(at[name]), write) for name, (_, write) in there.items())]
        for place, at in _checkpoints(curves, names)
    ]
    return Table(
        name="exactness",
        title="How exact the cosines are",
        note="Undecided pairs have a cosine smaller than its error bound: their sign is not"
        " certain. An example with a gradient of zero has sign 0 with every other, and no part in"
        " cosine means.",
        head=[*_place_names(curves, names), *((name, text) for name, (text, _) in there.items())],
        rows=rows,
    )


def _share(value: float) -> str:
    return percent(value) if np.isfinite(value) else "–"


def _place_names(ds: xr.Dataset, names: Names) -> list[tuple[str, str]]:
    """Return the columns that say which checkpoint a row is of; none for what was not given."""
    columns = [
        ("learning_rate", "learning rate", names.rate),
        ("seed", "seed", names.seed),
        ("iteration", "step", names.step),
    ]
    return [(dim, text) for dim, text, given in columns if given and dim in ds.dims]


def _checkpoints(ds: xr.Dataset, names: Names) -> Iterator[tuple[list[Cell], xr.Dataset]]:
    """Go through the checkpoints: cells that say which, and its numbers."""
    said = [dim for dim, _ in _place_names(ds, names)]
    dims = [dim for dim in RUN if dim in ds.dims]
    for at in np.ndindex(*(ds.sizes[dim] for dim in dims)):
        one = ds.isel(dict(zip(dims, at, strict=True)))
        yield [_place(dim, one[dim].item()) for dim in said], one


def _place(dim: str, value: float) -> Cell:
    text = rate_in_words(value) if dim == "learning_rate" else f"{value:,}"
    return Cell(text if dim != "seed" else str(value), {"": value})


def _mean(at: xr.Dataset, name: str, digits: int = 2) -> Cell:
    """Return a mean with the errors that are there."""
    ends = [end for end in ("", "_error", "_seed_error") if f"{name}{end}" in at]
    return Cell(measured(at, name, digits), {end: float(at[f"{name}{end}"]) for end in ends})


def _number(value: float, write: Any) -> Cell:
    return Cell(write(value), {"": value})


def _count(value: xr.DataArray) -> Cell:
    return Cell(f"{int(value):,}", {"": int(value)})


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not np.isfinite(value)
