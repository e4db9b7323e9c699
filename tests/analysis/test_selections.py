"""Rows and columns may be left out, sorted and drawn again, each for itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from analysis import deletion, loops
from analysis.synthetic import Synthetic

from distributed_stiffness import analysis
from distributed_stiffness.errors import DataError

EDGES = np.linspace(0.0, 2.0, 5)
Select = Callable[[xr.Dataset], xr.Dataset]
SELECTIONS: dict[str, Select] = {
    "rows drawn again": lambda ds: ds.isel(example=[0, 0, 1, 2, 3, 9, 9, 9]),
    "columns drawn again": lambda ds: ds.isel(other=[5, 5, 1, 0, 5, 7, 8]),
    "both drawn again": lambda ds: ds.isel(example=[0, 0, 1, 2, 5, 6], other=[0, 0, 1, 2, 5, 6]),
    "each drawn again": lambda ds: ds.isel(example=[0, 0, 1, 2, 5], other=[0, 1, 1, 2, 5, 9]),
    "as many of the same, others often": lambda ds: ds.isel(
        example=[0, 0, 1, 2, 3], other=[0, 1, 1, 2, 3]
    ),
    "some rows": lambda ds: ds.isel(example=(ds["label"] < 2).values),
    "rows and other columns": lambda ds: ds.isel(example=slice(0, 9), other=slice(9, None)),
    "rows and some of them as columns": lambda ds: ds.isel(example=slice(9), other=slice(6, 15)),
    "sorted rows": lambda ds: ds.sortby("class_name"),
    "columns from behind": lambda ds: ds.isel(other=slice(None, None, -1)),
    "chosen by name": lambda ds: ds.sel(example=[3, 3, 0, 7]),
    "masked": lambda ds: ds.where(ds["class_name"] == ds["other_class_name"]),
}


def study() -> xr.Dataset:
    """One checkpoint, with one zero gradient."""
    ds = Synthetic(n_examples=20, n_superclasses=2, zero_gradients=(5,), iterations=(7,)).build()
    return ds.isel(learning_rate=0, seed=0, iteration=0)


def with_positions(ds: xr.Dataset) -> xr.Dataset:
    """The same with positions in the split, as stores have them, and names of the user's own."""
    index = ds["example"].values
    ds = ds.assign_coords(index=("example", index), other_index=("other", index))
    return ds.assign_coords(example=[f"{k:03}.png" for k in index])


@pytest.fixture(params=SELECTIONS)
def selected(request: pytest.FixtureRequest) -> xr.Dataset:
    return SELECTIONS[request.param](study())


def plain(selected: xr.Dataset) -> xr.Dataset:
    """The same, with one norm for each row, for the loops."""
    norms = selected["gradient_norm"]
    return selected.assign(gradient_norm=norms.max("other") if "other" in norms.dims else norms)


def assert_means(found: xr.Dataset, right: dict[object, loops.Mean], at: Callable[..., xr.Dataset]):
    """Means, and pairs of each, are those of loops; no pair is counted anywhere else."""
    assert int(found["pairs"].sum()) == sum(len(mean.signs) for mean in right.values())
    for name, mean in right.items():
        one = at(found, name)
        assert int(one["pairs"]) == len(mean.signs)
        assert int(one["cosine_pairs"]) == len(mean.cosines)
        np.testing.assert_allclose(float(one["cosine"]), mean.cosine, atol=1e-6)
        np.testing.assert_allclose(float(one["sign"]), mean.sign, atol=1e-12)


