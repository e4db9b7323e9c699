"""The measures that others take of the same matrix, over training: small multiples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from distributed_stiffness.figures.checkpoints import Names, details, seeds_note, with_run_dims
from distributed_stiffness.figures.curves import (
    DASHED,
    SOLID,
    LineStyle,
    _lines,
    rate_colours,
    rate_handles,
    step_axis,
)
from distributed_stiffness.figures.style import BANDS, heading, powers_of_ten, style

_LINES: dict[str, LineStyle] = {"gram": SOLID, "cosine": DASHED}
_KERNELS = {
    "gram": "products of gradients (as published)",
    "cosine": "cosines (every gradient of norm 1)",
}


@dataclass(frozen=True)
class _Panel:
    variable: str
    title: str
    label: str
    logarithmic: bool = False
    neutral: float | None = None  # what it is where examples have nothing to do with each other
    kernel: str | None = None  # the only one that is drawn
    quantile: float | None = None


_PANELS = (
    _Panel("coherence", "Gradient coherence", "mean product / mean square", neutral=0.0),
    _Panel("m_coherence", "m-coherence", "examples helped", logarithmic=True, neutral=1.0),
    _Panel("diversity", "Gradient diversity", "1 / m-coherence", logarithmic=True, neutral=1.0),
    _Panel("signal_to_noise", "Signal to noise", "squared mean / variance", neutral=0.0),
    _Panel("minimum", "Least cosine of any pair", "cosine", kernel="cosine", neutral=0.0),
    _Panel(
        "product_quantile",
        "Cosine that 1 % of pairs are below",
        "cosine",
        kernel="cosine",
        neutral=0.0,
        quantile=0.01,
    ),
    _Panel("confusion", "Gradient confusion η", "−least product", logarithmic=True, kernel="gram"),
    _Panel("participation_ratio", "Effective rank", "participation ratio", logarithmic=True),
    _Panel("alignment", "Alignment with the labels", "centred alignment", neutral=0.0),
)


def neighbour_curves(neighbours: xr.Dataset) -> Figure:
    """Draw the neighbouring measures over training, a panel for each.

    One colour for each learning rate; the mean over seeds, with thin lines for each seed where
    there are several. Bands are ± one standard error over examples, of measures that have one.
    Measures that the store has no numbers for have no panel. All panels share the axis of steps,
    logarithmic but for step 0.

    Args:
        neighbours: of the function of that name.
    """
    measures = with_run_dims(neighbours)
    panels = [panel for panel in _PANELS if _is_of(panel, measures)]
    columns = min(len(panels), 3 if len(panels) > 4 else 2)
    rows = -(-len(panels) // columns)
    note, names = seeds_note(neighbours, None), Names.of(measures)
    with style():
        figure = Figure(figsize=(3.5 * columns + 0.4, 2.3 * rows + 1.6), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=False):
            _draw(ax, measures, panel)
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        drawn = axes.ravel()[: len(panels)]
        step_axis(drawn, measures["iteration"].values, names)
        for ax in drawn[:-columns]:
            ax.set_xlabel("")
        for ax in drawn[-columns:]:
            ax.tick_params(labelbottom=True)
        _legend(figure, measures, names)
        over = " over training" if measures.sizes["iteration"] > 1 else ""
        heading(
            figure,
            f"Neighbours of stiffness{over}",
            details(neighbours, f"{note} (thin: each)" if note else "", BANDS),
        )
    return figure


def _is_of(panel: _Panel, measures: xr.Dataset) -> bool:
    kernels = measures["kernel"].values.tolist()
    return panel.variable in measures and (panel.kernel is None or panel.kernel in kernels)


def _draw(ax: Axes, measures: xr.Dataset, panel: _Panel) -> None:
    if panel.neutral is not None:
        ax.axhline(panel.neutral, color="0.35", linewidth=0.8)
    if panel.logarithmic and bool((measures[panel.variable] > 0).any()):
        ax.set_yscale("log")
    for kernel, line in _LINES.items():
        if kernel in measures["kernel"] and panel.kernel in (None, kernel):
            of_kernel = measures.sel(kernel=kernel)
            if panel.quantile is not None:
                of_kernel = of_kernel.sel(quantile=panel.quantile)
            values = of_kernel[panel.variable]
            if panel.logarithmic and bool((measures[panel.variable] > 0).any()):
                values = values.where(values > 0)
            if (error := of_kernel.get(f"{panel.variable}_error")) is not None:
                _bands(ax, values, error, positive=panel.logarithmic)
            _lines(ax, values, line)
    if panel.logarithmic and bool((measures[panel.variable] > 0).any()):
        _plain_ticks(ax)
    ax.set_title(panel.title)
    ax.set_ylabel(panel.label)


def _plain_ticks(ax: Axes) -> None:
    """Write numbers as they are on a logarithmic axis that spans less than two decades."""
    low, high = ax.get_ylim()
    powers_of_ten(ax.yaxis)
    if high < 100 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())


def _bands(ax: Axes, values: xr.DataArray, error: xr.DataArray, *, positive: bool) -> None:
    """Shade ± one standard error around the mean over seeds, above 0 where the axis is."""
    steps = values["iteration"].values
    mean, width = (
        v.mean("seed").transpose("learning_rate", "iteration").values for v in (values, error)
    )
    for k, colour in enumerate(rate_colours(len(mean))):
        low = mean[k] - width[k]
        if positive:
            low = np.where(low > 0, low, mean[k] / 10)
        ax.fill_between(steps, low, mean[k] + width[k], color=colour, alpha=0.2, linewidth=0)


def _legend(figure: Figure, measures: xr.Dataset, names: Names) -> None:
    handles = rate_handles(measures["learning_rate"].values, names)
    handles += [
        Line2D(
            [],
            [],
            color="0.35",
            linestyle=line,
            marker="o",
            markerfacecolor="0.35" if line == SOLID else "white",
            label=_KERNELS[kernel],
        )
        for kernel, line in _LINES.items()
        if kernel in measures["kernel"]
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4), handlelength=3.2
    )
