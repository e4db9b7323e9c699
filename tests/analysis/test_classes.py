"""Class matrices and their summaries, against plain loops and under every change that must not
matter.
"""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import loops
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness.analysis import (
    class_matrix,
    row_sums,
    superclass_contrast,
    superclass_matrix,
    within_between,
)
from distributed_stiffness.errors import DataError

# Stored cosines are float32, sums float64: only the order of adding differs.
EXACT = {"rtol": 1e-12, "atol": 1e-14}

studies = st.builds(
    Synthetic,
    n_examples=st.integers(9, 16),
    n_classes=st.integers(2, 4),
    n_superclasses=st.just(2),
    n_train=st.integers(0, 4),
    iterations=st.just((0,)),
    zero_gradients=st.lists(st.integers(0, 8), max_size=2),
    random_seed=st.integers(0, 2**16),
)

two_checkpoints = st.builds(
    Synthetic,
    n_examples=st.integers(9, 16),
    n_train=st.integers(0, 4),
    random_seed=st.integers(0, 99),
)


def validation(ds: xr.Dataset) -> xr.Dataset:
    return ds.isel(example=ds["split"] == "validation", other=ds["other_split"] == "validation")


def checkpoints(ds: xr.Dataset) -> list[dict[str, int]]:
    """Where each checkpoint is."""
    lead = ("learning_rate", "seed", "iteration")
    shape = tuple(ds.sizes[dim] for dim in lead)
    return [dict(zip(lead, at, strict=True)) for at in np.ndindex(shape)]


def assert_matches_loops(matrix: xr.Dataset, ds: xr.Dataset, by: str = "class_name") -> None:
    for at in checkpoints(ds):
        expected = loops.class_matrix(ds.isel(at), by)
        got = matrix.isel(at)
        for a in got[by].values:
            for b in got[f"other_{by}"].values:
                cell = got.sel({by: a, f"other_{by}": b})
                mean = expected.get((a, b), loops.Mean())
                np.testing.assert_allclose(cell["cosine"], mean.cosine, **EXACT)
                np.testing.assert_allclose(cell["sign"], mean.sign, **EXACT)
                assert int(cell["pairs"]) == len(mean.signs)
                assert int(cell["cosine_pairs"]) == len(mean.cosines)


