"""The jackknife as it is defined: every example is deleted and everything reduced anew, in loops.

Imports nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from analysis import loops

Values = dict[Hashable, float]
ROWS_AND_COLUMNS, ROWS, COLUMNS = "both", "row", "column"


@dataclass(frozen=True)
class Pair:
    row: Hashable  # split and number of the example
    column: Hashable
    classes: tuple[str, str]
    above: tuple[str, str]
    distance: float
    cosine: float
    zero: bool  # a gradient of the two is


def pairs(one: xr.Dataset) -> list[Pair]:
    """All pairs of one checkpoint."""
    rows = list(zip(one["split"].values, one["example"].values.tolist(), strict=True))
    columns = list(zip(one["other_split"].values, one["other"].values.tolist(), strict=True))
    names = one["class_name"].values, one["other_class_name"].values
    key = "superclass_name" if "superclass_name" in one.coords else "class_name"
    above = one[key].values, one[f"other_{key}"].values
    distance = one["distance"].values.astype(float)
    return [
        Pair(
            rows[i],
            columns[j],
            (names[0][i], names[1][j]),
            (above[0][i], above[1][j]),
            distance[i, j],
            cosine,
            zero,
        )
        for i, j, cosine, zero in loops.pairs(one)
    ]


def block(ds: xr.Dataset, rows: str, columns: str) -> tuple[list[Pair], dict[Hashable, tuple]]:
    """The pairs of two splits, and of each of their examples its role and class."""
    found = [p for p in pairs(ds) if (p.row[0], p.column[0]) == (rows, columns)]
    role = ROWS_AND_COLUMNS if rows == columns else None
    who = {
        (split, number): (role or mine, name)
        for prefix, wanted, mine in (("", rows, ROWS), ("other_", columns, COLUMNS))
        for split, number, name in zip(
            ds[f"{prefix}split"].values,
            ds["example" if not prefix else "other"].values.tolist(),
            ds[f"{prefix}class_name"].values,
            strict=True,
        )
        if split == wanted
    }
    return found, who


def errors(
    statistic: Callable[[Sequence[Pair]], Values],
    found: list[Pair],
    strata: Sequence[Sequence[Hashable]],
) -> Values:
    """The jackknife's standard error of each value; NaN where a deletion leaves none."""
    names = list(statistic(found))
    total = dict.fromkeys(names, 0.0)
    for members in strata:
        values = [
            statistic([p for p in found if member not in (p.row, p.column)]) for member in members
        ]
        n = len(members)
        for name in names:
            some = [value.get(name, math.nan) for value in values]
            mean = math.fsum(some) / n
            total[name] += (n - 1) / n * math.fsum((value - mean) ** 2 for value in some)
    return {name: math.sqrt(value) for name, value in total.items()}


def strata(who: dict[Hashable, tuple], *, by_class: bool) -> list[list[Hashable]]:
    """Examples by role, and by class if asked for."""
    found: dict[Hashable, list[Hashable]] = {}
    for name, (role, class_name) in who.items():
        found.setdefault((role, class_name if by_class else None), []).append(name)
    return list(found.values())


def mean(found: Sequence[Pair], measure: str) -> float:
    """The mean of some pairs; NaN of none."""
    if measure == "cosine":
        values = [p.cosine for p in found if not p.zero]
    else:
        values = [float(np.sign(p.cosine)) for p in found]
    return math.fsum(values) / len(values) if values else math.nan


def means(found: Sequence[Pair], measure: str, key: Callable[[Pair], Hashable | None]) -> Values:
    """Means by a key of the pair; None leaves it out."""
    groups: dict[Hashable, list[Pair]] = {}
    for pair in found:
        if (name := key(pair)) is not None:
            groups.setdefault(name, []).append(pair)
    return {name: mean(group, measure) for name, group in groups.items()}


def mean_of_cells(cells: Values, names: Sequence[Hashable]) -> float:
    """Mean of some cells, every one alike; NaN where one is not there."""
    values = [cells.get(name, math.nan) for name in names]
    return math.fsum(values) / len(values) if values else math.nan


def line(found: Sequence[Pair], measure: str, edges: np.ndarray) -> Values:
    """The weighted line through the means of the bins, by numpy's own fit."""
    centres = (edges[:-1] + edges[1:]) / 2
    bins = means(found, measure, lambda p: bin_of(p.distance, edges))
    counted = [p for p in found if not (measure == "cosine" and p.zero)]
    counts = [sum(bin_of(p.distance, edges) == k for p in counted) for k in range(len(centres))]
    there = [k for k, n in enumerate(counts) if n]
    if len(there) < 2:
        return dict.fromkeys(("intercept", "slope", "length", "both"), math.nan)
    slope, intercept = np.polyfit(
        centres[there], [bins[k] for k in there], 1, w=np.sqrt([counts[k] for k in there])
    )
    values = {"intercept": intercept, "slope": slope, "length": -intercept / slope}
    return values | {"both": intercept + slope}


def bin_of(distance: float, edges: np.ndarray) -> int | None:
    for k in range(len(edges) - 1):
        if edges[k] <= distance < edges[k + 1] or (k == len(edges) - 2 and distance == edges[-1]):
            return k
    return None