class TestSelections:
    @pytest.mark.parametrize("by", ["class_name", "superclass_name"])
    def test_class_matrix(self, selected: xr.Dataset, by: str):
        """Pairs and means of every two classes; self-pairs are those of one example."""
        found = analysis.class_matrix(selected, by=by).compute()

        assert_means(
            found,
            loops.class_matrix(plain(selected), by),
            lambda ds, name: ds.sel({by: name[0], f"other_{by}": name[1]}),
        )
        assert int(found["missing"].min()) >= 0
        masked = int(np.isnan(selected["cosine"]).sum())
        assert (int(found["missing"].sum()) == 0) == (masked == 0)

    def test_distance_profile(self, selected: xr.Dataset):
        """Pairs and means of every distance bin."""
        profile = analysis.distance_profile(selected, edges=EDGES).compute()
        relations = profile.sel(relation=["within", "between"])

        assert_means(
            relations,
            loops.distance_profile(plain(selected), EDGES),
            lambda ds, name: ds.sel(relation="within" if name[0] else "between").isel(
                distance_bin=name[1]
            ),
        )

    def test_sums_of_rows(self, selected: xr.Dataset):
        """Each row, drawn again or not, has its own sums."""
        found = analysis.row_sums(selected).compute()
        pairs = list(loops.pairs(plain(selected)))

        for i in range(selected.sizes["example"]):
            of_row = [cosine for row, _, cosine, _ in pairs if row == i]
            assert float(found["pairs"].isel(example=i).sum()) == len(of_row)

    def test_errors(self, selected: xr.Dataset):
        """By deletion of each example, with all of its rows and columns."""
        rows, columns = (np.sort(selected[name].values) for name in ("example", "other"))
        if np.array_equal(rows, columns) and len(set(rows)) < len(rows):
            pytest.skip("drawn alike, so that every row that was drawn is left out for itself")
        if bool(np.isnan(selected["cosine"]).any()):
            pytest.skip("cells that nothing is left of")
        found = analysis.class_matrix(selected).compute()
        pairs = deletion.pairs(selected)
        is_row, is_column = (
            {(split, number) for split, number in zip(ds_split, numbers, strict=True)}
            for ds_split, numbers in (
                (selected["split"].values, selected["example"].values.tolist()),
                (selected["other_split"].values, selected["other"].values.tolist()),
            )
        )
        of = {("row", p.row): p.classes[0] for p in pairs}
        of |= {("column", p.column): p.classes[1] for p in pairs}
        strata: dict[object, list[object]] = {}
        for name in sorted(is_row | is_column):
            key = of.get(("row", name), of.get(("column", name)))
            strata.setdefault((name in is_row, name in is_column, key), []).append(name)

        def cells(some: list[deletion.Pair]) -> deletion.Values:
            return deletion.means(some, "sign", lambda p: p.classes)

        right = deletion.errors(cells, pairs, list(strata.values()))
        for (a, b), error in right.items():
            got = float(found["sign_error"].sel(class_name=a, other_class_name=b))
            # A sample of one example says nothing of others: the package then gives no error.
            if not math.isnan(got):
                np.testing.assert_allclose(got, error, atol=1e-6)

    @pytest.mark.parametrize("name", ["rows drawn again", "each drawn again", "sorted rows"])
    def test_an_example_is_told_by_its_position(self, name: str):
        """Stores know positions: names that the user gave to rows alone make no difference."""
        ds, select = study(), SELECTIONS[name]
        right = analysis.class_matrix(select(ds)).compute()
        if name == "chosen by name":
            return

        got = analysis.class_matrix(select(with_positions(ds))).compute()
        xr.testing.assert_identical(got, right)

    def test_the_bootstrap_of_a_public_report(self):
        """Rows 0, 0, 1, 2 and 3 of three classes in turn: 21 pairs of class 0, not 14."""
        ds = Synthetic(n_examples=24, n_classes=3, iterations=(0,)).build()
        names = np.asarray(["0", "1", "2"])[np.arange(24) % 3]
        ds = ds.assign_coords(class_name=("example", names), other_class_name=("other", names))
        drawn = ds.isel(example=[0, 0, 1, 2, 3])
        cell = analysis.class_matrix(drawn).sel(class_name="0", other_class_name="0").squeeze()

        of_class = (drawn["class_name"] == "0") & (drawn["other_class_name"] == "0")
        pairs = drawn["cosine"].where(of_class & (drawn["example"] != drawn["other"]))
        assert int(cell["pairs"]) == int(pairs.count()) == 21
        np.testing.assert_allclose(float(cell["cosine"]), float(pairs.mean()), atol=1e-6)


