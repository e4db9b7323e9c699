"""Means over seeds, and runs at equal training loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import (
    at_equal_loss,
    checkpoint_curves,
    class_matrix,
    critical_length,
    over_seeds,
    superclass_contrast,
    within_between,
)
from distributed_stiffness.errors import DataError


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return Synthetic(
        n_examples=16,
        n_superclasses=2,
        learning_rates=(1e-3, 1e-2),
        seeds=(0, 1, 2),
        iterations=(0, 10, 100, 1000),
    ).build()


class TestOverSeeds:
    def test_both_errors(self, study: xr.Dataset):
        """The error over seeds stands beside the mean of the errors over examples."""
        result = within_between(study).compute()
        averaged = over_seeds(result)
        values = result["sign"].transpose("seed", ...).values

        np.testing.assert_allclose(averaged["sign"], values.mean(0))
        np.testing.assert_allclose(
            averaged["sign_seed_error"], values.std(0, ddof=1) / np.sqrt(3), atol=1e-15
        )
        np.testing.assert_allclose(averaged["sign_error"], result["sign_error"].mean("seed"))
        assert "sign_gap_seed_error" in averaged
        assert "pairs_seed_error" not in averaged
        assert "over seeds" in averaged["sign_seed_error"].attrs["long_name"]

    def test_coordinates(self, study: xr.Dataset):
        """Training curves are averaged too, and stay coordinates."""
        averaged = over_seeds(class_matrix(study))

        assert averaged["train_loss"].dims == ("learning_rate", "iteration")
        assert "train_loss" in averaged.coords
        assert averaged.attrs == class_matrix(study).attrs

    def test_missing(self, study: xr.Dataset):
        """Seeds without a number are left out and do not count."""
        result = within_between(study).compute()
        result["sign"].values[:, 0] = np.nan
        two = over_seeds(result)
        result["sign"].values[:, 1] = np.nan
        one = over_seeds(result)

        assert two["sign_seed_error"].notnull().all()
        np.testing.assert_allclose(one["sign"], result["sign"].isel(seed=2))
        assert one["sign_seed_error"].isnull().all()

    def test_flags_and_p_values(self, study: xr.Dataset):
        """A flag holds where it does for every seed; of p-values the largest is kept."""
        length = critical_length(study).compute()
        length["sign_inside"].values[:] = [[[True], [True], [False]]]
        contrast = superclass_contrast(study).compute()

        assert not over_seeds(length)["sign_inside"].any()
        xr.testing.assert_equal(
            over_seeds(contrast)["sign_p_value"].drop_vars(list(contrast.coords), errors="ignore"),
            contrast["sign_p_value"].max("seed").drop_vars(list(contrast.coords), errors="ignore"),
        )

    def test_no_seeds(self, study: xr.Dataset):
        """Without the dimension there is nothing to average."""
        with pytest.raises(DataError, match="no dimension seed"):
            over_seeds(within_between(study.isel(seed=0)))


def line(losses: list[float], values: list[float], errors: list[float]) -> xr.Dataset:
    """One run's means and errors at steps 0, 10, 20, …"""
    steps = 10 * np.arange(len(losses))
    return xr.Dataset(
        {
            "sign": ("iteration", values),
            "sign_error": ("iteration", errors),
            "pairs": ("iteration", np.arange(len(losses)) + 5),
        },
        coords={"iteration": steps, "train_loss": ("iteration", losses)},
    )


class TestAtEqualLoss:
    def test_logarithm(self):
        """Between two checkpoints numbers are linear in the logarithm of the loss."""
        got = at_equal_loss(line([4.0, 1.0, 0.25], [0.0, 1.0, 0.0], [0.1, 0.3, 0.1]), 2.0)

        np.testing.assert_allclose(got["sign"], 0.5)
        np.testing.assert_allclose(got["iteration"], 5)
        np.testing.assert_allclose(got["train_loss"], 2.0)
        assert int(got["pairs"]) == 5

    def test_error(self):
        """Errors of the same examples are added, not their squares."""
        got = at_equal_loss(line([4.0, 1.0], [0.0, 1.0], [0.1, 0.3]), 2.0)

        np.testing.assert_allclose(got["sign_error"], 0.2)

    def test_at_a_checkpoint(self):
        """At a checkpoint's own loss its numbers are given, whatever its neighbours lack."""
        run = line([4.0, 1.0, 0.5], [0.3, 0.7, np.nan], [0.1, 0.2, np.nan])

        np.testing.assert_allclose(at_equal_loss(run, 1.0)["sign"], 0.7)
        np.testing.assert_allclose(at_equal_loss(run, 4.0)["sign"], 0.3)
        assert np.isnan(at_equal_loss(run, 0.8)["sign"])

    def test_first_time(self):
        """A loss that rises again was reached where it was first."""
        got = at_equal_loss(line([4.0, 1.0, 3.0, 1.0], [0.0, 1.0, 5.0, 9.0], [0.1] * 4), 2.0)

        np.testing.assert_allclose(got["iteration"], 5)

    def test_zero_loss(self):
        """A training loss of exactly zero is below every loss."""
        got = at_equal_loss(line([4.0, 0.0], [0.0, 1.0], [0.1, 0.1]), 2.0)

        assert 0 <= float(got["sign"]) < 0.01

    def test_study(self, study: xr.Dataset):
        """Every rate and seed has its own step; results stay lazy and keep what they are."""
        result = within_between(study.chunk({"example": 8}))
        got = at_equal_loss(result, 1.0)

        assert got["sign"].chunks is not None
        assert got["sign"].attrs == result["sign"].attrs
        assert got["iteration"].dims == ("learning_rate", "seed")
        assert "iteration" not in got.dims
        assert got.attrs["never_reached"] == ""
        faster = got["iteration"].mean("seed")
        assert faster[1] < faster[0]
        curves = at_equal_loss(checkpoint_curves(study), 1.0)
        xr.testing.assert_allclose(
            curves["validation_loss"].drop_vars(list(curves.coords)),
            got["validation_loss"].reset_coords(drop=True).drop_vars(["learning_rate", "seed"]),
        )

    def test_never_reached(self, study: xr.Dataset):
        """A run that never gets there is NaN and is named."""
        got = at_equal_loss(within_between(study), 0.38).compute()

        assert got.attrs["never_reached"] == "learning_rate 0.001, seed 0"
        missing = got["sign"].isnull().all("relation")
        assert missing.values.tolist() == [[True, False, False], [False, False, False]]
        assert int(got["pairs"].isel(learning_rate=0, seed=0, relation=0)) == 0

    def test_refused(self, study: xr.Dataset):
        """Nobody gets there; a loss that is none; a result without iterations."""
        result = within_between(study)

        with pytest.raises(DataError, match=r"no run passes a training loss of 0\.01"):
            at_equal_loss(result, 0.01)
        with pytest.raises(DataError, match="above 0"):
            at_equal_loss(result, -1.0)
        with pytest.raises(DataError, match="carries train_loss"):
            at_equal_loss(result.isel(iteration=0, drop=True), 1.0)

    def test_p_values(self, study: xr.Dataset):
        """A p-value between two checkpoints means nothing and is left out."""
        got = at_equal_loss(superclass_contrast(study), 1.0)

        assert "sign_contrast_error" in got
        assert "sign_p_value" not in got


def test_store(store: Path):
    """Both work on what an opened store gives."""
    result = xr.open_zarr(store).stiffness.within_between()

    assert over_seeds(at_equal_loss(result, 1.8)).compute()["sign"].notnull().all()
