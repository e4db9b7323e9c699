"""From a store to figures, report and the lines that a command prints."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from distributed_stiffness.analysis import summary
from distributed_stiffness.errors import StoreError
from distributed_stiffness.figures import draw_all
from distributed_stiffness.progress import Progress
from distributed_stiffness.report.findings import findings
from distributed_stiffness.report.page import write_report


def present(store: str, folder: str | Path, progress: Progress | None = None) -> list[str]:
    """Draw the figures of a store, write its report and return what it shows.

    Args:
        store: path or URL.
        folder: where report.html and the figures go; made if need be.
        progress: shows how far it is.

    Returns:
        Findings, one a line, then where report and figures are.

    Raises:
        StoreError: there is no store there.
        DataError: it lacks what the figures need.
    """
    try:
        ds = xr.open_zarr(store, chunks={})
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no store at {store}: give the path or URL of one that a study wrote"
        ) from error
    folder = Path(folder)
    numbers = summary(ds, progress=progress)
    figures = draw_all(numbers, folder, progress)
    page = write_report(numbers, figures, folder / "report.html", store=store)
    return [
        *findings(numbers),
        f"Report: {page}",
        f"Figures: {folder} ({', '.join(path.name for path in figures.values())})",
        f"Store: {store}, opens with xarray.open_zarr",
    ]
