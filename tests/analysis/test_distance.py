"""Distance profiles against plain loops, and the critical length against numpy's own fit."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import loops
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness.analysis import critical_length, distance_profile, distance_row_sums
from distributed_stiffness.errors import DataError

EXACT = {"rtol": 1e-12, "atol": 1e-14}

studies = st.builds(
    Synthetic,
    n_examples=st.integers(6, 16),
    n_classes=st.integers(2, 4),
    iterations=st.just((0,)),
    zero_gradients=st.lists(st.integers(0, 5), max_size=2),
    random_seed=st.integers(0, 2**16),
)


def assert_matches_loops(profile: xr.Dataset, ds: xr.Dataset, edges: np.ndarray) -> None:
    at = {"learning_rate": 0, "seed": 0, "iteration": 0}
    expected = loops.distance_profile(ds.isel(at), edges)
    for relation, same in (("within", True), ("between", False)):
        for k in range(len(edges) - 1):
            got = profile.isel({**at, "distance_bin": k}).sel(relation=relation)
            mean = expected.get((same, k), loops.Mean())
            np.testing.assert_allclose(got["cosine"], mean.cosine, **EXACT)
            np.testing.assert_allclose(got["sign"], mean.sign, **EXACT)
            assert int(got["pairs"]) == len(mean.signs)
            assert int(got["cosine_pairs"]) == len(mean.cosines)


class TestDistanceProfile:
    @settings(max_examples=8)
    @given(
        study=studies,
        edges=st.sampled_from(
            [np.linspace(0, 2, 9), np.linspace(0.5, 1.25, 4), [0, 0.7, 0.8, 1.4]]
        ),
    )
    def test_definition(self, study: Synthetic, edges: np.ndarray):
        """Each bin is the mean over its pairs, of one class and of two; equal bins or not."""
        ds = study.build()

        assert_matches_loops(distance_profile(ds, edges=edges).compute(), ds, np.asarray(edges))

    @settings(max_examples=8)
    @given(study=studies, bins=st.integers(1, 7))
    def test_default_edges(self, study: Synthetic, bins: int):
        """By default every pair but the self-pairs lies in a bin."""
        ds = study.build()
        profile = distance_profile(ds, bins).compute().sel(relation="all")

        n = study.n_examples
        assert int(profile["pairs"].sum()) == n * (n - 1)
        distances = ds["distance"].values[~np.eye(n, dtype=bool)]
        assert float(profile["lower_edge"][0]) == distances.min()
        assert float(profile["upper_edge"][-1]) == distances.max()

    @settings(max_examples=8)
    @given(study=studies, rows=st.integers(1, 17), columns=st.integers(1, 17))
    def test_chunks(self, study: Synthetic, rows: int, columns: int):
        """Chunk sizes do not matter, those of the distances neither."""
        ds = study.build()
        chunked = ds.chunk({"example": rows, "other": columns})
        chunked["distance"] = ds["distance"].chunk({"example": columns, "other": rows})

        xr.testing.assert_allclose(
            distance_profile(chunked).compute(), distance_profile(ds).compute(), rtol=1e-12
        )

    def test_many_rows(self):
        """Blocks that are worked on in several parts give what numpy's histogram gives."""
        ds = Synthetic(n_examples=300, n_classes=3, iterations=(0,)).build()
        edges = np.linspace(0, 2, 9)
        profile = (
            distance_profile(ds, edges=edges).compute().isel(learning_rate=0, seed=0, iteration=0)
        )

        off_diagonal = ~np.eye(300, dtype=bool)
        distances = ds["distance"].values[off_diagonal]
        cosines = ds["cosine"].values[0, 0, 0][off_diagonal].astype(float)
        pairs = np.histogram(distances, edges)[0]
        np.testing.assert_array_equal(profile["pairs"].sel(relation="all"), pairs)
        sums = np.histogram(distances, edges, weights=cosines)[0]
        np.testing.assert_allclose(
            (profile["cosine"].fillna(0) * profile["pairs"]).sel(relation="all"), sums, atol=1e-9
        )

    def test_all_pairs(self, made: xr.Dataset):
        """`all` is within and between together."""
        profile = distance_profile(made).compute()
        parts = profile.sel(relation=["within", "between"])

        xr.testing.assert_equal(
            profile["pairs"].sel(relation="all", drop=True), parts["pairs"].sum("relation")
        )
        np.testing.assert_allclose(
            (profile["sign"].fillna(0) * profile["pairs"]).sel(relation="all"),
            (parts["sign"].fillna(0) * parts["pairs"]).sum("relation"),
            atol=1e-12,
        )

    def test_missing(self):
        """Pairs without a cosine or without a distance are in no bin."""
        ds = Synthetic(n_examples=10).build()
        ds["cosine"].values[..., 0, :] = np.nan
        ds["distance"].values[1, :] = np.nan
        edges = np.linspace(0, 2, 5)

        profile = distance_profile(ds, edges=edges).compute()

        assert_matches_loops(profile, ds, edges)

    def test_no_distance_yet(self):
        """Before any distance is there, bins are empty over the whole range."""
        ds = Synthetic(n_examples=10).build()
        ds["distance"].values[:] = np.nan

        profile = distance_profile(ds, 4).compute()

        assert (profile["pairs"] == 0).all()
        np.testing.assert_array_equal(profile["upper_edge"], [0.5, 1, 1.5, 2])

    @pytest.mark.parametrize("edges", [[1.0], [0, 1, 1], [1, 0], [[0, 1], [1, 2]]])
    def test_edges_ascend(self, made: xr.Dataset, edges: list):
        """Edges that do not ascend are refused."""
        with pytest.raises(DataError, match="expected two or more numbers, ascending"):
            distance_profile(made, edges=edges)

    def test_no_bins(self, made: xr.Dataset):
        """At least one bin must be asked for."""
        with pytest.raises(DataError, match="bins is 0"):
            distance_profile(made, 0)

    def test_no_distances(self, made: xr.Dataset):
        """A store without distances is refused, in words."""
        with pytest.raises(DataError, match="no variable distance"):
            distance_profile(made.drop_vars("distance"))