class TestClassMatrix:
    @settings(max_examples=8)
    @given(study=studies)
    def test_definition(self, study: Synthetic):
        """Each cell is the mean over ordered pairs of two classes, self-pairs left out."""
        ds = study.build()

        assert_matches_loops(class_matrix(ds).compute(), validation(ds))

    def test_store(self, store: Path, made: xr.Dataset):
        """A store opened with xarray gives what the data in memory give."""
        xr.testing.assert_allclose(
            class_matrix(xr.open_zarr(store)).compute(),
            class_matrix(made).compute(),
            rtol=EXACT["rtol"],
        )

    def test_many_rows(self):
        """Blocks that are worked on in several parts give what one pass of numpy gives."""
        ds = Synthetic(n_examples=300, n_classes=3, iterations=(0,), zero_gradients=(200,)).build()
        matrix = class_matrix(ds).compute().isel(learning_rate=0, seed=0, iteration=0)

        sign = np.sign(ds["cosine"].values[0, 0, 0].astype(float))
        labels = ds["label"].values
        for a in range(3):
            for b in range(3):
                cells = sign[labels == a][:, labels == b]
                pairs = cells.size - (a == b) * len(cells)
                total = cells.sum() - (a == b) * np.diag(cells).sum()
                np.testing.assert_allclose(matrix["sign"].values[a, b], total / pairs, **EXACT)
                assert int(matrix["pairs"][a, b]) == pairs

    def test_lazy(self, store: Path):
        """No pair is read before compute."""
        matrix = class_matrix(xr.open_zarr(store))

        assert all(matrix[name].chunks is not None for name in matrix.data_vars)

    @settings(max_examples=8)
    @given(study=studies, random_seed=st.integers(0, 2**16))
    def test_order_of_examples(self, study: Synthetic, random_seed: int):
        """Another order of the examples, rows and columns apart, changes nothing."""
        ds, random = study.build(), np.random.default_rng(random_seed)
        shuffled = ds.isel(
            example=random.permutation(study.n_examples), other=random.permutation(study.n_examples)
        )

        xr.testing.assert_allclose(
            class_matrix(shuffled).compute(), class_matrix(ds).compute(), rtol=1e-12
        )

    @settings(max_examples=8)
    @given(
        study=two_checkpoints,
        rows=st.integers(1, 17),
        columns=st.integers(1, 17),
        lead=st.booleans(),
    )
    def test_chunks(self, study: Synthetic, rows: int, columns: int, lead: bool):
        """Chunk sizes do not matter, on any dimension."""
        ds = study.build()
        chunks = {"example": rows, "other": columns, "iteration": -1 if lead else 1}

        xr.testing.assert_allclose(
            class_matrix(ds.chunk(chunks)).compute(), class_matrix(ds).compute(), rtol=1e-12
        )

    @settings(max_examples=8)
    @given(study=studies, value=st.sampled_from([-1.0, 0.3, 1.0, np.nan]))
    def test_self_pairs(self, study: Synthetic, value: float):
        """What the diagonal holds never counts."""
        ds = study.build()
        other = ds.copy(deep=True)
        n = np.arange(study.n_examples)
        other["cosine"].values[..., n, n] = value

        xr.testing.assert_identical(class_matrix(other).compute(), class_matrix(ds).compute())

    @settings(max_examples=8)
    @given(
        study=studies,
        tiles=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1),
    )
    def test_missing_tiles(self, study: Synthetic, tiles: set[tuple[int, int]]):
        """Missing pairs are left out of every mean, and counted."""
        ds = study.build()
        whole = class_matrix(ds).compute()
        for i, j in tiles:
            ds["cosine"].values[..., 5 * i : 5 * i + 5, 5 * j : 5 * j + 5] = np.nan

        matrix = class_matrix(ds).compute()

        assert_matches_loops(matrix, validation(ds))
        xr.testing.assert_equal(matrix["missing"], whole["pairs"] - matrix["pairs"])
        assert (whole["missing"] == 0).all()

    @settings(max_examples=8)
    @given(study=studies)
    def test_overall_mean(self, study: Synthetic):
        """The cells, weighted by their pairs, add up to the mean over all pairs."""
        ds = study.build()
        matrix = class_matrix(ds).compute()

        for at in checkpoints(ds):
            got = matrix.isel(at)
            everything = loops.means(validation(ds).isel(at), lambda _i, _j: "all")["all"]
            total = float((got["sign"] * got["pairs"]).sum() / got["pairs"].sum())
            np.testing.assert_allclose(total, everything.sign, **EXACT)
            total = float((got["cosine"] * got["cosine_pairs"]).sum() / got["cosine_pairs"].sum())
            np.testing.assert_allclose(total, everything.cosine, **EXACT)

    @settings(max_examples=8)
    @given(study=studies, random=st.randoms(use_true_random=False))
    def test_other_names(self, study: Synthetic, random):
        """Classes named otherwise permute the matrix, and nothing else."""
        ds = study.build()
        names = [str(name) for name in class_matrix(ds)["class_name"].values]
        new = random.sample(names, len(names))
        mapping = dict(zip(names, new, strict=True))
        renamed = ds.assign_coords(
            {
                key: (dim, np.array([mapping[name] for name in ds[key].values], dtype=object))
                for key, dim in (("class_name", "example"), ("other_class_name", "other"))
            }
        ).drop_vars(["superclass_name", "other_superclass_name"])

        got = class_matrix(renamed).compute().sel(class_name=new, other_class_name=new)

        expected = class_matrix(ds).compute()
        for measure in ("sign", "cosine", "pairs"):
            np.testing.assert_array_equal(got[measure], expected[measure])

    def test_class_order(self, made: xr.Dataset):
        """Classes come in the order of the store's class_names, not in the alphabet's."""
        names = list(class_matrix(made)["class_name"].values)

        assert names == ["class z", "class y", "class x", "class w"]

    def test_zero_gradient(self, made: xr.Dataset):
        """A zero gradient counts as sign 0 and is in no cosine mean; one pair of cells shows it."""
        matrix = class_matrix(made).compute()
        name = str(made["class_name"].values[20])
        row = matrix.sel(class_name=name)

        assert (row["cosine_pairs"] < row["pairs"]).all()
        others = matrix.drop_sel(class_name=name, other_class_name=name)
        assert (others["cosine_pairs"] == others["pairs"]).all()

    def test_description(self, made: xr.Dataset):
        """Every result says what it is, its unit and its range."""
        for result in (class_matrix(made), superclass_matrix(made), within_between(made)):
            for name, variable in result.data_vars.items():
                assert variable.attrs["long_name"], name
                assert variable.attrs["units"] == "1", name
                assert variable.attrs["description"].endswith("."), name

    def test_checkpoints_travel_along(self, made: xr.Dataset):
        """A matrix carries epoch and training curves of its checkpoints as coordinates."""
        matrix = class_matrix(made)

        xr.testing.assert_equal(
            matrix["validation_accuracy"].reset_coords(drop=True),
            made["validation_accuracy"].reset_coords(drop=True),
        )
        assert "epoch" in matrix.coords

    def test_one_checkpoint(self, made: xr.Dataset):
        """A store cut down to one checkpoint gives one matrix."""
        one = made.isel(learning_rate=1, seed=0, iteration=1)

        assert class_matrix(one)["sign"].dims == ("class_name", "other_class_name")
        xr.testing.assert_allclose(
            class_matrix(one)["sign"].reset_coords(drop=True).compute(),
            class_matrix(made)["sign"]
            .isel(learning_rate=1, seed=0, iteration=1)
            .reset_coords(drop=True)
            .compute(),
        )


