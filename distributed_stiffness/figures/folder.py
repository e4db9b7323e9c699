"""Every figure of a study, in a folder."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.figures.style import save
from distributed_stiffness.figures.views import VIEWS
from distributed_stiffness.paths import Location, local
from distributed_stiffness.progress import Progress


def draw_all(
    ds: xr.Dataset | Summary, folder: Location, progress: Progress | None = None
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
    figures = [view for view in VIEWS.values() if view.in_report and view.is_of(numbers)]
    phase = progress.phase("figures", len(figures), "figures") if progress else None
    where, paths = local(folder, "the folder of figures"), {}
    for view in figures:
        paths[view.name] = save(view.draw(numbers), where / f"{view.name}.png")
        if phase:
            phase.advance()
    if phase:
        phase.close()
    return paths
