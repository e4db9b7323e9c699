"""Class matrices as heat maps: one scale for all panels, white at 0."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from distributed_stiffness.analysis import class_matrix, compute, superclass_matrix
from distributed_stiffness.figures.checkpoints import (
    Names,
    details,
    of_learning_rate,
    of_seed,
    seeds_note,
    stages,
)
from distributed_stiffness.figures.style import (
    MEANING,
    heading,
    in_one_line,
    require_measure,
    style,
)

# More names than this on an axis are not legible: groups of them are named instead.
MOST_NAMES = 30
LONGEST_NAME = 32  # letters of a name along an axis
COLOURS = "RdBu_r"


def class_matrices(
    ds: xr.Dataset,
    measure: str = "sign",
    learning_rate: float | None = None,
    seed: int | None = None,
    *,
    class_labels: bool | None = None,
) -> Figure:
    """Draw class matrices at the stages of training, side by side (v1, Figures 3 to 6).

    Args:
        ds: a store, or what `class_matrix` returned.
        measure: "sign" or "cosine".
        learning_rate: which; None: a row for each, as in v1's Figure 8.
        seed: which; None: the mean over seeds.
        class_labels: name every class, at the price of a large figure; None: up to 30 classes.

    Raises:
        DataError: there is no such measure, learning rate or seed.
    """
    matrix = compute(class_matrix(ds)) if "example" in ds.dims else ds
    return _figure(matrix, measure, learning_rate, seed, class_labels, "class_name")


def learning_rate_matrices(
    ds: xr.Dataset,
    measure: str = "sign",
    seed: int | None = None,
    *,
    class_labels: bool | None = None,
) -> Figure:
    """Draw the class matrices of every learning rate, a row for each (v1, Figure 8).

    Columns are equal steps; v1 compared at equal training loss. Arguments are those of
    `class_matrices`.

    Raises:
        DataError: there is no such measure or seed.
    """
    return class_matrices(ds, measure, None, seed, class_labels=class_labels)


def superclass_matrices(
    ds: xr.Dataset,
    measure: str = "sign",
    learning_rate: float | None = None,
    seed: int | None = None,
) -> Figure:
    """Draw matrices of super-classes at the stages of training, side by side.

    Args:
        ds: a store with super-classes, or what `superclass_matrix` returned.
        measure: "sign" or "cosine".
        learning_rate: which; None: a row for each.
        seed: which; None: the mean over seeds.

    Raises:
        DataError: there are no super-classes, or no such measure, learning rate or seed.
    """
    matrix = compute(superclass_matrix(ds)) if "example" in ds.dims else ds
    return _figure(matrix, measure, learning_rate, seed, None, "superclass_name")


@dataclass(frozen=True)
class _Names:
    """What stands along both axes of every panel."""

    ticks: np.ndarray
    labels: list[str]
    borders: np.ndarray  # between groups of classes
    size: float  # of the letters, in points
    inches: float  # side of a panel

    @property
    def longest(self) -> float:
        """Inches that the longest name takes beyond a few letters."""
        return max(max(map(len, self.labels), default=0) - 10, 0) * 0.6 * self.size / 72


@dataclass(frozen=True)
class _Grid:
    """The matrices of one figure: a row for each learning rate, or one row that is wrapped."""

    values: xr.DataArray  # (learning_rate, iteration, a, b)
    checkpoints: Names
    names: _Names
    rows: int
    columns: int
    norm: Normalize

    @property
    def several_rates(self) -> bool:
        return self.values.sizes["learning_rate"] > 1

    def panels(self) -> list[xr.DataArray]:
        rates, steps = self.values.shape[:2]
        return [self.values[r, k] for r in range(rates) for k in range(steps)]


def _figure(
    matrix: xr.Dataset,
    measure: str,
    learning_rate: float | None,
    seed: int | None,
    class_labels: bool | None,
    dim: str,
) -> Figure:
    require_measure(measure)
    note = seeds_note(matrix, seed)
    norm = colour_scale(matrix[measure].values)
    matrix = of_learning_rate(of_seed(matrix, seed), learning_rate)
    grid = _grid(matrix, measure, class_labels, dim, norm)
    side, longest = grid.names.inches, grid.names.longest
    # Wide enough for the title and the legend of the colours over one panel.
    width = max(grid.columns * (side + 0.1) + 1.2, 6.0) + longest
    with style():
        figure = Figure(
            figsize=(width, grid.rows * (side + 0.45) + 2.0 + longest),
            layout="constrained",
        )
        axes = figure.subplots(grid.rows, grid.columns, squeeze=False)
        panels = grid.panels()
        for ax, panel in zip(axes.flat, panels, strict=False):
            _draw(ax, panel, grid)
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        _name_axes(axes, len(panels), grid, str(matrix.attrs.get("splits", "")))
        _title(figure, grid, measure, details(matrix, *_rate_and_seeds(grid, note)))
        _colour_bar(figure, axes.ravel()[: len(panels)].tolist(), grid, measure)
    return figure


def by_superclass(matrix: xr.Dataset, dim: str) -> xr.Dataset:
    """Return a matrix of many classes in the order of their super-classes; any other as it is."""
    if dim == "class_name" and "superclass_name" in matrix.coords and len(matrix[dim]) > MOST_NAMES:
        order = np.argsort(matrix["superclass"].values, kind="stable")
        return matrix.isel({dim: order, f"other_{dim}": order})
    return matrix


def colour_scale(values: np.ndarray) -> Normalize:
    """Return a scale symmetric about 0, up to a round number that holds every value."""
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size else 1.0
    step = 0.1 if largest > 0.3 else 0.05 if largest > 0.1 else 0.01
    limit = min(max(np.ceil(largest / step - 1e-9) * step, 0.01), 1.0)
    return Normalize(-limit, limit)


def _grid(
    matrix: xr.Dataset, measure: str, class_labels: bool | None, dim: str, norm: Normalize
) -> _Grid:
    matrix = by_superclass(matrix, dim)
    shown = matrix.isel(iteration=stages(matrix["iteration"].values))
    values = shown[measure].transpose("learning_rate", "iteration", dim, f"other_{dim}")
    rates, steps = values.shape[:2]
    names = _names(values, dim, class_labels)
    # Large panels, and rows of more than four, are wrapped: they would be too small on a page.
    wide = 2 if names.inches > 3 else 3 if steps > 4 else 4
    columns = steps if rates > 1 else min(steps, wide)
    rows = rates if rates > 1 else -(-steps // columns)
    return _Grid(values, Names.of(matrix), names, rows, columns, norm)


def _names(values: xr.DataArray, dim: str, class_labels: bool | None) -> _Names:
    every = [in_one_line(str(name), LONGEST_NAME) for name in values[dim].values]
    n, none = len(every), np.array([])
    if n <= MOST_NAMES and class_labels is not False:
        inches = 2.1 if n <= 12 else 3.4
        return _Names(np.arange(n), every, none, 8 if n <= 12 else 7, inches)
    above = (
        [in_one_line(str(name), LONGEST_NAME) for name in values["superclass_name"].values]
        if ("superclass_name" in values.coords)
        else []
    )
    borders = np.array([k - 0.5 for k in range(1, n) if above and above[k] != above[k - 1]])
    if class_labels:
        return _Names(np.arange(n), every, borders, 4, max(3.4, 0.07 * n))
    if above:
        edges = np.concatenate([[-0.5], borders, [n - 0.5]])
        middles = (edges[:-1] + edges[1:]) / 2
        return _Names(middles, [above[round(m)] for m in middles], borders, 7, 4.2)
    some = np.arange(0, n, -(-n // MOST_NAMES))
    return _Names(some, [every[k] for k in some], none, 7, 4.2)


def _draw(ax: Axes, panel: xr.DataArray, grid: _Grid) -> None:
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad="0.8")
    ax.imshow(np.ma.masked_invalid(panel.values), cmap=colours, norm=grid.norm)
    ax.set_title(grid.checkpoints.stage_title(panel))
    ax.set_xticks(grid.names.ticks, [])
    ax.set_yticks(grid.names.ticks, [])
    ax.tick_params(length=0 if grid.names.borders.size else 2)
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    for border in grid.names.borders:
        ax.axhline(border, color="0.35", linewidth=0.4)
        ax.axvline(border, color="0.35", linewidth=0.4)


def _name_axes(axes: np.ndarray, n_panels: int, grid: _Grid, splits: str) -> None:
    """Write names left of the first column and below the last panel of each column."""
    first, _, second = splits.partition("-")
    across = "of the other example" if first == second else f"of the {second} example"
    down = "of one example" if first == second else f"of the {first} example"
    noun = "super-class" if "superclass_name" in grid.values.dims else "class"
    if grid.names.borders.size and len(grid.names.labels) < grid.values.shape[-1]:
        noun = "class, by super-class,"
    size = grid.names.size
    turned = 90 if max(map(len, grid.names.labels)) > 2 else 0
    for at, ax in enumerate(axes.flat[:n_panels]):
        if at + grid.columns >= n_panels:
            ax.set_xticks(grid.names.ticks, grid.names.labels, rotation=turned, fontsize=size)
            ax.set_xlabel(f"{noun} {across}")
        if at % grid.columns == 0:
            ax.set_yticks(grid.names.ticks, grid.names.labels, fontsize=size)
            rate = float(
                grid.values["learning_rate"].values[at // grid.columns if grid.several_rates else 0]
            )
            above = f"{grid.checkpoints.rate_title(rate)}\n" if grid.several_rates else ""
            ax.set_ylabel(f"{above}{noun} {down}")


def _rate_and_seeds(grid: _Grid, note: str) -> list[str]:
    rates = grid.values["learning_rate"].values
    return [note] if grid.several_rates else [grid.checkpoints.rate_title(float(rates[0])), note]


def _title(figure: Figure, grid: _Grid, measure: str, line: str) -> None:
    noun = "super-classes" if "superclass_name" in grid.values.dims else "classes"
    heading(figure, f"{measure.capitalize()} stiffness within and between {noun}", line)


def _colour_bar(figure: Figure, axes: list[Axes], grid: _Grid, measure: str) -> None:
    colours = matplotlib.colormaps[COLOURS]
    bar = figure.colorbar(
        ScalarMappable(grid.norm, colours),
        ax=axes,
        location="bottom",
        aspect=45,
        shrink=min(1.0, 5.2 / (grid.columns * grid.names.inches)),
        pad=0.02,
    )
    missing = "; grey: no pairs yet" if grid.values.isnull().any() else ""
    bar.set_label(f"{MEANING[measure]}{missing}")
