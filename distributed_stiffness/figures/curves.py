"""Stiffness and training curves against optimiser steps (Fort et al. v3, Figure 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from distributed_stiffness.figures.checkpoints import Names, details, seeds_note, with_run_dims
from distributed_stiffness.figures.style import BANDS, band, heading, style

# Above this share, undecided signs are no longer a detail of the sign stiffness.
NOTABLE_SHARE = 1e-3
MARKERS = "os^Dv<>p"

LineStyle = Literal["-", "--"]
SOLID: LineStyle = "-"
DASHED: LineStyle = "--"
RELATIONS: dict[str, LineStyle] = {"within a class": SOLID, "between classes": DASHED}
MEANS = {"sign": "share helping − harming", "cosine": "mean cosine of pairs"}  # of axes


def stiffness_curves(within_between: xr.Dataset, curves: xr.Dataset) -> Figure:
    """Draw stiffness within and between classes over training, above loss and accuracy.

    One colour for each learning rate; the mean over seeds, with thin lines for each seed where
    there are several. Bands of stiffness are ± one standard error over examples, of the networks
    that are there: how far seeds differ is seen from the thin lines. All four panels share the axis
    of steps, logarithmic but for step 0.

    Args:
        within_between: of the function of that name.
        curves: of `checkpoint_curves`.
    """
    stiffness, training = with_run_dims(within_between), with_run_dims(curves)
    stiffness = stiffness.drop_vars([n for n in stiffness.coords if n in training.data_vars])
    note, names = seeds_note(within_between, None), Names.of(training)
    with style():
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for ax, measure in zip(axes[0], ("sign", "cosine"), strict=True):
            _stiffness_panel(ax, stiffness, measure)
        for ax, name in zip(axes[1], ("loss", "accuracy"), strict=True):
            _training_panel(ax, training, name)
        step_axis(axes[1], training["iteration"].values, names)
        _legend(figure, training["learning_rate"].values, names, _undecided(training, names))
        over = " over training" if training.sizes["iteration"] > 1 else ""
        heading(
            figure,
            f"Stiffness{over}, within a class and between classes",
            details(
                within_between,
                f"{note} (thin: each)" if note else "",
                BANDS if "sign_error" in stiffness else "",
            ),
        )
    return figure


def _stiffness_panel(ax: Axes, stiffness: xr.Dataset, measure: str) -> None:
    ax.axhline(0, color="0.35", linewidth=0.8)
    for relation, line in zip(("within", "between"), RELATIONS.values(), strict=True):
        of_relation = stiffness.sel(relation=relation)
        _lines(ax, of_relation[measure], line, of_relation.get(f"{measure}_error"))
    ax.set_title(f"{measure.capitalize()} stiffness")
    ax.set_ylabel(MEANS[measure])
    _key(ax, RELATIONS)


def _training_panel(ax: Axes, training: xr.Dataset, name: str) -> None:
    drawn: dict[str, LineStyle] = {}
    for split, line in (("train", SOLID), ("validation", DASHED)):
        values = training.get(f"{split}_{name}")
        if values is not None and values.notnull().any():
            _lines(ax, values, line)
            drawn["training" if split == "train" else split] = line
    ax.set_title(name.capitalize())
    ax.set_ylabel("loss (nats)" if name == "loss" else "share correct")
    if drawn:
        _key(ax, drawn)


def _lines(
    ax: Axes, values: xr.DataArray, line: LineStyle, errors: xr.DataArray | None = None
) -> None:
    """Draw one line for each learning rate, its band, and thin lines for each of several seeds."""
    values = values.transpose("learning_rate", "seed", "iteration")
    bands = None if errors is None else errors.mean("seed").transpose("learning_rate", "iteration")
    steps = values["iteration"].values
    colours = rate_colours(values.sizes["learning_rate"])
    for k, of_rate in enumerate(values.values):
        if len(of_rate) > 1:
            for of_seed in of_rate:
                ax.plot(steps, of_seed, line, color=colours[k], linewidth=0.6, alpha=0.5)
        known = np.isfinite(of_rate)
        mean = np.where(known, of_rate, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
        face = colours[k] if line == SOLID else "white"
        marker = MARKERS[k % len(MARKERS)]
        ax.plot(steps, mean, line, marker=marker, color=colours[k], markerfacecolor=face)
        if bands is not None:
            band(ax, steps, mean, bands.values[k], colours[k])


def rate_colours(n: int) -> list[str]:
    """Return a colour for each of n ordered values, dark to light, legible on white."""
    if n == 1:
        return ["#0072B2"]
    return [to_hex(colour) for colour in matplotlib.colormaps["plasma"](np.linspace(0.05, 0.8, n))]


def _key(ax: Axes, styles: dict[str, LineStyle]) -> None:
    ax.legend(handles=line_handles(styles), loc="best")


def line_handles(styles: dict[str, LineStyle]) -> list[Line2D]:
    """Return what a legend needs to say what solid and dashed lines are."""
    return [
        Line2D(
            [],
            [],
            linestyle=line,
            color="0.35",
            marker="o",
            markerfacecolor="0.35" if line == SOLID else "white",
            label=name,
        )
        for name, line in styles.items()
    ]


def rate_handles(rates: np.ndarray, names: Names) -> list[Line2D]:
    """Return what a legend needs to say which colour is which learning rate; nothing, of none."""
    if not names.rate:
        return []
    return [
        Line2D([], [], color=colour, marker=MARKERS[k % len(MARKERS)], label=names.rate_title(rate))
        for k, (rate, colour) in enumerate(zip(rates, rate_colours(len(rates)), strict=True))
    ]


def _legend(figure: Figure, rates: np.ndarray, names: Names, note: str) -> None:
    handles = rate_handles(rates, names)
    if handles or note:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(max(len(handles), 1), 5),
            title=note or None,
        )


def step_axis(axes: Iterable[Axes], steps: np.ndarray, names: Names) -> None:
    """Make the axis of steps logarithmic where they span much, with step 0 at its left; name it."""
    positive = steps[steps > 0]
    logarithmic = positive.size > 1 and positive[-1] >= 20 * positive[0]
    for ax in axes:
        if logarithmic:
            ax.set_xscale("symlog", linthresh=float(positive[0]), linscale=0.5)
        shown = _apart(ax, steps)
        texts = [f"{step:,.0f}" if names.step else "" for step in shown]
        ax.xaxis.set_major_locator(FixedLocator(shown))
        ax.xaxis.set_major_formatter(FixedFormatter(texts))
        ax.xaxis.set_minor_locator(NullLocator())
        if names.step:
            ax.set_xlabel(names.steps + (", spaced like a logarithm" if logarithmic else ""))


def _apart(ax: Axes, steps: np.ndarray, share: float = 0.11) -> list[float]:
    """Keep the steps whose labels do not run into each other; the first and the last always."""
    at = ax.transData.transform(np.stack([steps, np.zeros(len(steps))], axis=1))[:, 0]
    at = (at - at[0]) / max(at[-1] - at[0], 1e-12)
    shown = [0]
    for k in range(1, len(steps) - 1):
        if at[k] - at[shown[-1]] >= share and at[-1] - at[k] >= share:
            shown.append(k)
    if len(steps) > 1:
        shown.append(len(steps) - 1)
    return [float(steps[k]) for k in shown]


def _undecided(training: xr.Dataset, names: Names) -> str:
    """Say so where rounding leaves many signs open; empty where it does not."""
    if "undecided_share" not in training or not training["undecided_share"].notnull().any():
        return ""
    share = training["undecided_share"]
    worst = share.isel(share.fillna(-1.0).argmax(...))
    if float(worst) <= NOTABLE_SHARE:
        return ""
    most = names.place({dim: worst[dim] for dim in ("iteration", "learning_rate")})
    return (
        f"Note: up to {100 * float(worst):.1f} % of all pairs have a cosine within its error bound"
        " of 0, so that their sign is open" + (f"\n(most at {most})" if most else "")
    )
