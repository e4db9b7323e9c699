"""Several training losses at once, and which every run passes."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import (
    at_equal_loss,
    at_equal_losses,
    common_losses,
    summary,
    within_between,
)
from distributed_stiffness.errors import DataError


def losses(*runs: list[float]) -> xr.DataArray:
    return xr.DataArray(
        [[run] for run in runs], dims=("learning_rate", "seed", "iteration"), name="train_loss"
    )


class TestCommonLosses:
    def test_geometric(self):
        """They lie evenly in their logarithm between the least start and the highest end."""
        found = common_losses(losses([2.0, 0.5, 0.02], [1.6, 0.1, 0.1]), 3)

        np.testing.assert_allclose(found, [0.8, 0.4, 0.2])

    def test_none(self):
        """Where one run ends above where another starts there is none."""
        assert common_losses(losses([2.0, 1.0], [0.9, 0.1])) == []


class TestAtEqualLosses:
    @pytest.fixture
    def result(self) -> xr.Dataset:
        ds = Synthetic(learning_rates=(1e-3, 1e-2), iterations=(0, 10, 100, 1000)).build()
        return within_between(ds).compute()

    def test_each(self, result: xr.Dataset):
        """Each loss is what it is alone."""
        found = at_equal_losses(result, [1.0, 0.5])

        for loss in (1.0, 0.5):
            alone = at_equal_loss(result, loss)
            for name in ("sign", "cosine_error", "iteration"):
                np.testing.assert_array_equal(found[name].sel(train_loss=loss), alone[name])

    def test_by_default(self, result: xr.Dataset):
        """Without losses they are three that every run passes: no run is left out."""
        found = at_equal_losses(result)

        assert found.sizes["train_loss"] == 3
        assert np.isfinite(found["sign"]).all()
        assert found.attrs["never_reached"] == ""

    def test_never_reached(self, result: xr.Dataset):
        """Runs that miss one of the losses are named once."""
        runs = result["train_loss"].min("iteration").values.ravel()
        between = float(np.sqrt(runs.min() * runs.max()))
        found = at_equal_losses(result, [1.0, between])

        assert found.attrs["never_reached"] == "learning_rate 0.001, seed 0"

    def test_nothing_in_common(self, result: xr.Dataset):
        """Without a loss that every run passes it is refused."""
        far = result.assign_coords(train_loss=result["train_loss"] * [[[1.0]], [[1e-6]]])

        with pytest.raises(DataError, match="no training loss that every run passes"):
            at_equal_losses(far)

    def test_no_losses(self, result: xr.Dataset):
        """A result that carries no training loss is refused."""
        with pytest.raises(DataError, match="carries train_loss"):
            at_equal_losses(result.drop_vars("train_loss"))

    def test_summary(self):
        """A summary has them where there are rates to compare."""
        two = Synthetic(n_examples=12, learning_rates=(1e-3, 1e-2), iterations=(0, 10, 1000))
        one = Synthetic(n_examples=12, iterations=(0, 10, 1000))

        assert summary(one.build()).equal_loss is None
        found = summary(two.build()).equal_loss
        assert found is not None
        assert found["sign"].dims == ("train_loss", "learning_rate", "seed", "relation")
