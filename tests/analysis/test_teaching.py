"""Single examples: their means over pairs, and those at both ends."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import loops
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness.analysis import reduced, teaching, teaching_extremes
from distributed_stiffness.errors import DataError

SPLITS = [("validation", "validation"), ("train", "validation")]


def only(ds: xr.Dataset) -> xr.Dataset:
    return ds.isel(learning_rate=0, seed=0, iteration=0)


class TestTeaching:
    @settings(max_examples=6)
    @given(
        splits=st.sampled_from(SPLITS),
        random_seed=st.integers(0, 99),
        zero=st.lists(st.integers(0, 15), max_size=2),
    )
    def test_definition(self, splits: tuple[str, str], random_seed: int, zero: list[int]):
        """Each mean is over the example's pairs with its class, the rest, and all."""
        ds = Synthetic(
            n_examples=16,
            n_train=6,
            iterations=(0,),
            zero_gradients=zero,
            random_seed=random_seed,
        ).build()
        got = only(teaching(ds, splits=splits).compute())
        one = only(ds)
        rows, columns = one["class_name"].values, one["other_class_name"].values
        blocks = one["split"].values, one["other_split"].values

        def mean(position: int, relation: str) -> loops.Mean:
            def key(i: int, j: int) -> bool | None:
                same = rows[i] == columns[j]
                chosen = relation == "all" or same == (relation == "within")
                inside = i == position and (blocks[0][i], blocks[1][j]) == splits
                return True if inside and chosen else None

            return loops.means(one, key).get(True, loops.Mean())

        for place, number in enumerate(got["example"].values.tolist()):
            for relation in ("within", "between", "all"):
                expected = mean(number, relation)
                at = got.isel(example=place).sel(relation=relation)
                np.testing.assert_allclose(at["cosine"], expected.cosine, atol=1e-9)
                np.testing.assert_allclose(at["sign"], expected.sign, atol=1e-9)
                assert int(at["cosine_pairs"]) == len(expected.cosines)
                assert int(at["pairs"]) == len(expected.signs)

    @pytest.mark.parametrize("splits", SPLITS, ids=str)
    def test_sums_in_place_of_pairs(self, made: xr.Dataset, splits: tuple[str, str]):
        """Sums over each example's pairs are all that it needs."""
        expected = teaching(made, splits=splits).compute()
        xr.testing.assert_allclose(
            teaching(reduced(made), splits=splits).compute(), expected, rtol=1e-9
        )

    def test_labels(self, made: xr.Dataset):
        """Examples keep their labels."""
        got = teaching(made)
        assert set(got["split"].values) == {"validation"}
        assert got["class_name"].dims == ("example",)


class TestExtremes:
    @pytest.mark.parametrize("measure", ["cosine", "sign"])
    @pytest.mark.parametrize("relation", ["within", "between", "all"])
    def test_ends(self, made: xr.Dataset, measure: str, relation: str):
        """The first is the highest, or the lowest, and nobody outside goes beyond the last."""
        means = teaching(made).compute()
        got = teaching_extremes(means, 5, measure=measure, relation=relation)

        for at in np.ndindex(2, 1, 2):
            here = dict(zip(("learning_rate", "seed", "iteration"), at, strict=True))
            values = means[measure].sel(relation=relation).isel(here).values
            known = np.sort(values[np.isfinite(values)])
            of = got.isel(here)
            np.testing.assert_array_equal(of["value"].sel(end="most"), known[::-1][:5])
            np.testing.assert_array_equal(of["value"].sel(end="least"), known[:5])
            np.testing.assert_array_equal(values[of["position"].values], of["value"].values)

    def test_by_class(self, made: xr.Dataset):
        """Each class has its own; a class with too few examples leaves places empty."""
        means = teaching(made).compute()
        got = teaching_extremes(made, 8, by_class=True).compute()
        names = means["class_name"].values

        for name in got["class_name"].values:
            at = only(got).sel(class_name=name, end="least")
            positions = at["position"].values
            n = int(
                (np.isfinite(only(means)["cosine"].sel(relation="all")) & (names == name)).sum()
            )
            assert (positions >= 0).sum() == min(n, 8)
            assert set(names[positions[positions >= 0]]) == {name}
            assert all(math.isnan(v) for v in at["value"].values[positions < 0])

    def test_lazy(self, store):
        """A store is not read before the result is computed."""
        assert teaching_extremes(xr.open_zarr(store))["value"].chunks is not None

    def test_refused(self, made: xr.Dataset):
        """What does not exist is refused with what does."""
        with pytest.raises(DataError, match="n is 0: expected 1 or more"):
            teaching_extremes(made, 0)
        with pytest.raises(DataError, match="measure is 'dot': expected one of cosine, sign"):
            teaching_extremes(made, measure="dot")
        with pytest.raises(DataError, match="expected one of within, between, all"):
            teaching_extremes(made, relation="near")
