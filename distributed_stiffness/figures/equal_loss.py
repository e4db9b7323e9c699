"""Stiffness against learning rate at equal training loss (v1, Figure 8; the abstract of v2)."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from distributed_stiffness.analysis import at_equal_losses, compute, within_between
from distributed_stiffness.figures.checkpoints import details, seeds_note
from distributed_stiffness.figures.curves import (
    MARKERS,
    MEANS,
    RELATIONS,
    SOLID,
    LineStyle,
    line_handles,
    rate_colours,
)
from distributed_stiffness.figures.style import heading, style
from distributed_stiffness.study import rate_in_words

BARS = "bars: ± one standard error over examples"


def equal_loss_curves(ds: xr.Dataset) -> Figure:
    """Draw stiffness within a class and between classes against learning rate, at equal loss.

    A colour for each training loss; sign stiffness left, cosine right. The mean over seeds, with a
    dot for each where there are several. Bars are ± one standard error over examples, of the
    networks that are there. A run that never reaches a loss has no point there.

    Args:
        ds: a store of several learning rates, or what `at_equal_losses` returned of
            `within_between`.

    Raises:
        DataError: there is no training loss that every run passes.
    """
    found = at_equal_losses(compute(within_between(ds))) if "example" in ds.dims else ds
    if "seed" not in found.dims:
        found = found.expand_dims("seed")
    losses = found["train_loss"].values
    colours = rate_colours(len(losses))
    with style():
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, measure in zip(axes, MEANS, strict=True):
            _panel(ax, found, measure, colours)
        handles = [
            Line2D([], [], color=colour, marker=MARKERS[k], label=f"training loss {loss:.2g}")
            for k, (loss, colour) in enumerate(zip(losses, colours, strict=True))
        ]
        handles += line_handles(RELATIONS)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
        note = seeds_note(found.drop_vars("iteration"), None)
        heading(
            figure,
            "Stiffness against learning rate, at equal training loss",
            details(found, f"{note} (dots: each)" if note else "", BARS),
        )
    return figure


def _panel(ax: Axes, found: xr.Dataset, measure: str, colours: list[str]) -> None:
    ax.axhline(0, color="0.35", linewidth=0.8)
    rates = found["learning_rate"].values
    for k, colour in enumerate(colours):
        for relation, line in zip(("within", "between"), RELATIONS.values(), strict=True):
            at = found.isel(train_loss=k).sel(relation=relation)
            _line(ax, at, measure, line, colour, MARKERS[k])
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(rates.tolist()))
    ax.xaxis.set_major_formatter(FixedFormatter([rate_in_words(float(rate)) for rate in rates]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.12)
    ax.set_title(f"{measure.capitalize()} stiffness")
    ax.set_ylabel(MEANS[measure])
    ax.set_xlabel("learning rate")


def _line(
    ax: Axes, at: xr.Dataset, measure: str, line: LineStyle, colour: str, marker: str
) -> None:
    of_seeds = at[measure].transpose("learning_rate", "seed")
    error = at[f"{measure}_error"].mean("seed") if f"{measure}_error" in at else None
    rates = at["learning_rate"].values
    if of_seeds.sizes["seed"] > 1:
        for values in of_seeds.values.T:
            ax.plot(rates, values, ".", color=colour, markersize=3, alpha=0.6)
    ax.errorbar(
        rates,
        of_seeds.mean("seed").values,
        yerr=None if error is None else np.asarray(error.values),
        linestyle=line,
        color=colour,
        marker=marker,
        markerfacecolor=colour if line == SOLID else "white",
        capsize=2,
    )