class TestRefused:
    def test_measures_of_a_kernel_want_every_example_once(self):
        """Their product with themselves has no one place."""
        ds = study().isel(example=[0, 0, 1, 2], other=[0, 0, 1, 2])
        for reduction in (
            analysis.neighbours,
            analysis.spectrum,
            analysis.gradient_confusion,
            analysis.kernel_alignment,
        ):
            with pytest.raises(DataError, match="an example is there several times"):
                reduction(ds)
        assert analysis.summary(ds).neighbours is None

    def test_other_rows_than_columns(self):
        """They are no one set."""
        with pytest.raises(DataError, match="the rows are other examples than the columns"):
            analysis.neighbours(study().isel(example=slice(9)))

    def test_examples_that_nothing_tells(self):
        """Without the coordinates that name rows and columns a self-pair cannot be told."""
        ds = study().drop_vars("other")
        for wrong in (ds, study().isel(example=slice(9)).drop_vars(["example", "other"])):
            with pytest.raises(DataError, match="cannot be told: 'example' and 'other' do not"):
                analysis.class_matrix(wrong)
        whole = study().drop_vars(["example", "other"])
        right = analysis.class_matrix(study()).compute()
        xr.testing.assert_identical(analysis.class_matrix(whole).compute(), right)

    def test_parts_of_a_store_of_sums(self):
        """Its sums are over all pairs: those of some examples cannot be had."""
        sums = analysis.reduced(study(), edges=EDGES)
        for wrong in (
            sums.isel(example=slice(9)),
            sums.isel(other=[0, 1]),
            sums.isel(example=slice(9), other=slice(9)),
            sums.isel(example=[*range(19), 0], other=[*range(19), 0]),
        ):
            for reduction in (
                analysis.class_matrix,
                analysis.distance_profile,
                analysis.critical_length,
                analysis.teaching,
            ):
                with pytest.raises(DataError, match="no examples can be left out or drawn again"):
                    reduction(wrong).compute()

    def test_sums_of_other_rows_than_columns(self):
        """They would be sums over pairs with some examples."""
        for wrong in (SELECTIONS["some rows"], SELECTIONS["columns from behind"]):
            with pytest.raises(DataError, match="the same examples as rows and as columns"):
                analysis.reduced(wrong(study()))
        with pytest.raises(DataError, match="sums in place of its pairs already"):
            analysis.reduced(analysis.reduced(study()))

    def test_sums_may_be_sorted(self):
        """Rows and columns each in an order of their own."""
        ds = Synthetic(n_examples=24, n_train=10).build()
        sums = analysis.reduced(ds, edges=EDGES)
        splits = ("train", "validation")
        right = analysis.within_between(ds, splits=splits).compute()
        for order in ({"other": slice(None, None, -1)}, {"example": slice(None, None, -1)}):
            got = analysis.within_between(sums.isel(order), splits=splits).compute()
            xr.testing.assert_allclose(got, right, atol=1e-9)


class TestWhatIsInternal:
    def test_errors_name_the_user_s_coordinates_alone(self):
        """And no number that reductions give to examples."""
        with pytest.raises(DataError) as error:
            analysis.class_matrix(study(), by="colour")

        assert "identity" not in str(error.value)
        assert "'class_name'" in str(error.value)

    def test_results_have_no_others(self):
        """Nor have they variables that are not described."""
        for reduction in (
            analysis.row_sums,
            analysis.teaching,
            analysis.class_matrix,
            analysis.neighbours,
            lambda ds: analysis.distance_row_sums(ds, edges=EDGES),
        ):
            assert not [name for name in reduction(study()).variables if "identity" in str(name)]

    def test_a_user_may_have_coordinates_of_any_name(self):
        """Such as those that once were internal."""
        ds = study()
        mine = {"row_identity": ("example", ds["label"].values)}
        mine |= {"other_row_identity": ("other", ds["other_label"].values)}
        found = analysis.class_matrix(ds.assign_coords(mine), by="row_identity").compute()

        right = analysis.class_matrix(ds, by="label").compute()
        np.testing.assert_array_equal(found["pairs"].values, right["pairs"].values)

    def test_a_share_of_undecided_pairs_is_of_all(self):
        """Of some examples it is not known: a store counts them over all."""
        ds = study().assign_attrs(plan='{"n_examples": 20}')

        assert float(analysis.checkpoint_curves(ds)["undecided_share"]) == 0
        part = ds.isel(example=slice(9), other=slice(9))
        assert math.isnan(float(analysis.checkpoint_curves(part)["undecided_share"]))
