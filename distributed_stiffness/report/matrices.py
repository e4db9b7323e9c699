"""Class matrices of every checkpoint for the heat map of the page, small enough to travel in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
import xarray as xr

from distributed_stiffness.analysis import Summary
from distributed_stiffness.figures.checkpoints import Names, of_seed, with_run_dims
from distributed_stiffness.figures.heatmap import (
    COLOURS,
    MOST_NAMES,
    by_superclass,
    colour_scale,
)
from distributed_stiffness.figures.style import MEANING
from distributed_stiffness.report.words import bound, measured, percent
from distributed_stiffness.study import rate_in_words

# Bytes of JSON: the page stays below 10 MB. 100 classes at 40 checkpoints fit, symmetric or not.
LIMIT = 4_500_000
SCALE = 10_000  # means and errors are whole multiples of 1 / SCALE: int16 holds [-3.2, 3.2]
MISSING = -(2**15)
MEASURES = tuple(MEANING)


@dataclass(frozen=True)
class _Shown:
    """The checkpoints that the page holds, of all learning rates."""

    seeds: Sequence[int | None]  # None: the mean over seeds
    steps: np.ndarray  # positions of iterations


def heat_maps(numbers: Summary, limit: int = LIMIT) -> dict[str, Any] | None:
    """Return what the heat map of the page draws, as JSON would hold it, in at most `limit` bytes.

    Seeds of their own are left out first (the mean over them stays), then every other iteration
    until the rest fits. `checkpoints` and the lists inside `matrices` run over learning rate, seed,
    iteration, the last one fastest; `seed_errors`, those of the mean over seeds, over learning rate
    and iteration. Matrices are base64 of little-endian numbers, row by row, those that are
    symmetric from the diagonal on: int16 for means and errors (`SCALE` is 1, `MISSING` is not
    known), float64 for numbers of pairs.

    Args:
        numbers: of a study.
        limit: bytes of JSON.

    Returns:
        The content; None where not even one iteration fits.
    """
    matrix = with_run_dims(numbers.class_matrix)
    seeds = matrix["seed"].values.tolist()
    for shown in _from_all_to_few(seeds, matrix.sizes["iteration"]):
        content = _content(numbers, shown)
        if len(json.dumps(content)) <= limit:
            return content | {"left_out": _left_out(shown, seeds, matrix.sizes["iteration"])}
    return None


def _from_all_to_few(seeds: list[int], n_steps: int) -> Iterator[_Shown]:
    every = np.arange(n_steps)
    few: list[int | None] = [None] if len(seeds) > 1 else list(seeds)
    if len(seeds) > 1:
        yield _Shown([None, *seeds], every)
    yield _Shown(few, every)
    left = n_steps
    while left > 1:
        left = -(-left // 2)
        # From the last on: it stays to the end.
        yield _Shown(few, np.linspace(n_steps - 1, 0, left).round().astype(int)[::-1])


def _left_out(shown: _Shown, seeds: list[int], n_steps: int) -> str:
    lines = []
    if len(shown.seeds) < len(seeds):
        lines.append("the single seeds (their mean is here)")
    if len(shown.steps) < n_steps:
        lines.append(f"{n_steps - len(shown.steps)} of {n_steps} iterations")
    return " and ".join(lines)


def _content(numbers: Summary, shown: _Shown) -> dict[str, Any]:
    matrix, names = with_run_dims(numbers.class_matrix), Names.of(numbers.curves)
    many = matrix.sizes["seed"] > 1
    first, _, second = str(matrix.attrs.get("splits", "")).partition("-")
    matrices = [_matrix(numbers.class_matrix, "class_name", "Classes", shown)]
    if numbers.superclass_matrix is not None:
        above = _matrix(numbers.superclass_matrix, "superclass_name", "Super-classes", shown)
        matrices.append(above)
    steps = matrix["iteration"].values[shown.steps]
    return {
        "scale": SCALE,
        "missing": MISSING,
        "colours": _colours(),
        "meaning": MEANING,
        "splits": [first, second] if first != second else None,
        "learning_rate": matrix["learning_rate"].values.tolist(),
        # What was not given is empty, and not shown.
        "learning_rates": [
            rate_in_words(rate) if names.rate else "" for rate in matrix["learning_rate"].values
        ],
        "seed": ["mean" if seed is None else seed for seed in shown.seeds],
        "seeds": [
            f"mean of {matrix.sizes['seed']}" if seed is None else str(seed) if names.seed else ""
            for seed in shown.seeds
        ],
        "several_seeds": many,
        "iteration": steps.tolist(),
        "iterations": [f"{step:,}" if names.step else "" for step in steps],
        "checkpoints": _checkpoints(numbers, shown),
        "matrices": matrices,
    }


def _colours() -> list[str]:
    """Return the map of the figures, from blue to red."""
    colours = matplotlib.colormaps[COLOURS]
    # In bytes, as images are drawn.
    every = colours(np.arange(colours.N), bytes=True)[:, :3].tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in every]


def _checkpoints(numbers: Summary, shown: _Shown) -> list[dict[str, str]]:
    """Say of each checkpoint when it was, what its means are and how exact it is."""
    relations = [of_seed(numbers.within_between, seed) for seed in shown.seeds]
    curves, names = with_run_dims(numbers.curves), Names.of(numbers.curves)
    texts = []
    for rate in range(curves.sizes["learning_rate"]):
        for seed, of_this in zip(shown.seeds, relations, strict=True):
            for step in shown.steps:
                at = of_this.isel(learning_rate=rate, iteration=step)
                of_seeds = curves if seed is None else curves.sel(seed=[seed])
                exact = _exactness(of_seeds.isel(learning_rate=rate, iteration=step))
                means = {measure: _within_between(at, measure) for measure in MEASURES}
                title = names.stage_title(at["sign"]).replace("\n", ", ")
                texts.append({"title": title, "exact": exact} | means)
    return texts


def _within_between(at: xr.Dataset, measure: str) -> str:
    within, between = (measured(at.sel(relation=r), measure) for r in ("within", "between"))
    return f"{measure} within a class {within}, between classes {between}"


def _exactness(of_seeds: xr.Dataset) -> str:
    """Say the largest error bound and share of open signs of one checkpoint's seeds."""
    texts = []
    for name, what, text in (
        ("error_bound", "error bound", bound),
        ("undecided_share", "undecided signs", percent),
    ):
        if name in of_seeds and of_seeds[name].notnull().all():
            texts.append(f"{what} {text(float(of_seeds[name].max()))}")
    return ", ".join(texts)


