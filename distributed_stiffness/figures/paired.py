"""Two studies of the same examples: both curves, and their difference (after v1, Figure 4)."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distributed_stiffness.figures.checkpoints import Names, details, of_seed, seeds_note
from distributed_stiffness.figures.curves import (
    MARKERS,
    MEANS,
    RELATIONS,
    SOLID,
    line_handles,
    step_axis,
)
from distributed_stiffness.figures.style import BANDS, heading, style

_COLOURS = ("#0072B2", "#D55E00")
_DIFFERENCE = "0.2"


def paired_figure(paired: xr.Dataset, seed: int | None = None) -> Figure:
    """Draw the stiffness of two studies over training, and below it their difference.

    Two rows for each learning rate: both studies within a class and between classes, then the first
    minus the second; sign stiffness left, cosine right. Bands are ± one standard error over
    examples. Those of the differences are of differences pair by pair, so that they keep that both
    networks saw the same examples.

    Args:
        paired: what `paired_curves` returned of two stores.
        seed: which; None: the mean over seeds.

    Raises:
        DataError: there is no such seed.
    """
    note = seeds_note(paired, seed)
    studies = [str(name) for name in paired["study_name"].values]
    names, paired = Names.of(paired), of_seed(paired, seed)
    rates = paired["learning_rate"].values
    heights = [1.6, 1.0] * len(rates)
    with style():
        figure = Figure(figsize=(9.6, 4.0 * len(rates) + 1.0), layout="constrained")
        axes = figure.subplots(len(heights), 2, sharex=True, height_ratios=heights)
        for k, rate in enumerate(rates):
            of_rate = f", {names.rate_title(float(rate))}" if len(rates) > 1 else ""
            at = paired.isel(learning_rate=k)
            for above, below, measure in zip(*axes[2 * k : 2 * k + 2], MEANS, strict=True):
                _curves(above, at, measure)
                above.set_title(f"{measure.capitalize()} stiffness{of_rate}")
                _difference(below, at, measure)
                below.set_title(f"{studies[0][:1].upper()}{studies[0][1:]} minus {studies[1]}")
        step_axis(axes[-1], paired["iteration"].values, names)
        handles = [
            Line2D([], [], color=_COLOURS[k], marker=MARKERS[k], label=name)
            for k, name in enumerate(studies)
        ]
        handles += line_handles(RELATIONS)
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        over = " over training" if paired.sizes["iteration"] > 1 else ""
        rate = "" if len(rates) > 1 else names.rate_title(float(rates[0]))
        heading(
            figure,
            f"Stiffness{over}: {studies[0]} against {studies[1]}",
            details(paired, rate, note, BANDS),
        )
    return figure


def _curves(ax: Axes, at: xr.Dataset, measure: str) -> None:
    ax.axhline(0, color="0.35", linewidth=0.8)
    for k in range(2):
        _lines(ax, at.isel(study=k), measure, _COLOURS[k], MARKERS[k])
    ax.set_ylabel(MEANS[measure])


def _difference(ax: Axes, at: xr.Dataset, measure: str) -> None:
    ax.axhline(0, color="0.35", linewidth=0.8)
    _lines(ax, at, f"{measure}_difference", _DIFFERENCE, MARKERS[2])
    ax.set_ylabel("difference")


def _lines(ax: Axes, at: xr.Dataset, name: str, colour: str, marker: str) -> None:
    steps = at["iteration"].values
    for relation, line in zip(("within", "between"), RELATIONS.values(), strict=True):
        of = at.sel(relation=relation)
        mean, error = np.asarray(of[name].values), np.asarray(of[f"{name}_error"].values)
        face = colour if line == SOLID else "white"
        ax.plot(steps, mean, line, color=colour, marker=marker, markerfacecolor=face)
        # Differences reach from -2 to 2: nothing is cut off.
        ax.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