class TestSplits:
    def test_validation_by_default(self, made: xr.Dataset):
        """Where there are two splits, validation pairs are meant unless others are asked for."""
        default, chosen = class_matrix(made), class_matrix(made, splits=("validation",) * 2)

        xr.testing.assert_identical(default.compute(), chosen.compute())
        assert default.attrs["splits"] == "validation-validation"

    def test_train_and_validation(self, made: xr.Dataset):
        """Blocks between two splits have no self-pairs, and zero gradients on both sides count."""
        matrix = class_matrix(made, splits=("train", "validation")).compute()

        assert int(matrix["pairs"].isel(learning_rate=0, seed=0, iteration=0).sum()) == 16 * 24
        block = made.isel(example=slice(0, 16), other=slice(16, 40))
        zero = np.flatnonzero(made["gradient_norm"].values[0, 0, 0] == 0) - 16
        signs = np.sign(block["cosine"].values[0, 0, 0].astype(float))
        for a in matrix["class_name"].values:
            for b in matrix["other_class_name"].values:
                rows, columns = (
                    block["class_name"].values == a,
                    block["other_class_name"].values == b,
                )
                cell = matrix.isel(learning_rate=0, seed=0, iteration=0)
                cell = cell.sel(class_name=a, other_class_name=b)
                np.testing.assert_allclose(cell["sign"], signs[rows][:, columns].mean(), **EXACT)
                lost = rows.sum() * columns[zero].sum()
                assert int(cell["pairs"] - cell["cosine_pairs"]) == lost

    def test_unknown_split(self, made: xr.Dataset):
        """A split that is not there is refused by name, with those that are."""
        with pytest.raises(DataError, match=r"split 'test'; there are \['train', 'validation'\]"):
            class_matrix(made, splits=("test", "test"))

    def test_one_split(self):
        """Where there is one split, it is the one that is meant, whatever its name."""
        only_training = Synthetic(n_examples=12, n_train=12).build()

        assert class_matrix(only_training).attrs["splits"] == "train-train"

    def test_same_name_in_two_splits(self):
        """Example 3 of one split and example 3 of another are two examples."""
        ds = Synthetic(n_examples=12, n_classes=2, n_train=6).build()
        names = np.tile(np.arange(6), 2)
        again = ds.assign_coords(example=names, other=names)

        for splits in (("train", "validation"), ("validation", "validation"), ("train", "train")):
            xr.testing.assert_identical(
                class_matrix(again, splits=splits).compute(),
                class_matrix(ds, splits=splits).compute(),
            )


class TestRowSums:
    @settings(max_examples=8)
    @given(study=studies)
    def test_definition(self, study: Synthetic):
        """Each row's sums are over its pairs with one class."""
        ds = study.build()
        sums = row_sums(ds).compute()
        chosen = validation(ds)

        for at in checkpoints(ds):
            one = chosen.isel(at)
            columns = one["other_class_name"].values
            expected = loops.means(one, lambda i, j, columns=columns: (i, columns[j]))
            for i in range(chosen.sizes["example"]):
                for b in sums["other_class_name"].values:
                    got = sums.isel(at).isel(example=i).sel(other_class_name=b)
                    mean = expected.get((i, b), loops.Mean())
                    np.testing.assert_allclose(got["cosine_sum"], sum(mean.cosines), **EXACT)
                    assert float(got["sign_sum"]) == sum(mean.signs)
                    assert float(got["pairs"]) == len(mean.signs)
                    assert float(got["cosine_pairs"]) == len(mean.cosines)

    def test_any_coordinate(self, made: xr.Dataset):
        """Examples can be grouped by a coordinate of the reader's own."""
        odd = np.where(made["label"].values % 2, "odd", "even").astype(object)
        ds = made.assign_coords(parity=("example", odd), other_parity=("other", odd))

        assert_matches_loops(class_matrix(ds, "parity").compute(), validation(ds), "parity")


