"""A study that keeps sums answers as one that keeps pairs, and is resumed like it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from studies import assert_same_bits, run_options, tiny_study

from distributed_stiffness import analysis
from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.sums import (
    Folding,
    bin_edges,
    count_near_zero,
    distances,
    rounded_up,
)
from distributed_stiffness.errors import StoreError
from distributed_stiffness.store import EXPONENTS, WHOLE_MATRIX_CHECK
from distributed_stiffness.study import Data, Study

DATA = Data(name="digits", validation_examples=41, train_examples=19)


def study(**changes: object) -> Study:
    """Two splits, so that tiles of 20 hold examples of both."""
    return tiny_study(data=DATA, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of pairs and one of sums, of the same checkpoints."""
    folder = tmp_path_factory.mktemp("sums")
    shared = {"checkpoints": str(folder / "checkpoints")}
    run_study(study(), run_options(folder / "pairs.zarr", **shared))
    run_study(study(keep="sums"), run_options(folder / "sums.zarr", **shared))
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path) -> xr.Dataset:
    return xr.open_zarr(str(folder / "pairs.zarr"))


@pytest.fixture(scope="module")
def sums(folder: Path) -> xr.Dataset:
    return xr.open_zarr(str(folder / "sums.zarr"))


class TestNumbers:
    @pytest.mark.parametrize("splits", [None, ("train", "train"), ("train", "validation")])
    def test_class_statistics_are_those_of_the_pairs(
        self, pairs: xr.Dataset, sums: xr.Dataset, splits: analysis.pairs.Splits | None
    ) -> None:
        """
        Class matrix, means within and between, all with their errors.
        """
        for reduction in (analysis.class_matrix, analysis.within_between):
            expected = reduction(pairs, splits=splits).compute()

            found = reduction(sums, splits=splits).compute()

            xr.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("splits", [None, ("train", "train")])
    def test_neighbouring_measures_are_those_of_the_pairs(
        self, pairs: xr.Dataset, sums: xr.Dataset, splits: analysis.pairs.Splits | None
    ) -> None:
        """
        Of cosines and of products, with their errors; all but what is of single pairs, and the
        error of the alignment, which takes the square of the matrix.
        """
        expected = analysis.neighbours(pairs, splits=splits).compute()
        of_pairs = ["minimum", "confusion", "product_quantile", "quantile", "alignment_error"]

        found = analysis.neighbours(sums, splits=splits).compute()

        assert found["kernel"].values.tolist() == ["cosine", "gram"]
        xr.testing.assert_allclose(
            found.drop_vars("alignment_error"), expected.drop_vars(of_pairs), rtol=1e-9, atol=0
        )

    def test_a_reduced_store_of_pairs_is_the_same(
        self, pairs: xr.Dataset, sums: xr.Dataset
    ) -> None:
        """
        The same arrays, but for their parts, with the same numbers and the same meaning.
        """
        made = analysis.reduced(pairs, edges=analysis.distance_edges(sums))

        for name in ("class_sums", "weighted_sums", "square_sums"):
            xr.testing.assert_allclose(
                sums[name].sum("other_part").compute(), made[name].compute(), rtol=1e-9, atol=0
            )
            assert sums[name].attrs["description"].startswith(made[name].attrs["description"])

    def test_the_distance_profile_is_that_of_the_pairs(
        self, pairs: xr.Dataset, sums: xr.Dataset
    ) -> None:
        """
        In the bins that the store says; pairs farther apart than its last edge are in its last bin.
        """
        edges = analysis.distance_edges(sums)
        near = pairs.assign(distance=pairs["distance"].clip(0, edges[-1]))
        expected = analysis.distance_profile(near, edges=edges).compute()

        found = analysis.distance_profile(sums).compute()

        # A distance that is rounded to the other side of an edge moves a pair to the next bin.
        assert (np.abs(found["pairs"] - expected["pairs"]).sum("distance_bin") <= 4).all()
        same = found["pairs"] == expected["pairs"]
        assert same.mean() > 0.9
        for name in ("cosine", "sign"):
            np.testing.assert_allclose(
                found[name].where(same), expected[name].where(same), rtol=1e-6, atol=1e-9
            )

    def test_everything_else_in_the_store_is_the_same(
        self, pairs: xr.Dataset, sums: xr.Dataset
    ) -> None:
        """
        Norms, losses and curves, bit for bit.
        """
        for name in ("gradient_norm", "loss", "correct", "train_loss", "validation_accuracy"):
            np.testing.assert_array_equal(sums[name], pairs[name])

    def test_undecided_pairs_are_those_below_the_bound_of_this_store(
        self, pairs: xr.Dataset, sums: xr.Dataset
    ) -> None:
        """
        The bound is the power of two at or above the one measured on pairs, within what making
        them again may change; and just as many pairs lie below it.
        """
        measured, bound = pairs["error_bound"].values, sums["error_bound"].values
        assert (np.log2(bound) % 1 == 0).all()
        assert (bound >= 0.5 * measured).all()
        assert (bound <= 4 * measured).all()
        cosine = np.abs(pairs["cosine"].values)
        below = (cosine > 0) & (cosine < bound[..., None, None])
        expected = np.triu(below, 1).sum((-1, -2))

        np.testing.assert_array_equal(sums["undecided"], expected)

    def test_the_last_checkpoint_is_checked_as_a_whole(self, sums: xr.Dataset) -> None:
        """
        All sums by class are compared with what needs no pairs.
        """
        found = json.loads(sums.attrs[WHOLE_MATRIX_CHECK])
        assert 0 < found["largest_difference"] < 1e-6

    def test_the_store_needs_no_matrix(self, folder: Path, sums: xr.Dataset) -> None:
        """
        Neither cosines nor distances are there, and a summary is made all the same.
        """
        assert not {"cosine", "distance"} & set(sums.data_vars)
        assert not (folder / "sums.zarr" / "cosine").exists()
        found = analysis.summary(sums)
        assert found.critical_length is not None