def _matrix(ds: xr.Dataset, dim: str, title: str, shown: _Shown) -> dict[str, Any]:
    ds = by_superclass(with_run_dims(ds), dim)
    names = [str(name) for name in ds[dim].values]
    some = ds.isel(iteration=shown.steps)
    series = [of_seed(some, seed) for seed in shown.seeds]
    means = {m: _of_all(series, m, dim) for m in MEASURES}
    errors = {m: _of_all(series, f"{m}_error", dim) for m in MEASURES}
    pairs = {"sign": _of_all(series, "pairs", dim), "cosine": _of_all(series, "cosine_pairs", dim)}
    of_mean = series[:1] if shown.seeds[0] is None else []
    of_seeds = {m: _of_all(of_mean, f"{m}_seed_error", dim) for m in MEASURES if of_mean}
    symmetric = all(map(_is_symmetric, (*means.values(), *errors.values(), *pairs.values())))
    cells = (
        np.triu_indices(len(names)) if symmetric else np.indices((len(names),) * 2).reshape(2, -1)
    )
    rows, columns = cells

    def small(part: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {name: [_small(one[rows, columns]) for one in all_] for name, all_ in part.items()}

    return {
        "title": title,
        "dim": dim,
        "names": names,
        "groups": _groups(ds) if dim == "class_name" and len(names) > MOST_NAMES else [],
        "symmetric": symmetric,
        "limits": {m: colour_scale(ds[m].values).vmax for m in MEASURES},
        "means": small(means),
        "errors": small(errors),
        "seed_errors": small(of_seeds),
        "pairs": _pairs({m: one[:, rows, columns] for m, one in pairs.items()}),
    }


def _of_all(series: list[xr.Dataset], name: str, dim: str) -> np.ndarray:
    """Return a variable of every checkpoint, (checkpoint, a, b)."""
    dims = ("learning_rate", "iteration", dim, f"other_{dim}")
    values = np.stack([one[name].transpose(*dims).values for one in series], axis=1)
    return values.reshape(-1, *values.shape[-2:]).astype(np.float64)


def _is_symmetric(values: np.ndarray) -> bool:
    return np.allclose(values, np.swapaxes(values, -1, -2), rtol=0, atol=1e-6, equal_nan=True)


def _groups(ds: xr.Dataset) -> list[tuple[str, int]]:
    """Return each super-class and the number of its classes, in the order of the matrix."""
    if "superclass_name" not in ds.coords:
        return []
    above = map(str, ds["superclass_name"].values)
    return [(name, len(list(classes))) for name, classes in groupby(above)]


def _small(values: np.ndarray) -> str:
    known = np.isfinite(values)
    whole = np.rint(np.where(known, values, 0) * SCALE).clip(MISSING + 1, -MISSING - 1)
    return _text(np.where(known, whole, MISSING).astype("<i2"))


def _pairs(of_measures: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return each different matrix of numbers of pairs once, and its position by checkpoint."""
    counts: dict[str, int] = {}
    at = {
        measure: [counts.setdefault(_text(one.astype("<f8")), len(counts)) for one in every]
        for measure, every in of_measures.items()
    }
    return {"counts": list(counts), "at": at}


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
