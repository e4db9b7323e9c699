"""Spectra of the loss-gradient kernel at the stages of training."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from distributed_stiffness.figures.checkpoints import (
    Names,
    details,
    of_seed,
    seeds_note,
    stages,
)
from distributed_stiffness.figures.style import heading, powers_of_ten, style

_TITLES = {"cosine": "Kernel of cosines", "gram": "Kernel of products"}
_LEAST = 1e-7  # shares below this are rounding


def spectra(spectrum: xr.Dataset, seed: int | None = None) -> Figure:
    """Draw the eigenvalues of the kernel, as shares of its trace, a line for each stage.

    A row for each learning rate; the kernel of cosines left, that of products right. A line that
    falls fast says that few directions hold most of the gradients.

    Args:
        spectrum: of the function of that name.
        seed: which; None: the mean over seeds.

    Raises:
        DataError: there is no such seed.
    """
    note, names = seeds_note(spectrum, seed), Names.of(spectrum)
    at = of_seed(spectrum, seed)
    shown = at.isel(iteration=stages(at["iteration"].values))
    rates, kernels = shown["learning_rate"].values, shown["kernel"].values.tolist()
    with style():
        figure = Figure(figsize=(10.4, 3.0 * len(rates) + 1.0), layout="constrained")
        axes = figure.subplots(len(rates), len(kernels), sharex=True, sharey=True, squeeze=False)
        for row, rate in enumerate(rates):
            for ax, kernel in zip(axes[row], kernels, strict=True):
                _panel(ax, shown.isel(learning_rate=row).sel(kernel=kernel), names)
                title = _TITLES[kernel]
                ax.set_title(
                    f"{title}, {names.rate_title(float(rate))}" if len(rates) > 1 else title
                )
            axes[row, 0].set_ylabel("share of the trace")
        for ax in axes[-1]:
            ax.set_xlabel("rank of the eigenvalue")
        rate_note = "" if len(rates) > 1 else names.rate_title(float(rates[0]))
        heading(figure, "Spectrum of the loss-gradient kernel", details(spectrum, rate_note, note))
    return figure


def _panel(ax: Axes, of_kernel: xr.Dataset, names: Names) -> None:
    steps = of_kernel["iteration"].values
    # Dark blue to yellow-green, in the order of the steps.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(steps)))
    ranks = of_kernel["rank"].values
    for k, step in enumerate(steps):
        at = of_kernel.isel(iteration=k)
        share = at["share"].where(at["share"] > _LEAST)
        label = "\n".join(part for part in (names.step_title(step), _rank(at)) if part)
        ax.plot(ranks, share, marker="o", ms=3, color=colours[k], label=label)
    ax.set_xscale("log")
    if bool((of_kernel["share"] > _LEAST).any()):  # not so where every gradient is 0
        ax.set_yscale("log")
        powers_of_ten(ax.yaxis)
    shown = [rank for rank in (1, 2, 5, 10, 20, 50, 100, 200) if rank <= ranks[-1]]
    ax.set_xticks(shown)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _rank(at: xr.Dataset) -> str:
    for name, text in (("effective_rank", "effective rank"), ("participation_ratio", "rank (PR)")):
        if np.isfinite(at[name]):
            return f"{text} {float(at[name]):.1f}"
    return "not computed yet"
