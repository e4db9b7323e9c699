"""From a store to figures, report and the lines that a command prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness.analysis import distances_of, summary
from distributed_stiffness.errors import DataError, StoreError
from distributed_stiffness.figures import VIEWS, draw_all, save, views_in_words
from distributed_stiffness.paths import Location, local, located, require_writable
from distributed_stiffness.progress import Progress
from distributed_stiffness.report.findings import findings
from distributed_stiffness.report.page import write_report
from distributed_stiffness.study import rate_in_words

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Presented:
    """What a store shows, and where figures and report were written."""

    store: str
    findings: tuple[str, ...]
    report: Path
    figures: Mapping[str, Path]  # by name

    def lines(self) -> list[str]:
        """For people."""
        names = ", ".join(path.name for path in self.figures.values())
        return [
            *self.findings,
            f"Report: {self.report}",
            f"Figures: {self.report.parent} ({names})",
            f"Store: {self.store}, opens with xarray.open_zarr",
        ]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "store": self.store,
            "report": str(self.report),
            "figures": {name: str(path) for name, path in self.figures.items()},
            "findings": list(self.findings),
        }


def present(
    store: Location,
    folder: Location,
    progress: Progress | None = None,
    *,
    data_directory: Location | None = None,
) -> list[str]:
    """Draw the figures of a store, write its report and return what it shows, in lines.

    Arguments and errors as of `presented`.
    """
    return presented(store, folder, progress, data_directory=data_directory).lines()


def presented(
    store: Location,
    folder: Location,
    progress: Progress | None = None,
    *,
    data_directory: Location | None = None,
) -> Presented:
    """Draw the figures of a store, write its report and return what it shows.

    Args:
        store: path or URL.
        folder: where report.html and the figures go; made if need be.
        progress: shows how far it is.
        data_directory: where the pictures of examples are looked for; None: the default.

    Raises:
        StoreError: there is no store there, or the folder cannot be written.
        DataError: it lacks what the figures need.
    """
    url, ds = located(store, "store", StoreError), _open(store)
    where = local(folder, "the folder of the report", StoreError)
    _require_writable(where)
    numbers = replace(summary(ds, progress=progress), data_directory=_text(data_directory))
    with _written(where):
        figures = draw_all(numbers, where, progress)
        page = write_report(numbers, figures, where / "report.html", store=url)
    return Presented(url, tuple(findings(numbers)), page, figures)


def plot(
    store: Location,
    view: str,
    path: Location,
    *,
    at: Mapping[str, Sequence[float]] | None = None,
    distance: str = "distance",
    against: Location | None = None,
    data_directory: Location | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draw one view of a store.

    Args:
        store: path or URL.
        view: one of `figures.VIEWS`.
        path: where the figure goes; its suffix says the format: .png, .svg or .pdf.
        at: learning rates, seeds or iterations that are looked at, by dimension; others: all.
        distance: a variable of the store, for the views of distances.
        against: path or URL of a store of the same examples, for the view of two studies.
        data_directory: where the pictures of examples are looked for; None: the default.
        progress: shows how far it is.

    Returns:
        `path`.

    Raises:
        StoreError: there is no store there, or the figure cannot be written.
        DataError: there is no such view, format or checkpoint, or the store lacks its numbers.
    """
    path = local(path, "the figure", StoreError)
    if view not in VIEWS:
        raise DataError("\n  ".join([f"there is no view {view!r}; there are:", *views_in_words()]))
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"a figure cannot be written as {path.name!r}: expected a name that ends in"
            f" {', '.join(SUFFIXES)}"
        )
    if VIEWS[view].needs == "paired" and against is None:
        raise DataError(f"{view} shows two studies: give the other one's store with --against")
    _require_writable(path.parent)
    if path.is_dir():
        raise StoreError(f"cannot write the figure {path}: it is a folder; name a file with --out")
    numbers = summary(
        _at(_open(store), at or {}),
        distance=distance,
        against=None if against is None else _open(against),
        progress=progress,
    )
    if not VIEWS[view].is_of(numbers):
        there = ", ".join(name for name, v in VIEWS.items() if v.is_of(numbers))
        raise DataError(f"{store} has no numbers for {view!r}; it has for {there}")
    numbers = replace(numbers, data_directory=_text(data_directory))
    with _written(path):
        return save(VIEWS[view].draw(numbers), path)


def distances_in(store: Location) -> dict[str, str]:
    """Return what each distance of a store is, by the name of its variable.

    Raises:
        StoreError: there is no store there.
    """
    ds = _open(store)
    return {name: str(ds[name].attrs.get("long_name", "")) for name in distances_of(ds)}


def _open(store: Location) -> xr.Dataset:
    url = located(store, "store", StoreError)
    try:
        found: xr.Dataset = xr.open_zarr(url, chunks={})
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no store at {url}: give the path or URL of one that a study wrote"
        ) from error
    return found


def _require_writable(folder: Path) -> None:
    require_writable(folder, "figures", "give another place with --out", StoreError)


@contextlib.contextmanager
def _written(place: Path) -> Iterator[None]:
    """Say what storage says where writing fails in spite of the look before: a full disk."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {place}: {error}; give another with --out") from error


def _text(directory: Location | None) -> str | None:
    return None if directory is None else located(directory, "the data directory")


def _in_words(dim: str, value: float) -> str:
    return f"0, {rate_in_words(0)}" if dim == "learning_rate" and value == 0 else f"{value:g}"


def _at(ds: xr.Dataset, wanted: Mapping[str, Sequence[float]]) -> xr.Dataset:
    """Keep some checkpoints."""
    for dim, values in wanted.items():
        known = ds[dim].values
        places = [np.flatnonzero(np.isclose(known, value, rtol=1e-6, atol=0)) for value in values]
        for value, found in zip(values, places, strict=True):
            if not len(found):
                raise DataError(
                    f"the store has no {dim.replace('_', ' ')} {value:g}: it has"
                    f" {', '.join(_in_words(dim, k) for k in known)}"
                )
        ds = ds.isel({dim: np.concatenate(places)})
    return ds
