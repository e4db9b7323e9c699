"""The pair modes of v3: training pairs, training with validation pairs, validation pairs."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distributed_stiffness.analysis import compute, split_blocks
from distributed_stiffness.figures.checkpoints import Names, details, of_seed, seeds_note
from distributed_stiffness.figures.curves import (
    MARKERS,
    MEANS,
    RELATIONS,
    SOLID,
    line_handles,
    step_axis,
)
from distributed_stiffness.figures.style import BANDS, band, heading, style

_COLOURS = ("#0072B2", "#009E73", "#D55E00")  # told apart with any kind of colour vision
# The blocks' curves often lie on each other: the lower ones are wider.
_WIDTHS, _SIZES = (4.5, 2.7, 1.0), (8.0, 5.5, 3.0)
_DASH, _GAP = 7.0, 4.0  # points, whatever the width


def block_curves(ds: xr.Dataset, seed: int | None = None) -> Figure:
    """Draw stiffness over training for each block of splits, within a class and between classes.

    A row for each learning rate; sign stiffness left, cosine right. Bands are ± one standard error
    over examples.

    Args:
        ds: a store with examples of both splits, or what `split_blocks` returned of it.
        seed: which; None: the mean over seeds.

    Raises:
        DataError: there is no such seed, or the store has examples of one split only.
    """
    blocks = compute(split_blocks(ds)) if "example" in ds.dims else ds
    note = seeds_note(blocks, seed)
    blocks, names = of_seed(blocks, seed), Names.of(blocks)
    rates = blocks["learning_rate"].values
    with style():
        figure = Figure(figsize=(9.6, 2.8 * len(rates) + 1.0), layout="constrained")
        axes = figure.subplots(len(rates), 2, sharex=True, sharey="col", squeeze=False)
        for row, rate in enumerate(rates):
            for ax, measure in zip(axes[row], MEANS, strict=True):
                _panel(ax, blocks.isel(learning_rate=row), measure)
                title = f"{measure.capitalize()} stiffness"
                ax.set_title(
                    f"{title}, {names.rate_title(float(rate))}" if len(rates) > 1 else title
                )
        step_axis(axes[-1], blocks["iteration"].values, names)
        _legend(figure, [str(name) for name in blocks["block"].values])
        over = " over training" if blocks.sizes["iteration"] > 1 else ""
        rate = "" if len(rates) > 1 else names.rate_title(float(rates[0]))
        heading(
            figure,
            f"Stiffness{over}, by the splits of the two examples",
            details(blocks, rate, note, BANDS),
        )
    return figure


def _panel(ax: Axes, blocks: xr.Dataset, measure: str) -> None:
    ax.axhline(0, color="0.35", linewidth=0.8)
    steps = blocks["iteration"].values
    for k in range(blocks.sizes["block"]):
        for relation, line in zip(("within", "between"), RELATIONS.values(), strict=True):
            at = blocks.isel(block=k).sel(relation=relation)
            mean, error = at[measure].values, at[f"{measure}_error"].values
            (drawn,) = ax.plot(
                steps,
                mean,
                line,
                color=_COLOURS[k],
                linewidth=_WIDTHS[k],
                marker=MARKERS[k],
                markersize=_SIZES[k],
                markerfacecolor=_COLOURS[k] if line == SOLID else "white",
            )
            if line != SOLID:
                drawn.set_dashes([_DASH / _WIDTHS[k], _GAP / _WIDTHS[k]])
            band(ax, steps, np.asarray(mean), np.asarray(error), _COLOURS[k])
    ax.set_ylabel(MEANS[measure])


def _legend(figure: Figure, names: list[str]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=_COLOURS[k],
            linewidth=_WIDTHS[k],
            marker=MARKERS[k],
            markersize=_SIZES[k],
            label=_in_words(name),
        )
        for k, name in enumerate(names)
    ]
    handles += line_handles(RELATIONS)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _in_words(block: str) -> str:
    """Name a block for people."""
    first, _, second = (part.replace("train", "training") for part in block.partition("-"))
    return f"{first} pairs" if first == second else f"{first} with {second}"
