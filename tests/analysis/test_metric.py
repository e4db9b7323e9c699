"""Profiles over other distances: of a layer, anybody's own, of numbers of the examples."""

from __future__ import annotations

import dataclasses
import importlib
import math

import dask.array as da
import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import deletion, loops
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness.analysis import (
    critical_length,
    distance_edges,
    distance_profile,
    distances_of,
    reduced,
    summary,
)
from distributed_stiffness.errors import DataError

EXACT = {"rtol": 1e-12, "atol": 1e-14}
EDGES = np.linspace(0, 3, 6)
PAIR = ("example", "other")

studies = st.builds(
    Synthetic,
    n_examples=st.integers(8, 14),
    n_classes=st.integers(2, 3),
    zero_gradients=st.lists(st.integers(0, 5), max_size=2),
    random_seed=st.integers(0, 2**16),
)


def random_distances(n: int, *lead: int) -> np.ndarray:
    """Symmetric, 0 on the diagonal, different at each checkpoint."""
    X = np.random.default_rng(n).standard_normal((*lead, n, 2))
    return np.linalg.norm(X[..., :, None, :] - X[..., None, :, :], axis=-1)


def assert_matches_loops(profile: xr.Dataset, ds: xr.Dataset, distance: np.ndarray) -> None:
    """Every checkpoint is what loops make of its distances (…, i, j)."""
    for at in np.ndindex(ds["cosine"].shape[:-2]):
        place = dict(zip(ds["cosine"].dims, at, strict=False))
        one = ds.isel(place).assign(distance=(PAIR, np.broadcast_to(distance, ds.cosine.shape)[at]))
        expected = loops.distance_profile(one, EDGES)
        for relation, same in (("within", True), ("between", False)):
            for k in range(len(EDGES) - 1):
                got = profile.isel({**place, "distance_bin": k}).sel(relation=relation)
                mean = expected.get((same, k), loops.Mean())
                np.testing.assert_allclose(got["cosine"], mean.cosine, **EXACT)
                np.testing.assert_allclose(got["sign"], mean.sign, **EXACT)
                assert int(got["pairs"]) == len(mean.signs)


class TestPairs:
    @settings(max_examples=6)
    @given(study=studies, lead=st.sampled_from([(), (2,), (1, 1, 2)]))
    def test_definition(self, study: Synthetic, lead: tuple[int, ...]):
        """A distance of pairs may be the same for all checkpoints, or differ along any of them."""
        ds = study.build()
        values = random_distances(study.n_examples, *lead)
        dims = (*("learning_rate", "seed", "iteration")[3 - len(lead) :], *PAIR)
        own = xr.DataArray(values, dims=dims)

        assert_matches_loops(distance_profile(ds, edges=EDGES, distance=own).compute(), ds, values)

    def test_name(self, made: xr.Dataset):
        """A variable of the store is named, and gives what it gives as an array."""
        ds = made.assign(mine=(PAIR, random_distances(40), {"long_name": "my distance"}))

        named = distance_profile(ds, distance="mine").compute()
        xr.testing.assert_identical(named, distance_profile(ds, distance=ds["mine"]).compute())
        assert named["distance_bin"].attrs["long_name"] == "my distance"
        assert distances_of(ds) == ["distance", "mine"]

    @settings(max_examples=5)
    @given(rows=st.integers(1, 17), columns=st.integers(1, 17), steps=st.integers(1, 2))
    def test_chunks(self, rows: int, columns: int, steps: int):
        """Chunks do not matter, of distances neither, nor that they are in memory."""
        ds = Synthetic(n_examples=16, n_train=6).build()
        own = xr.DataArray(random_distances(16, 2), dims=("iteration", *PAIR))
        chunked = ds.chunk({"example": rows, "other": columns, "iteration": steps})

        for distance in (own, own.chunk({"example": columns, "iteration": 2})):
            for splits in (("train", "validation"), ("validation", "validation")):
                xr.testing.assert_allclose(
                    distance_profile(chunked, 4, distance=distance, splits=splits).compute(),
                    distance_profile(ds, 4, distance=own, splits=splits).compute(),
                    rtol=1e-8,
                )

    def test_is_lazy(self, made: xr.Dataset):
        """With edges given, no distance is read before the result is computed."""
        never = da.map_blocks(_fails, chunks=((40,), (40,)), dtype=float, meta=np.empty((0, 0)))
        profile = distance_profile(made, edges=EDGES, distance=xr.DataArray(never, dims=PAIR))

        with pytest.raises(RuntimeError, match="was read"):
            profile.compute()

    def test_errors(self):
        """The line without each example, over another distance, is what deletion gives."""
        ds = Synthetic(n_examples=14, n_train=5, iterations=(0,), n_superclasses=2).build()
        own = xr.DataArray(random_distances(14), dims=PAIR)
        at = {"learning_rate": 0, "seed": 0, "iteration": 0}
        found, who = deletion.block(ds.assign(distance=own).isel(at), "validation", "validation")
        expected = deletion.errors(
            lambda some: deletion.line(some, "sign", EDGES),
            found,
            deletion.strata(who, by_class=False),
        )

        got = critical_length(ds, edges=EDGES, relation="all", distance=own).isel(at).compute()
        np.testing.assert_allclose(got["sign_slope_error"], expected["slope"], rtol=1e-7)
        assert got.attrs["distance"] == "an array"

    def test_the_default_is_the_distance_of_inputs(self, made: xr.Dataset):
        """The store's own distance, by its name or as an array, is what is taken without one."""
        for distance in ("distance", made["distance"]):
            xr.testing.assert_equal(
                distance_profile(made, distance=distance).compute(),
                distance_profile(made).compute(),
            )