class TestFolding:
    """One tile at a time, against loops over its pairs."""

    @pytest.mark.parametrize(("rows", "columns"), [((0, 40), (0, 40)), ((0, 40), (40, 60))])
    def test_each_example_has_the_sums_of_its_pairs(
        self, rows: tuple[int, int], columns: tuple[int, int]
    ) -> None:
        """
        By split and class, and by relation and distance; weighted with norms, and squared; zero
        gradients are in no cosine sum, self-pairs in none; for the tile and for its mirror.
        """
        data, above, left = select(DATA), slice(*rows), slice(*columns)
        n, random = data.n_examples, np.random.default_rng(0)
        edges = bin_edges(data, 6)
        cosine = random.uniform(-1, 1, (n, n)).astype(np.float32)
        cosine = np.triu(cosine) + np.triu(cosine, 1).T
        zero = random.random(n) < 0.1
        cosine[zero] = cosine[:, zero] = 0
        D = distances(data, slice(0, n), slice(0, n)).numpy()

        part = np.ascontiguousarray(cosine[above, left])
        norms = np.where(zero, 0.0, np.exp(random.standard_normal(n)))
        tile, mirror = Folding(data, edges).tile(above, left, part, norms)

        assert (mirror is None) == (rows == columns)
        for found, a, b in ((tile, above, left), (mirror, left, above)):
            if found is None:
                continue
            for name, expected in loops(data, edges, cosine, D, norms, a, b).items():
                np.testing.assert_allclose(
                    getattr(found, name), expected, rtol=1e-12, atol=1e-12, err_msg=name
                )


def loops(
    data: StudyData,
    edges: np.ndarray,
    cosine: np.ndarray,
    D: np.ndarray,
    norms: np.ndarray,
    rows: slice,
    columns: slice,
) -> dict[str, np.ndarray]:
    """Return the sums of a tile, by their names in the store, one pair after the other."""
    splits, labels = list(dict.fromkeys(data.split)), data.examples.labels
    n, bins = rows.stop - rows.start, len(edges) - 1
    by_class = np.zeros((n, len(splits), data.labelled.n_classes, 4))
    by_distance = np.zeros((n, len(splits), 2, bins, 4))
    weighted, squares = np.zeros(by_class.shape[:-1]), np.zeros((n, len(splits), 2))
    for i in range(rows.start, rows.stop):
        for j in range(columns.start, columns.stop):
            if i == j:
                continue
            nonzero = norms[i] > 0 and norms[j] > 0
            c = float(cosine[i, j])
            what = np.array([c * nonzero, np.sign(c), nonzero, 1])
            split, other = splits.index(data.split[j]), int(labels[i] != labels[j])
            width = np.float32(bins / (edges[-1] - edges[0]))
            k = min(int((D[i, j] - np.float32(edges[0])) * width), bins - 1)
            by_class[i - rows.start, split, labels[j]] += what
            by_distance[i - rows.start, split, other, k] += what
            weighted[i - rows.start, split, labels[j]] += c * norms[j]
            squares[i - rows.start, split] += c**2, c**2 * norms[j] ** 2
    return {
        "class_sums": by_class,
        "distance_sums": by_distance,
        "weighted_sums": weighted,
        "square_sums": squares,
    }


