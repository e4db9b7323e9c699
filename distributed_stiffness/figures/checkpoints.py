"""Which checkpoints a figure shows, and what they are called."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness.analysis import over_seeds
from distributed_stiffness.errors import DataError
from distributed_stiffness.study import is_given, rate_in_words

RUN = ("learning_rate", "seed", "iteration")
MOST_STAGES = 6


def with_run_dims(ds: xr.Dataset) -> xr.Dataset:
    """Return `ds` with learning rate, seed and iteration as dimensions, if need be of size 1."""
    missing = [dim for dim in RUN if dim not in ds.dims]
    unnamed = {dim: 0 for dim in missing if dim not in ds.coords}
    curves = [name for name, c in ds.coords.items() if name not in ds.indexes and name not in RUN]
    return ds.assign_coords(unnamed).reset_coords(curves).expand_dims(missing).set_coords(curves)


def of_seed(ds: xr.Dataset, seed: int | None) -> xr.Dataset:
    """Return one seed's statistics, or `over_seeds` of them; without the dimension.

    Raises:
        DataError: there is no such seed.
    """
    ds = with_run_dims(ds)
    if seed is not None:
        return ds.isel(seed=_position(ds, "seed", seed))
    return over_seeds(ds)


def of_learning_rate(ds: xr.Dataset, learning_rate: float | None) -> xr.Dataset:
    """Return the statistics of one learning rate, or of all; with the dimension.

    Raises:
        DataError: there is no such learning rate.
    """
    if learning_rate is None:
        return ds
    return ds.isel(learning_rate=[_position(ds, "learning_rate", learning_rate)])


def stages(iterations: Sequence[int] | np.ndarray) -> list[int]:
    """Return the positions of the iterations to show.

    All of them if there are at most six, else the paper's four stages (v1, Figures 3 to 6): the
    first, an early one, two later ones. The early one is the first after step 0; the third lies
    halfway to the last on a logarithmic scale.
    """
    steps = np.asarray(iterations, dtype=float)
    if len(steps) <= MOST_STAGES:
        return list(range(len(steps)))
    early = 1
    middle = np.sqrt(max(steps[early], 1) * steps[-1])
    between = np.arange(early + 1, len(steps) - 1)
    nearest = between[np.abs(np.log(steps[between]) - np.log(middle)).argmin()]
    return [0, early, int(nearest), len(steps) - 1]


@dataclass(frozen=True)
class Names:
    """How figures and report call a study's checkpoints: what nobody gave is not said.

    What was trained here knows its learning rates, seeds and steps, and has epochs.
    """

    trained_here: bool
    rate: bool  # whether learning rates are said
    seed: bool
    step: bool

    @classmethod
    def of(cls, ds: xr.Dataset) -> Names:
        """Look at the checkpoints of a store or of a reduction."""
        trained_here = "epoch" in ds.variables
        given = {
            dim: is_given(np.atleast_1d(ds[dim].values).tolist(), trained_here=trained_here)
            for dim in RUN
            if dim in ds.variables
        }
        return cls(trained_here, *(given.get(dim, False) for dim in RUN))

    def rate_title(self, learning_rate: float) -> str:
        """Name a learning rate; empty where none was given."""
        return f"learning rate {rate_in_words(learning_rate)}" if self.rate else ""

    def step_title(self, step: float) -> str:
        """Name a step; empty where none was given."""
        return f"step {step:,.0f}" if self.step else ""

    def place(self, at: Mapping[Hashable, Any]) -> str:
        """Name a checkpoint by the numbers of its dimensions, those that are there and given."""
        parts = [
            self.rate_title(float(at["learning_rate"])) if "learning_rate" in at else "",
            f"seed {int(at['seed'])}" if self.seed and "seed" in at else "",
            self.step_title(float(at["iteration"])) if "iteration" in at else "",
        ]
        return ", ".join(part for part in parts if part)

    def stage_title(self, at: xr.DataArray) -> str:
        """Say when a checkpoint was: step, epoch and validation accuracy, as far as known."""
        when = [self.step_title(float(at["iteration"]))]
        if self.trained_here and float(at["iteration"]) == 0:
            when.append("before training")
        elif "epoch" in at.coords:
            when.append(f"epoch {_short(float(at['epoch']))}")
        lines = [", ".join(part for part in when if part)]
        if "validation_accuracy" in at.coords and np.isfinite(at["validation_accuracy"]):
            share = f"{float(at['validation_accuracy']):.0%}".replace("%", " %")
            lines.append(f"validation accuracy {share}")
        return "\n".join(line for line in lines if line)

    @property
    def steps(self) -> str:
        """What is counted along an axis of steps."""
        return "optimiser steps" if self.trained_here else "steps"


def details(ds: xr.Dataset, *more: str) -> str:
    """Say in one line what was looked at: data set, model, splits."""
    first, _, second = str(ds.attrs.get("splits", "")).partition("-")
    pairs = ""
    if second:
        pairs = f"{first} pairs" if first == second else f"{first} with {second} pairs"
    parts = [str(ds.attrs.get("dataset", "")), str(ds.attrs.get("model", "")), pairs, *more]
    return "  ·  ".join(part for part in parts if part)


def seeds_note(ds: xr.Dataset, seed: int | None) -> str:
    """Say which seeds a figure shows, where there are several."""
    n = with_run_dims(ds).sizes["seed"]
    if n == 1:
        return ""
    return f"mean of {n} seeds" if seed is None else f"seed {seed}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _position(ds: xr.Dataset, dim: str, value: float) -> int:
    known = ds[dim].values
    found = np.flatnonzero(np.isclose(known, value, rtol=1e-9, atol=0))
    if not found.size:
        raise DataError(
            f"{dim} is {value!r}, but there are only {', '.join(f'{k:g}' for k in known)}"
        )
    return int(found[0])
