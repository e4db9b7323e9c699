"""Stiffness against the distance of two inputs (Fort et al. v1, Figure 9; ξ after v2 and v3)."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distributed_stiffness.analysis import (
    compute_together,
    critical_length,
    distance_edges,
    distance_profile,
)
from distributed_stiffness.errors import DataError
from distributed_stiffness.figures.checkpoints import (
    Names,
    details,
    of_seed,
    seeds_note,
    stages,
)
from distributed_stiffness.figures.style import BANDS, band, heading, style

# Bins with fewer pairs hang on a few examples and are not drawn.
FEWEST_PAIRS = 20
_OF_INPUTS = "cosine distance of the inputs"
_RELATIONS = {
    "within": "two examples of one class",
    "between": "two examples of different classes",
    "all": "any two examples",
}


def profiles(
    ds: xr.Dataset,
    seed: int | None = None,
    *,
    relation: str = "within",
    length: xr.Dataset | None = None,
) -> Figure:
    """Draw mean stiffness against input distance, a line for each stage.

    A row for each learning rate; sign stiffness left, cosine right. Bands and the bars of ξ are ±
    one standard error over examples. A triangle marks the critical length where it lies inside the
    observed distances; it is the zero of a line fitted to all bins, so it need not be where the
    drawn curve crosses 0. Bins with few pairs, or that hang on one example, are not drawn.

    Args:
        ds: a store, or what `distance_profile` returned.
        seed: which; None: the mean over seeds.
        relation: "within" a class (the paper's ξ), "between" classes, or "all" pairs.
        length: what `critical_length` returned for the store and this relation; None: it is made
            from `ds`, without its error where that is a profile.

    Raises:
        DataError: there is no such seed or relation, or the store has no distances.
    """
    if relation not in _RELATIONS:
        raise DataError(f"relation is {relation!r}: expected one of {', '.join(_RELATIONS)}")
    profile, length = _computed(ds, relation, length)
    note, names = seeds_note(profile, seed), Names.of(profile)
    if length is not None:
        length = of_seed(length, seed)
    profile = of_seed(profile, seed)
    steps = stages(profile["iteration"].values)
    shown = profile.isel(iteration=steps)
    # Without errors it is of the mean profile, so that the mark belongs to the line that is drawn.
    crossing = (
        critical_length(shown, relation=relation)
        if length is None
        else (length.isel(iteration=steps))
    )
    rates = shown["learning_rate"].values
    with style():
        figure = Figure(figsize=(10.4, 3.0 * len(rates) + 1.0), layout="constrained")
        axes = figure.subplots(len(rates), 2, sharex=True, sharey="col", squeeze=False)
        for row, rate in enumerate(rates):
            for ax, measure in zip(axes[row], ("sign", "cosine"), strict=True):
                at = {"learning_rate": row}
                of = shown.sel(relation=relation).isel(at)
                _panel(ax, of, crossing.isel(at), measure, names)
                title = f"{measure.capitalize()} stiffness"
                ax.set_title(
                    f"{title}, {names.rate_title(float(rate))}" if len(rates) > 1 else title
                )
        distance = str(profile["distance_bin"].attrs.get("long_name", "distance"))
        for ax in axes[-1]:
            ax.set_xlabel(f"{distance} (grey: number of pairs)")
        rate = "" if len(rates) > 1 else names.rate_title(float(rates[0]))
        heading(
            figure,
            f"Stiffness against {_short(distance)}, {_RELATIONS[relation]}",
            details(profile, rate, note, BANDS if "sign_error" in profile else ""),
        )
    return figure


def _short(distance: str) -> str:
    """Name a distance in a title."""
    return "input distance" if distance == _OF_INPUTS else distance


def _computed(
    ds: xr.Dataset, relation: str, length: xr.Dataset | None
) -> tuple[xr.Dataset, xr.Dataset | None]:
    if "example" not in ds.dims:
        return ds, length
    edges = distance_edges(ds)
    lazy = [distance_profile(ds, edges=edges), critical_length(ds, edges=edges, relation=relation)]
    profile, made = compute_together(lazy)
    return profile, length or made


def _panel(ax: Axes, profile: xr.Dataset, length: xr.Dataset, measure: str, names: Names) -> None:
    ax.use_sticky_edges = False  # room below 0 for the marks, though the shading starts there
    _pairs(ax, profile)
    ax.axhline(0, color="0.35", linewidth=0.8)
    steps = profile["iteration"].values
    # Dark blue to yellow-green, in the order of the steps.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(steps)))
    for k, step in enumerate(steps):
        at = profile.isel(iteration=k)
        values, error = _drawn(at, measure)
        known = _length_label(length.isel(iteration=k), measure)
        parts = names.step_title(step), known if values.notnull().any() else "no pairs yet"
        label = ", ".join(part for part in parts if part)
        ax.plot(at["distance_bin"], values, marker="o", ms=3, color=colours[k], label=label)
        if error is not None:
            band(ax, at["distance_bin"].values, values.values, error.values, colours[k])
        _mark(ax, length.isel(iteration=k), measure, colours[k])
    ax.set_ylabel("share helping − harming" if measure == "sign" else "mean cosine")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _drawn(at: xr.Dataset, measure: str) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Return the means that are drawn and their errors, where there are any."""
    values, error = at[measure].where(at["pairs"] >= FEWEST_PAIRS), at.get(f"{measure}_error")
    return (values, None) if error is None else (values.where(error.notnull()), error)


def _pairs(ax: Axes, profile: xr.Dataset) -> None:
    """Shade where the pairs are, at the foot of the panel."""
    pairs = profile["pairs"].max("iteration").values
    foot = ax.get_xaxis_transform()  # distance across, share of the panel up
    heights = 0.2 * pairs / max(pairs.max(), 1)
    ax.stairs(
        heights,
        np.append(profile["lower_edge"], profile["upper_edge"][-1]),
        transform=foot,
        fill=True,
        color="0.88",
        zorder=0,
    )
    there = np.flatnonzero(pairs)
    if there.size:
        ax.set_xlim(float(profile["lower_edge"][there[0]]), float(profile["upper_edge"][there[-1]]))


def _length_label(length: xr.Dataset, measure: str) -> str:
    value = float(length[f"{measure}_length"])
    if not np.isfinite(value):
        return "no ξ"
    if not bool(length[f"{measure}_inside"]):
        return "ξ outside"
    error = float(length.get(f"{measure}_length_error", np.nan))
    if not np.isfinite(error):
        return f"ξ = {value:.2f}"
    digits = 2 if error >= 0.005 else 3
    return f"ξ = {value:.{digits}f} ± {error:.{digits}f}"


def _mark(ax: Axes, length: xr.Dataset, measure: str, colour: np.ndarray) -> None:
    if not bool(length[f"{measure}_inside"]):
        return
    value = float(length[f"{measure}_length"])
    error = float(length.get(f"{measure}_length_error", np.nan))
    if np.isfinite(error):
        ax.plot([value - error, value + error], [0, 0], color=colour, linewidth=3, zorder=4)
    ax.plot(
        value,
        0,
        marker="v",
        markersize=9,
        markeredgecolor="white",
        color=colour,
        linestyle="none",
        zorder=5,
    )