class TestResume:
    def test_what_is_missing_comes_back_bit_for_bit(self, folder: Path, tmp_path: Path) -> None:
        """
        A tile without its last-written sums is made again, with all that belongs to it.
        """
        store = tmp_path / "sums.zarr"
        shutil.copytree(folder / "sums.zarr", store)
        # Part of the others first, then the examples' chunk.
        for chunk in ("class_sums/c/1/0/1/2/0/0/0/0", "class_sums/c/0/0/0/1/1/0/0/0",
                      "distance_sums/c/1/0/1/2/0/0/0/0/0", "near_zero/c/0/0/0/1/1/0",
                      "weighted_sums/c/1/0/1/2/0/0/0", "square_sums/c/1/0/1/2/0/0/0",
                      "undecided/c/1/0/1"):  # fmt: skip
            (store / chunk).unlink()

        run_study(study(keep="sums"), run_options(store, checkpoints=str(folder / "checkpoints")))

        assert_same_bits(folder / "sums.zarr", store)

    def test_sums_of_an_earlier_version_are_read_and_not_continued(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """
        Without sums for kernels: reductions are the same, a run is refused with what to do.
        """
        store = tmp_path / "sums.zarr"
        shutil.copytree(folder / "sums.zarr", store)
        metadata = json.loads((store / "zarr.json").read_text())
        for name in ("weighted_sums", "square_sums"):
            shutil.rmtree(store / name)
            del metadata["consolidated_metadata"]["metadata"][name]
        (store / "zarr.json").write_text(json.dumps(metadata))

        with pytest.raises(StoreError, match=r"an earlier version.* give another --store"):
            run_study(study(keep="sums"), run_options(store))
        old, new = (xr.open_zarr(str(path)) for path in (store, folder / "sums.zarr"))
        xr.testing.assert_identical(
            analysis.class_matrix(old).compute(), analysis.class_matrix(new).compute()
        )
        assert "alignment" not in analysis.neighbours(old)

    def test_pairs_and_sums_do_not_share_a_store(self, folder: Path) -> None:
        """
        A study that keeps the other kind is refused, and the message says so.
        """
        with pytest.raises(StoreError, match='keep was "sums", is null'):
            run_study(study(), run_options(folder / "sums.zarr"))
        with pytest.raises(StoreError, match='keep was null, is "sums"'):
            run_study(study(keep="sums"), run_options(folder / "pairs.zarr"))


class TestCounts:
    @given(
        st.lists(st.floats(-1, 1, width=32), min_size=9, max_size=9),
        st.booleans(),
    )
    def test_pairs_below_each_power_of_two_are_counted(
        self, values: list[float], diagonal: bool
    ) -> None:
        """
        Exact zeros are not; on the diagonal each pair is counted once and self-pairs never.
        """
        cosine = np.array(values, dtype=np.float32).reshape(3, 3)
        size = np.abs(np.triu(cosine, 1) if diagonal else cosine)

        expected = [int(((size > 0) & (size < 2.0**e)).sum()) for e in EXPONENTS]

        # The last power, 1, counts what is exactly 1 as well: no bound is larger.
        expected[-1] = int((size > 0).sum())
        found = count_near_zero(cosine, diagonal=diagonal)
        np.testing.assert_array_equal(found, expected)

    @given(st.floats(6e-8, 1))
    def test_a_bound_is_rounded_up(self, bound: float) -> None:
        """
        To the next power of two, less than twice as much.
        """
        up, place = rounded_up(bound)

        assert bound <= up < 2 * bound or up == 2.0 ** EXPONENTS[0]
        assert up == 2.0 ** EXPONENTS[place]

    def test_bins_reach_from_0_to_beyond_the_largest_distance(self) -> None:
        """
        Of a sample; here it is all there is.
        """
        data = select(DATA)
        every = slice(0, data.n_examples)

        edges = bin_edges(data, 50)

        assert len(edges) == 51
        assert edges[0] == 0
        assert distances(data, every, every).max() < edges[-1] <= 2