class TestSuperclassMatrix:
    @settings(max_examples=8)
    @given(study=studies.filter(lambda study: study.n_classes > 2))
    def test_definition(self, study: Synthetic):
        """Each cell is the mean over pairs of examples of two super-classes."""
        ds = study.build()

        assert_matches_loops(superclass_matrix(ds).compute(), validation(ds), by="superclass_name")

    def test_without_superclasses(self):
        """A data set without super-classes is refused, in words."""
        with pytest.raises(DataError, match="has no super-classes; use class_matrix"):
            superclass_matrix(Synthetic(n_examples=12).build())

    def test_contrast(self, made: xr.Dataset):
        """Classes of one super-class are compared with the others, the diagonal left out."""
        matrix = class_matrix(made).compute()
        cells = matrix["sign"].isel(learning_rate=0, seed=0, iteration=1).values
        group = [0, 1, 0, 1]  # of the four classes

        contrast = superclass_contrast(matrix)["sign"].isel(learning_rate=0, seed=0, iteration=1)

        for relation, same in (("same_superclass", True), ("other_superclass", False)):
            expected = [
                cells[a, b]
                for a in range(4)
                for b in range(4)
                if a != b and (group[a] == group[b]) == same
            ]
            np.testing.assert_allclose(contrast.sel(relation=relation), np.mean(expected))


class TestWithinBetween:
    @settings(max_examples=8)
    @given(study=studies)
    def test_definition(self, study: Synthetic):
        """Every class, and every ordered pair of classes, weighs the same."""
        ds = study.build()
        result = within_between(ds).compute()

        for at in checkpoints(ds):
            for measure in ("sign", "cosine"):
                expected = loops.within_between(validation(ds).isel(at), measure)
                np.testing.assert_allclose(result[measure].isel(at), expected, **EXACT)

    @settings(max_examples=8)
    @given(study=studies)
    def test_over_pairs(self, study: Synthetic):
        """The pooled means weigh every pair of examples the same."""
        ds = study.build()
        result = within_between(ds).compute()

        for at in checkpoints(ds):
            one = validation(ds).isel(at)
            rows, columns = one["class_name"].values, one["other_class_name"].values
            expected = loops.means(
                one, lambda i, j, rows=rows, columns=columns: bool(rows[i] == columns[j])
            )
            got = result.isel(at)
            for relation, same in (("within", True), ("between", False)):
                one_relation = got.sel(relation=relation)
                mean = expected[same]
                np.testing.assert_allclose(one_relation["sign_over_pairs"], mean.sign, **EXACT)
                np.testing.assert_allclose(one_relation["cosine_over_pairs"], mean.cosine, **EXACT)
                assert int(one_relation["pairs"]) == len(mean.signs)

    def test_which_is_which(self, made: xr.Dataset):
        """Attributes say what weighs the same."""
        result = within_between(made)

        assert "every class" in result["sign"].attrs["weight"]
        assert result["sign_over_pairs"].attrs["weight"] == "every pair alike"

    def test_balanced_classes(self):
        """With classes of one size and no zero gradient both means agree."""
        result = within_between(Synthetic(n_examples=16).build()).compute()

        np.testing.assert_allclose(result["sign"], result["sign_over_pairs"], **EXACT)
        np.testing.assert_allclose(result["cosine"], result["cosine_over_pairs"], **EXACT)

    def test_nothing_computed_yet(self):
        """Before the first tile everything is NaN, and no warning is raised."""
        ds = Synthetic(n_examples=12).build()
        ds["cosine"].values[:] = np.nan

        result = within_between(ds).compute()

        assert np.isnan(result["sign"]).all()
        assert (result["pairs"] == 0).all()
        assert int(result["missing"].isel(learning_rate=0, seed=0, iteration=0).sum()) == 12 * 11


def test_not_a_store():
    """A Dataset without cosines is refused with what was found."""
    with pytest.raises(DataError, match=r"expected a variable cosine .* found \['x'\]"):
        class_matrix(xr.Dataset({"x": ("example", [1.0])}))
