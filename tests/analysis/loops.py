"""The definitions, followed in float64 with plain loops. Imports nothing of the package.

A pair is left out when it is an example with itself (same split, same `example`), when its cosine
is NaN, and, of the cosine means alone, when one of its gradients is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xarray as xr


@dataclass
class Mean:
    """A mean of cosines and one of signs, over the pairs that were added."""

    cosines: list[float] = field(default_factory=list)
    signs: list[float] = field(default_factory=list)

    def add(self, cosine: float, *, zero: bool) -> None:
        self.signs.append(float(np.sign(cosine)))
        if not zero:
            self.cosines.append(cosine)

    @property
    def cosine(self) -> float:
        return math.fsum(self.cosines) / len(self.cosines) if self.cosines else math.nan

    @property
    def sign(self) -> float:
        return math.fsum(self.signs) / len(self.signs) if self.signs else math.nan


def pairs(one: xr.Dataset) -> Iterator[tuple[int, int, float, bool]]:
    """Yield row, column, cosine and whether a gradient is zero, of one checkpoint's pairs."""
    names_i = list(zip(one["split"].values, one["example"].values, strict=True))
    names_j = list(zip(one["other_split"].values, one["other"].values, strict=True))
    norm = {name: float(one["gradient_norm"].values[i]) for i, name in enumerate(names_i)}
    matrix = one["cosine"].values
    for i, row in enumerate(names_i):
        for j, column in enumerate(names_j):
            value = float(matrix[i, j])
            if row != column and not math.isnan(value):
                # The norm of a column that is no row is not known.
                yield i, j, value, norm[row] == 0 or norm.get(column) == 0


def means(one: xr.Dataset, key: Callable[[int, int], object]) -> dict[object, Mean]:
    """Average one checkpoint's pairs by a key of row and column; None leaves a pair out."""
    found: dict[object, Mean] = {}
    for i, j, cosine, zero in pairs(one):
        name = key(i, j)
        if name is not None:
            found.setdefault(name, Mean()).add(cosine, zero=zero)
    return found


def class_matrix(one: xr.Dataset, by: str = "class_name") -> dict[object, Mean]:
    """C(a, b) of one checkpoint, by (a, b)."""
    rows, columns = one[by].values, one[f"other_{by}"].values
    return means(one, lambda i, j: (rows[i], columns[j]))


def within_between(one: xr.Dataset, measure: str) -> tuple[float, float]:
    """Mean over classes of C(a, a), and over ordered pairs of different classes of C(a, b)."""
    cells = {name: getattr(mean, measure) for name, mean in class_matrix(one).items()}
    within = [v for (a, b), v in cells.items() if a == b and not math.isnan(v)]
    between = [v for (a, b), v in cells.items() if a != b and not math.isnan(v)]
    return sum(within) / len(within), sum(between) / len(between)


def distance_profile(one: xr.Dataset, edges: np.ndarray) -> dict[object, Mean]:
    """Means by (within a class, bin), of one checkpoint."""
    distance = one["distance"].values.astype(float)
    rows, columns = one["class_name"].values, one["other_class_name"].values
    last = len(edges) - 2

    def key(i: int, j: int) -> tuple[bool, int] | None:
        for k in range(last + 1):
            at = distance[i, j]
            if edges[k] <= at < edges[k + 1] or (k == last and at == edges[-1]):
                return bool(rows[i] == columns[j]), k
        return None

    return means(one, key)
