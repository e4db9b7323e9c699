from __future__ import annotations

from pathlib import Path

import pytest
import xarray as xr
from analysis.synthetic import Synthetic, write


@pytest.fixture(scope="session")
def made() -> xr.Dataset:
    """A study in memory: 4 classes in 2 super-classes, two splits, one zero gradient."""
    study = Synthetic(
        n_examples=40,
        n_train=16,
        n_superclasses=2,
        learning_rates=(1e-3, 1e-2),
        zero_gradients=(20,),
    )
    return study.build()


@pytest.fixture(scope="session")
def store(made: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Zarr store of whole tiles."""
    return write(made, tmp_path_factory.mktemp("stores") / "study.zarr", tile=12)
