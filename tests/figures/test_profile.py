"""Distance profiles: the curve of each stage, the critical length marked where it is one."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import critical_length, distance_profile
from distributed_stiffness.errors import DataError
from distributed_stiffness.figures import profiles


def profile(within: list[float]) -> xr.Dataset:
    """A profile of one checkpoint with these means, 100 pairs in each bin."""
    n = len(within)
    shape = ("learning_rate", "seed", "iteration", "relation", "distance_bin")
    means, pairs = np.array(within)[None, None, None, None], np.full((1, 1, 1, 1, n), 100)
    return xr.Dataset(
        {
            "sign": (shape, means),
            "cosine": (shape, means / 2),
            "pairs": (shape, pairs),
            "cosine_pairs": (shape, pairs),
        },
        coords={
            "learning_rate": [1e-3],
            "seed": [0],
            "iteration": [400],
            "relation": ["within"],
            "distance_bin": 0.1 * np.arange(n) + 0.05,
            "lower_edge": ("distance_bin", 0.1 * np.arange(n)),
            "upper_edge": ("distance_bin", 0.1 * np.arange(1, n + 1)),
        },
    )


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def marks(ax) -> list[float]:
    return [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "v"]


class TestProfiles:
    def test_critical_length(self):
        """A crossing inside the observed distances is marked on the zero line and named."""
        sign, cosine = profiles(profile([0.6, 0.2, -0.2])).axes

        for ax in (sign, cosine):
            np.testing.assert_allclose(marks(ax), [0.2])
            assert legend(ax) == ["step 400, ξ = 0.20"]

    def test_outside(self):
        """A crossing beyond them is not marked."""
        ax = profiles(profile([0.6, 0.5, 0.4])).axes[0]

        assert marks(ax) == []
        assert legend(ax) == ["step 400, ξ outside"]

    def test_no_fall(self):
        """A profile that does not fall has no critical length."""
        ax = profiles(profile([0.2, 0.3, 0.4])).axes[0]

        assert marks(ax) == []
        assert legend(ax) == ["step 400, no ξ"]

    def test_few_pairs(self):
        """Bins with few pairs are not drawn."""
        thin = profile([0.6, 0.2, -0.2])
        thin["pairs"].values[..., 2] = 3
        curve = next(line for line in profiles(thin).axes[0].lines if len(line.get_xdata()) == 3)

        np.testing.assert_array_equal(np.isnan(curve.get_ydata()), [False, False, True])

    def test_bands(self):
        """Bins have bands of one standard error; a bin that hangs on one example is not drawn."""
        known = profile([0.6, 0.2, -0.2])
        known["sign_error"] = known["sign"] * 0 + 0.1
        known["sign_error"].values[..., 2] = np.nan
        ax = profiles(known).axes[0]
        curve = next(line for line in ax.lines if len(line.get_xdata()) == 3)

        ends = ax.collections[0].get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([ends.min(), ends.max()], [0.1, 0.7])
        np.testing.assert_array_equal(np.isnan(curve.get_ydata()), [False, False, True])

    @pytest.mark.parametrize(("error", "text"), [(0.03, "0.20 ± 0.03"), (0.002, "0.200 ± 0.002")])
    def test_error_of_the_length(self, error: float, text: str):
        """A length of the store comes with its error, in the legend and as a bar at the mark."""
        known = profile([0.6, 0.2, -0.2])
        length = critical_length(known)
        length["sign_length_error"] = length["sign_length"] * 0 + error
        ax = profiles(known, length=length).axes[0]

        assert legend(ax) == [f"step 400, ξ = {text}"]
        bars = [line for line in ax.lines if list(line.get_ydata()) == [0, 0]]
        ends = [list(line.get_xdata()) for line in bars]
        assert any(np.allclose(end, [0.2 - error, 0.2 + error]) for end in ends)

    def test_rows(self):
        """A row for each learning rate, sign left and cosine right; a store can be given."""
        ds = Synthetic(n_examples=40, learning_rates=(1e-3, 1e-2)).build()
        figure = profiles(ds, relation="between")

        assert [ax.get_title(loc="left") for ax in figure.axes] == [
            "Sign stiffness, learning rate 0.001",
            "Cosine stiffness, learning rate 0.001",
            "Sign stiffness, learning rate 0.01",
            "Cosine stiffness, learning rate 0.01",
        ]
        assert "different classes" in figure.get_suptitle()

    def test_nothing_yet(self):
        """A stage without pairs is said to have none."""
        ds = Synthetic(n_examples=30).build()
        ds["cosine"].values[:, :, 1] = np.nan

        assert legend(profiles(distance_profile(ds).compute()).axes[0])[1].endswith("no pairs yet")

    def test_unknown_relation(self):
        """A relation that does not exist is refused."""
        with pytest.raises(DataError, match="within, between, all"):
            profiles(profile([0.1, 0.2]), relation="near")
