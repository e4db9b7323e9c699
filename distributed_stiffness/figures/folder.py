"""Every figure of a study, in a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.figures.curves import stiffness_curves
from distributed_stiffness.figures.heatmap import class_matrices, superclass_matrices
from distributed_stiffness.figures.profile import profiles
from distributed_stiffness.figures.style import MEANING, save
from distributed_stiffness.progress import Progress


def draw_all(
    ds: xr.Dataset | Summary, folder: Path, progress: Progress | None = None
) -> dict[str, Path]:
    """Draw every figure that a study has the numbers for, as PNG files.

    Args:
        ds: a store, or its summary where it is at hand.
        folder: where NAME.png go; made if need be.
        progress: shows how many are drawn.

    Returns:
        Path of each figure by name: class_matrices_sign, class_matrices_cosine, stiffness_curves;
        with super-classes superclass_matrices_sign and superclass_matrices_cosine; with distances
        distance_profile.
    """
    numbers = ds if isinstance(ds, Summary) else summary(ds, progress=progress)
    figures = _figures(numbers)
    phase = progress.phase("figures", len(figures), "figures") if progress else None
    paths = {}
    for name, draw in figures.items():
        paths[name] = save(draw(), Path(folder) / f"{name}.png")
        if phase:
            phase.advance()
    if phase:
        phase.close()
    return paths


def _figures(numbers: Summary) -> dict[str, Callable[[], Figure]]:
    """Return how to draw each figure that there are numbers for."""
    figures: dict[str, Callable[[], Figure]] = {
        f"class_matrices_{measure}": partial(class_matrices, numbers.class_matrix, measure)
        for measure in MEANING
    }
    if numbers.superclass_matrix is not None:
        for measure in MEANING:
            name = f"superclass_matrices_{measure}"
            figures[name] = partial(superclass_matrices, numbers.superclass_matrix, measure)
    figures["stiffness_curves"] = partial(stiffness_curves, numbers.within_between, numbers.curves)
    if numbers.distance_profile is not None:
        figures["distance_profile"] = partial(
            profiles, numbers.distance_profile, length=numbers.critical_length
        )
    return figures