class TestPositions:
    @settings(max_examples=6)
    @given(study=studies)
    def test_number(self, study: Synthetic):
        """Of one number an example, such as its loss, the distance is the difference."""
        ds = study.build()
        ds["loss"] = np.log1p(ds["loss"])
        loss = ds["loss"].values

        assert_matches_loops(
            distance_profile(ds, edges=EDGES, distance="loss").compute(),
            ds,
            np.abs(loss[..., :, None] - loss[..., None, :]),
        )

    @settings(max_examples=6)
    @given(study=studies, features=st.integers(2, 5))
    def test_vector(self, study: Synthetic, features: int):
        """Of a vector an example it is Euclidean, over all dimensions but the checkpoints'."""
        ds = study.build()
        X = np.random.default_rng(1).standard_normal((study.n_examples, features, 2))
        flat = X.reshape(study.n_examples, -1)
        own = xr.DataArray(X, dims=("example", "height", "width"))

        expected = np.array([[math.dist(a, b) for b in flat] for a in flat])
        got = distance_profile(ds, edges=EDGES, distance=own).compute()
        assert_matches_loops(got, ds, expected)

    def test_order_of_columns(self, made: xr.Dataset):
        """Columns in another order than rows have the positions of their examples."""
        order = np.random.default_rng(0).permutation(40)

        xr.testing.assert_allclose(
            distance_profile(made.isel(other=order), 5, distance="label").compute(),
            distance_profile(made, 5, distance="label").compute(),
            rtol=1e-7,
        )

    def test_columns_that_are_no_rows(self, made: xr.Dataset):
        """Positions of rows alone say nothing of other columns."""
        with pytest.raises(DataError, match="columns that are no rows"):
            distance_profile(made.isel(example=slice(16, 30)), distance="loss")


class TestRefused:
    def test_no_such_variable(self, made: xr.Dataset):
        """A name that is not there is refused, with those that are."""
        with pytest.raises(DataError, match=r"distance is 'layer3'.*its distances are distance"):
            distance_profile(made, distance="layer3")

    @pytest.mark.parametrize(
        ("dims", "shape", "message"),
        [
            (PAIR, (40, 39), "39 along other, the store has 40"),
            (("fold", *PAIR), (2, 40, 40), "not fold"),
            (("iteration", *PAIR), (3, 40, 40), "3 along iteration"),
            (("iteration",), (2,), "expected example and other, or example"),
        ],
    )
    def test_shape(self, made: xr.Dataset, dims: tuple, shape: tuple, message: str):
        """What is not of the store's examples and checkpoints is refused."""
        with pytest.raises(DataError, match=message):
            distance_profile(made, distance=xr.DataArray(np.zeros(shape), dims=dims))

    def test_labels(self, made: xr.Dataset):
        """Coordinates must agree with the store's."""
        other = made["distance"].assign_coords(example=made["example"][::-1].values)

        with pytest.raises(DataError, match="differ in 'example'"):
            distance_profile(made, distance=other)

    def test_text(self, made: xr.Dataset):
        """Words have no distance."""
        with pytest.raises(DataError, match="expected numbers"):
            distance_profile(made, distance="class_name")

    def test_sums(self, made: xr.Dataset):
        """Where sums are kept in place of pairs there is one distance."""
        with pytest.raises(DataError, match="keeps sums by the cosine distance"):
            distance_profile(reduced(made), distance="loss")


class TestSummary:
    def test_distance(self, made: xr.Dataset):
        """A summary takes a distance: its profile and its critical length are over it."""
        numbers = summary(made, bins=5, distance="loss")
        edges = distance_edges(made, 5, distance="loss")

        assert numbers.distance_profile is not None
        assert numbers.critical_length is not None
        xr.testing.assert_allclose(
            numbers.distance_profile,
            distance_profile(made, edges=edges, distance="loss").compute(),
        )
        assert numbers.critical_length.attrs["distance"] == "distance by loss"

    def test_in_parts(self, made: xr.Dataset, monkeypatch: pytest.MonkeyPatch):
        """Where sums are too large to be held together, the statistics are the same."""
        whole = summary(made)
        module = importlib.import_module("distributed_stiffness.analysis.summary")
        monkeypatch.setattr(module, "LARGEST_SUMS", 0)
        in_parts = summary(made)

        for field in dataclasses.fields(whole):
            expected = getattr(whole, field.name)
            if isinstance(expected, xr.Dataset):
                xr.testing.assert_identical(getattr(in_parts, field.name), expected)


def _fails() -> np.ndarray:
    raise RuntimeError("was read")
