"""Small real studies for the tests: the embedded digits, a small network, seconds on one core."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import xarray as xr

from distributed_stiffness.engine import Run
from distributed_stiffness.study import Data, Gradients, Model, Study, Training


def tiny_study(**changes: object) -> Study:
    """Two rates, two iterations, 60 examples in tiles of 20."""
    fields: dict[str, object] = {
        "title": "tiny",
        "data": Data(name="digits", validation_examples=60),
        "model": Model(name="fully_connected", options={"widths": [16, 8]}),
        "training": Training(learning_rates=(1e-3, 1e-2), iterations=(0, 30)),
        "gradients": Gradients(tile=20),
    }
    return Study(**(fields | changes))


def run_options(store: Path | str, **changes: object) -> Run:
    """One thread and a fixed budget, so that every engine makes the same plan."""
    fields: dict[str, object] = {
        "store": str(store),
        "engine": "serial",
        "threads": 1,
        "memory": 200_000_000,
        "quiet": True,
    }
    return Run(**(fields | changes))


def arrays(store: Path | str) -> dict[str, np.ndarray]:
    """Read every variable of a store."""
    with xr.open_zarr(str(store)) as dataset:
        return {name: variable.values for name, variable in dataset.data_vars.items()}


def assert_same_bits(left: Path | str, right: Path | str) -> None:
    """Every number of two stores is the same, bit for bit."""
    ours, theirs = arrays(left), arrays(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def hears_ctrl_c() -> None:
    """Undo what a shell does to its background processes, in a child: SIGINT is ignored there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
