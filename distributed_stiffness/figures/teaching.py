"""The examples that teach most and conflict most, as pictures or, without them, as a table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distributed_stiffness.analysis import teaching_extremes
from distributed_stiffness.figures.checkpoints import (
    Names,
    details,
    of_seed,
    seeds_note,
)
from distributed_stiffness.figures.style import heading, in_one_line, require_measure, style

PLACES = 10
_STRIPS = tuple((relation, end) for relation in ("within", "between") for end in ("most", "least"))
_OTHERS = {"within": "their own\nclass", "between": "the other\nclasses"}

Pictures = Callable[[xr.Dataset], np.ndarray | None]


def teaching_examples(
    teaching: xr.Dataset,
    pictures: Pictures | None = None,
    seed: int | None = None,
    *,
    measure: str = "cosine",
) -> Figure:
    """Draw the examples whose mean stiffness is highest and lowest at the last computed iteration.

    Four rows for each learning rate: those that help their own class most and least, and the other
    classes most and least; what has a mean below 0 harms. Each example has its class, its position
    in its split of the data set, and its mean.

    Args:
        teaching: of the function of that name.
        pictures: from examples (of `teaching`, with their labels) to their images, (E, height,
            width) or (E, height, width, 3), or to None where there are none; None: none.
        seed: which; None: the mean over seeds.
        measure: "cosine" or "sign".

    Raises:
        DataError: there is no such seed or measure.
    """
    require_measure(measure)
    note, names = seeds_note(teaching, seed), Names.of(teaching)
    of_rates = of_seed(teaching, seed)
    shown = [_of_rate(of_rates.isel(learning_rate=k), measure) for k in range(_n_rates(of_rates))]
    wanted = np.unique(np.concatenate([position.ravel() for _, position in shown]))
    wanted = wanted[wanted >= 0]
    images = pictures(of_rates.isel(example=wanted)) if pictures and wanted.size else None
    by_position = {} if images is None else dict(zip(wanted.tolist(), images, strict=True))
    with style():
        rows = len(_STRIPS) * len(shown)
        height = 1.5 if by_position else 0.72
        figure = Figure(figsize=(PLACES * 1.0 + 1.6, rows * height + 1.0), layout="constrained")
        blocks = np.atleast_1d(np.asarray(figure.subfigures(len(shown), 1, squeeze=False))).ravel()
        for block, (at, position) in zip(blocks, shown, strict=True):
            axes = block.subplots(len(_STRIPS), PLACES, squeeze=False)
            parts = [names.rate_title(float(at["learning_rate"])), names.stage_title(at[measure])]
            if any(parts):
                block.suptitle(", ".join(p.replace("\n", ", ") for p in parts if p), fontsize=9)
            for strip, row in enumerate(axes):
                _strip(row, at, position[strip], strip, measure, by_position)
        _heading(figure, of_rates, measure, note)
    return figure


def _n_rates(ds: xr.Dataset) -> int:
    return int(ds.sizes["learning_rate"])


def _of_rate(of_rate: xr.Dataset, measure: str) -> tuple[xr.Dataset, np.ndarray]:
    """Return the last computed checkpoint and the positions of its examples (strip, place)."""
    known = of_rate[measure].notnull().any(["example", "relation"]).values
    last = int(np.flatnonzero(known)[-1]) if known.any() else -1
    at = of_rate.isel(iteration=last)
    found = [
        teaching_extremes(at, PLACES, measure=measure, relation=relation)["position"].sel(end=end)
        for relation, end in _STRIPS
    ]
    return at, np.stack([position.values for position in found])


def _strip(
    axes: np.ndarray,
    at: xr.Dataset,
    positions: np.ndarray,
    strip: int,
    measure: str,
    pictures: dict[int, np.ndarray],
) -> None:
    relation, end = _STRIPS[strip]
    values = at[measure].sel(relation=relation).values
    shown = values[positions[positions >= 0]]
    harmful = end == "least" and shown.size > 0 and bool((shown < 0).all())
    label = f"{'harm' if harmful else 'help'} {_OTHERS[relation]} {'most' if harmful else end}"
    for ax, position in zip(axes, positions.tolist(), strict=True):
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        if position >= 0:
            _example(ax, at, position, values[position], pictures.get(position))
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)


def _example(
    ax: Axes, at: xr.Dataset, position: int, value: float, picture: np.ndarray | None
) -> None:
    one = at.isel(example=position)
    number = int(one["index"]) if "index" in one.coords else one["example"].item()
    short = in_one_line(str(one["class_name"].item()), most=14)
    mean = f"{value:+.{2 if abs(value) >= 0.1 else 3}f}".replace("-", "−")
    if picture is None:
        ax.spines[:].set(visible=True, color="0.85")
        ax.text(0.5, 0.5, f"{short}\nno. {number}\n{mean}", ha="center", va="center", fontsize=7.5)
        return
    ax.imshow(_shown(picture), cmap="gray", vmin=0, vmax=1)
    ax.set_title(short, fontsize=7.5, loc="center", pad=2)
    ax.set_xlabel(f"no. {number}\n{mean}", fontsize=7, labelpad=2)


def _shown(picture: np.ndarray) -> np.ndarray:
    """Scale an image to [0, 1], over its own range where it is not of bytes up to 255."""
    values = picture.astype(np.float64)
    if picture.dtype == np.uint8 and values.max() > 16:
        return values / 255
    low, high = values.min(), values.max()
    return np.asarray((values - low) / (high - low if high > low else 1))


def _heading(figure: Figure, teaching: xr.Dataset, measure: str, note: str) -> None:
    what = f"with each: its position and its mean {measure} with the examples that the row names"
    heading(figure, "Examples that teach most and conflict most", details(teaching, note, what))