class TestDistanceRowSums:
    def test_sum_to_the_profile(self, made: xr.Dataset):
        """Row sums add up to the profile's bins."""
        sums = distance_row_sums(made, 6).sum("example").compute()
        profile = distance_profile(made, 6).compute().sel(relation=["within", "between"])

        np.testing.assert_array_equal(sums["pairs"], profile["pairs"])
        np.testing.assert_allclose(
            sums["cosine_sum"], (profile["cosine"] * profile["cosine_pairs"]).fillna(0), atol=1e-12
        )


def profile_of(means: list[float], pairs: list[int], centres: list[float]) -> xr.Dataset:
    """A profile of one checkpoint with these bins within a class."""
    width = 0.1
    dims = ("relation", "distance_bin")
    return xr.Dataset(
        {
            "sign": (dims, [means]),
            "cosine": (dims, [[m / 2 for m in means]]),
            "pairs": (dims, [pairs]),
            "cosine_pairs": (dims, [pairs]),
        },
        coords={
            "relation": ["within"],
            "distance_bin": centres,
            "lower_edge": ("distance_bin", [c - width / 2 for c in centres]),
            "upper_edge": ("distance_bin", [c + width / 2 for c in centres]),
        },
    )


class TestCriticalLength:
    @given(
        means=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
        pairs=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
    )
    def test_fit(self, means: list[float], pairs: list[int]):
        """Slope and intercept are those of numpy's weighted least squares."""
        centres = [0.2, 0.4, 0.5, 0.9]
        slope, intercept = np.polyfit(centres, means, 1, w=np.sqrt(pairs))

        length = critical_length(profile_of(means, pairs, centres))

        np.testing.assert_allclose(length["sign_slope"], slope, atol=1e-9)
        np.testing.assert_allclose(length["sign_intercept"], intercept, atol=1e-9)

    def test_crossing(self):
        """The length is where the line crosses zero, the same for a scaled profile."""
        length = critical_length(profile_of([0.6, 0.2, -0.2], [5, 9, 1], [0.2, 0.4, 0.6]))

        np.testing.assert_allclose(length["sign_length"], 0.5)
        np.testing.assert_allclose(length["cosine_length"], 0.5)
        assert bool(length["sign_inside"])

    def test_extrapolated(self):
        """A crossing beyond the distances that occur is said to be outside."""
        length = critical_length(profile_of([0.6, 0.5, 0.4], [5, 5, 5], [0.2, 0.4, 0.6]))

        np.testing.assert_allclose(length["sign_length"], 1.4)
        assert not bool(length["sign_inside"])

    def test_rising(self):
        """A line that does not fall has no critical length."""
        length = critical_length(profile_of([0.1, 0.2, 0.3], [5, 5, 5], [0.2, 0.4, 0.6]))

        assert np.isnan(length["sign_length"])
        assert not bool(length["sign_inside"])
        assert "slope is not negative" in length["sign_length"].attrs["description"]

    def test_empty_bins(self):
        """Empty bins weigh nothing, and one bin alone gives no line."""
        nan = float("nan")
        length = critical_length(profile_of([0.6, nan, -0.2], [5, 0, 1], [0.2, 0.4, 0.6]))
        alone = critical_length(profile_of([0.6, nan, nan], [5, 0, 0], [0.2, 0.4, 0.6]))

        np.testing.assert_allclose(length["sign_length"], 0.5)
        assert np.isnan(alone["sign_slope"])

    def test_over_checkpoints(self, made: xr.Dataset):
        """A study gives one length for each checkpoint."""
        length = critical_length(distance_profile(made)).compute()

        assert length["sign_length"].dims == ("learning_rate", "seed", "iteration")
