"""Compute lazy results together, so that each chunk of the store is read once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import dask
import dask.array as da
import xarray as xr
from dask.callbacks import Callback

from distributed_stiffness.progress import Phase, Progress


def compute(dataset: xr.Dataset, progress: Progress | None = None) -> xr.Dataset:
    """Compute every variable of a lazy Dataset in one pass; show how far it is."""
    return compute_together([dataset], progress)[0]


def compute_together(
    datasets: Sequence[xr.Dataset], progress: Progress | None = None
) -> list[xr.Dataset]:
    """Compute several lazy Datasets in one pass; what they share is computed once."""
    # Their arrays, not the Datasets: dask.compute(dataset) fails ("Missing dependency") where one
    # variable is an array of the store and another is computed from it (dask 2026.8).
    lazy = {
        (k, name): variable.data
        for k, dataset in enumerate(datasets)
        for name, variable in dataset.variables.items()
        if isinstance(variable.data, da.Array)
    }
    if progress is None:
        values = dask.compute(*lazy.values())
    else:
        with _Shown(progress):
            values = dask.compute(*lazy.values())
    done = dict(zip(lazy, values, strict=True))
    return [
        _filled(dataset, {name: value for (at, name), value in done.items() if at == k})
        for k, dataset in enumerate(datasets)
    ]


def _filled(dataset: xr.Dataset, values: Mapping[Hashable, Any]) -> xr.Dataset:
    variables = {
        name: dataset.variables[name].copy(data=value)  # keeps dims and attributes
        for name, value in values.items()
    }
    coordinates = {name: v for name, v in variables.items() if name in dataset.coords}
    data = {name: v for name, v in variables.items() if name not in dataset.coords}
    return dataset.assign(data).assign_coords(coordinates)


class _Shown(Callback):  # type: ignore[misc]  # dask has no types
    """Shows the tasks of dask's own schedulers as a phase."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._phase: Phase | None = None

    def _start_state(self, _graph: Any, state: Any) -> None:
        parts = ("ready", "waiting", "running", "finished")
        total = sum(len(state[part]) for part in parts)
        self._phase = self._progress.phase("reductions", total, "tasks")

    def _posttask(self, *_: Any) -> None:
        if self._phase is not None:
            self._phase.advance()

    def _finish(self, *_: Any) -> None:
        if self._phase is not None:
            self._phase.close()
