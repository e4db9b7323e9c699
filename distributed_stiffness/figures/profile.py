"""Stiffness against the distance of two inputs (Fort et al. v1, Figure 9; ξ after v2 and v3)."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distributed_stiffness.analysis import compute, critical_length, distance_profile
from distributed_stiffness.errors import DataError
from distributed_stiffness.figures.checkpoints import (
    details,
    of_seed,
    rate_title,
    seeds_note,
    stages,
)
from distributed_stiffness.figures.style import heading, style

# Bins with fewer pairs hang on a few examples and are not drawn.
FEWEST_PAIRS = 20
_RELATIONS = {
    "within": "two examples of one class",
    "between": "two examples of different classes",
    "all": "any two examples",
}


def profiles(ds: xr.Dataset, seed: int | None = None, *, relation: str = "within") -> Figure:
    """Draw mean stiffness against input distance, a line for each stage.

    A row for each learning rate; sign stiffness left, cosine right. A triangle marks the critical
    length where it lies inside the observed distances; it is the zero of a line fitted to all bins,
    so it need not be where the drawn curve crosses 0.

    Args:
        ds: a store, or what `distance_profile` returned.
        seed: which; None: the mean over seeds.
        relation: "within" a class (the paper's ξ), "between" classes, or "all" pairs.

    Raises:
        DataError: there is no such seed or relation, or the store has no distances.
    """
    if relation not in _RELATIONS:
        raise DataError(f"relation is {relation!r}: expected one of {', '.join(_RELATIONS)}")
    profile = compute(distance_profile(ds)) if "example" in ds.dims else ds
    note = seeds_note(profile, seed)
    # Of the mean profile, so that the mark belongs to the line that is drawn.
    profile = of_seed(profile, seed)
    shown = profile.isel(iteration=stages(profile["iteration"].values))
    length = critical_length(shown, relation=relation)
    rates = shown["learning_rate"].values
    with style():
        figure = Figure(figsize=(10.4, 3.0 * len(rates) + 1.0), layout="constrained")
        axes = figure.subplots(len(rates), 2, sharex=True, sharey="col", squeeze=False)
        for row, rate in enumerate(rates):
            for ax, measure in zip(axes[row], ("sign", "cosine"), strict=True):
                at = {"learning_rate": row}
                _panel(ax, shown.sel(relation=relation).isel(at), length.isel(at), measure)
                title = f"{measure.capitalize()} stiffness"
                ax.set_title(f"{title}, {rate_title(float(rate))}" if len(rates) > 1 else title)
        for ax in axes[-1]:
            ax.set_xlabel("cosine distance of the inputs (grey: number of pairs)")
        rate = "" if len(rates) > 1 else rate_title(float(rates[0]))
        heading(
            figure,
            f"Stiffness against input distance, {_RELATIONS[relation]}",
            details(profile, rate, note),
        )
    return figure


def _panel(ax: Axes, profile: xr.Dataset, length: xr.Dataset, measure: str) -> None:
    ax.use_sticky_edges = False  # room below 0 for the marks, though the shading starts there
    _pairs(ax, profile)
    ax.axhline(0, color="0.35", linewidth=0.8)
    steps = profile["iteration"].values
    # Dark blue to yellow-green, in the order of the steps.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(steps)))
    for k, step in enumerate(steps):
        at = profile.isel(iteration=k)
        values = at[measure].where(at["pairs"] >= FEWEST_PAIRS)
        known = _length_label(length.isel(iteration=k), measure)
        label = f"step {step:,}{known if values.notnull().any() else ', no pairs yet'}"
        ax.plot(at["distance_bin"], values, marker="o", ms=3, color=colours[k], label=label)
        _mark(ax, length.isel(iteration=k), measure, colours[k])
    ax.set_ylabel("share helping − harming" if measure == "sign" else "mean cosine")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


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
        return ", no ξ"
    return f", ξ = {value:.2f}" if bool(length[f"{measure}_inside"]) else ", ξ outside"


def _mark(ax: Axes, length: xr.Dataset, measure: str, colour: np.ndarray) -> None:
    if bool(length[f"{measure}_inside"]):
        ax.plot(
            float(length[f"{measure}_length"]),
            0,
            marker="v",
            markersize=9,
            markeredgecolor="white",
            color=colour,
            linestyle="none",
            zorder=5,
        )
