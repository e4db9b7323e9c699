"""A store of sums answers as the store of pairs that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import saved

from distributed_stiffness import analysis
from distributed_stiffness.analysis.reduced import reduced
from distributed_stiffness.errors import DataError

SPLITS = [None, ("train", "train"), ("train", "validation"), ("validation", "train")]
EDGES = np.linspace(0, 2, 9)
Reduction = Callable[..., xr.Dataset]


@pytest.fixture(scope="module")
def pairs(store: Path) -> xr.Dataset:
    return xr.open_zarr(str(store))


@pytest.fixture(scope="module")
def sums(pairs: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """The same study, reduced, written and opened again."""
    path = tmp_path_factory.mktemp("reduced") / "sums.zarr"
    saved(reduced(pairs, edges=EDGES).drop_encoding(), path)
    return xr.open_zarr(str(path), consolidated=False)


REDUCTIONS: dict[str, Reduction] = {
    "class matrix": lambda ds, splits: analysis.class_matrix(ds, splits=splits),
    "super-class matrix": lambda ds, splits: analysis.superclass_matrix(ds, splits=splits),
    "by super-class": lambda ds, splits: analysis.class_matrix(
        ds, by="superclass_name", splits=splits
    ),
    "contrast": lambda ds, splits: analysis.superclass_contrast(ds, splits=splits),
    "within and between": lambda ds, splits: analysis.within_between(ds, splits=splits),
    "row sums": lambda ds, splits: analysis.row_sums(ds, splits=splits),
    "distance profile": lambda ds, splits: analysis.distance_profile(
        ds, edges=EDGES, splits=splits
    ),
    "critical length": lambda ds, splits: analysis.critical_length(ds, edges=EDGES, splits=splits),
}


class TestReductions:
    @pytest.mark.parametrize("splits", SPLITS, ids=str)
    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_every_number_is_that_of_the_pairs(
        self, pairs: xr.Dataset, sums: xr.Dataset, name: str, splits: analysis.pairs.Splits | None
    ) -> None:
        """
        Means, errors and counts agree to the rounding of a sum, with the same labels.
        """
        expected = REDUCTIONS[name](pairs, splits).compute()

        found = REDUCTIONS[name](sums, splits).compute()

        xr.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert found.attrs == expected.attrs
        assert set(found.coords) == set(expected.coords)

    def test_the_summary_needs_no_pair(self, pairs: xr.Dataset, sums: xr.Dataset) -> None:
        """
        Everything that report and figures draw comes out of a store of sums.
        """
        expected, found = analysis.summary(pairs), analysis.summary(sums)

        xr.testing.assert_allclose(found.class_matrix, expected.class_matrix)
        assert found.distance_profile is not None
        assert found.distance_profile.sizes["distance_bin"] == 8

    def test_parts_that_are_not_there_yet_are_missing_pairs(self, sums: xr.Dataset) -> None:
        """
        Sums in several parts are added up; a part that is NaN counts as pairs not computed.
        """
        whole = analysis.class_matrix(sums).compute()
        nothing = sums["class_sums"] * np.nan
        parts = xr.concat([sums["class_sums"], nothing], dim="other_part")
        halves = xr.concat([sums["class_sums"] / 2] * 2, dim="other_part")

        xr.testing.assert_allclose(
            analysis.class_matrix(sums.assign(class_sums=parts)).compute(), whole
        )
        xr.testing.assert_allclose(
            analysis.class_matrix(sums.assign(class_sums=halves)).compute(), whole
        )
        empty = analysis.class_matrix(sums.assign(class_sums=nothing)).compute()
        assert (empty["pairs"] == 0).all()
        assert (empty["missing"] == whole["pairs"]).all()


class TestErrors:
    def test_other_bins_than_those_kept_are_refused(self, sums: xr.Dataset) -> None:
        """
        Pairs cannot be put into other bins once they are added up.
        """
        with pytest.raises(DataError, match="keeps sums in 8 bins from 0 to 2"):
            analysis.distance_profile(sums, edges=[0, 1, 2])

    def test_groups_that_cut_classes_are_refused(self, sums: xr.Dataset) -> None:
        """
        Only what is made of whole classes can be told.
        """
        half = np.arange(sums.sizes["example"]) % 2
        cut = sums.assign_coords(half=("example", half), other_half=("other", half))

        with pytest.raises(DataError, match=r"by 'half'.*keeps sums by class"):
            analysis.class_matrix(cut, by="half")
