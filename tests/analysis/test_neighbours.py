"""Neighbouring measures: their definitions, their errors against deletion, what they need."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import kernels
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness import analysis
from distributed_stiffness.analysis import (
    gradient_coherence,
    gradient_confusion,
    kernel_alignment,
    neighbours,
    participation_ratio,
    reduced,
)
from distributed_stiffness.errors import DataError

# Deleting by subtraction leaves the rounding of the sums; errors are roots of small squares.
CLOSE = {"rtol": 1e-6, "atol": 1e-9}
SAME = ("validation", "validation")
KERNELS = ("cosine", "gram")
OF_SINGLE_PAIRS = ("minimum", "confusion", "product_quantile")
SCALE_FREE = (
    "coherence",
    "m_coherence",
    "diversity",
    "signal_to_noise",
    "class_share",
    "participation_ratio",
    "alignment",
)

studies = st.builds(
    Synthetic,
    n_examples=st.integers(13, 17),
    n_classes=st.integers(2, 4),
    n_train=st.integers(0, 4),
    iterations=st.just((0,)),
    zero_gradients=st.lists(st.integers(5, 12), max_size=2, unique=True),
    random_seed=st.integers(0, 2**16),
)


def only(ds: xr.Dataset) -> xr.Dataset:
    return ds.isel(learning_rate=0, seed=0, iteration=0)


def validation(ds: xr.Dataset) -> xr.Dataset:
    chosen = np.flatnonzero(ds["split"].values == "validation")
    return ds.isel(example=chosen, other=chosen)


def of_gradients(gradients: np.ndarray, labels: list[str]) -> xr.Dataset:
    """A store of one checkpoint, from gradients (E, P)."""
    norms = np.linalg.norm(gradients, axis=1)
    units = gradients / np.where(norms > 0, norms, 1)[:, None]
    names = np.array(labels, dtype=object)
    return xr.Dataset(
        {
            "cosine": (("example", "other"), (units @ units.T).astype(np.float32)),
            "gradient_norm": ("example", norms),
        },
        coords={
            "example": np.arange(len(norms)),
            "other": np.arange(len(norms)),
            "class_name": ("example", names),
            "other_class_name": ("other", names),
        },
    )


class TestDefinitions:
    @settings(max_examples=8)
    @given(study=studies, kernel=st.sampled_from(KERNELS))
    def test_values_and_errors(self, study: Synthetic, kernel: str):
        """Each is what its definition makes of the matrix, its error what deletions make of it."""
        ds = study.build()
        got = only(neighbours(ds).compute()).sel(kernel=kernel)
        one = only(validation(ds))
        K, labels = kernels.kernel(one, kernel)
        values, errors = (
            kernels.measures(K, labels),
            kernels.errors(K, labels, one.sizes["example"]),
        )

        for name, value in values.items():
            variable, _, class_name = name.partition(" of ")
            if class_name:
                variable, at = "class_share", {"class_name": class_name}
            else:
                at = {}
            np.testing.assert_allclose(got[variable].sel(at), value, **CLOSE)
            error = got[f"{variable}_error"].sel(at)
            np.testing.assert_allclose(error, errors[name], rtol=1e-5, atol=1e-8)

    @settings(max_examples=8)
    @given(study=studies, kernel=st.sampled_from(KERNELS))
    def test_confusion(self, study: Synthetic, kernel: str):
        """The minimum is that of all pairs of different examples, and η its negative, or 0."""
        ds = study.build()
        got = only(gradient_confusion(ds).compute()).sel(kernel=kernel)
        least = min(kernels.off_diagonal(kernels.kernel(only(validation(ds)), kernel)[0]))

        np.testing.assert_allclose(got["minimum"], least, rtol=1e-6)
        np.testing.assert_allclose(got["confusion"], max(0.0, -least), rtol=1e-6)

    @settings(max_examples=8)
    @given(
        study=studies,
        kernel=st.sampled_from(KERNELS),
        quantiles=st.lists(st.floats(0, 1), min_size=1, max_size=5),
        scale=st.sampled_from([1e-12, 1.0, 1e9]),
    )
    def test_quantiles(self, study: Synthetic, kernel: str, quantiles: list[float], scale: float):
        """A quantile is within 1/128 of that of the pairs, whatever their size."""
        ds = study.build()
        ds["gradient_norm"] = ds["gradient_norm"] * scale
        got = only(gradient_confusion(ds, quantiles=quantiles).compute()).sel(kernel=kernel)
        products = kernels.off_diagonal(kernels.kernel(only(validation(ds)), kernel)[0])

        expected = np.quantile(products, quantiles, method="inverted_cdf")
        np.testing.assert_allclose(
            got["product_quantile"], expected, rtol=1 / 128, atol=1e-30 * scale**2
        )


class TestKnownGradients:
    def test_one_direction(self):
        """Gradients that are one are coherent: every example helps all n."""
        ds = of_gradients(np.tile([3.0, 4.0, 0.0], (6, 1)), ["a", "b"] * 3)
        got = gradient_coherence(ds).compute()

        for name, value in (("coherence", 1.0), ("m_coherence", 6.0), ("diversity", 1 / 6)):
            np.testing.assert_allclose(got[name], value, rtol=1e-6)
        np.testing.assert_allclose(participation_ratio(ds)["participation_ratio"], 1, rtol=1e-6)
        np.testing.assert_allclose(got["mean_product"].sel(kernel="gram"), 25, rtol=1e-6)

    def test_orthogonal(self):
        """Orthogonal gradients of one size help themselves alone."""
        ds = of_gradients(2 * np.eye(6), ["a", "b"] * 3)
        got = neighbours(ds).compute()

        for name, value in (
            ("coherence", 0.0),
            ("m_coherence", 1.0),
            ("diversity", 1.0),
            ("signal_to_noise", 0.0),
            ("confusion", 0.0),
            ("participation_ratio", 6.0),
        ):
            np.testing.assert_allclose(got[name], value, atol=1e-12)

    def test_labels_alone(self):
        """Where gradients are one in a class and orthogonal between, they are the label kernel."""
        ds = of_gradients(np.eye(3)[[0, 0, 1, 1, 2, 2, 2]], list("aabbccc"))
        got = kernel_alignment(ds).compute()

        np.testing.assert_allclose(got["alignment"], 1, rtol=1e-12)

    def test_zero_gradients(self):
        """A gradient of zero is in no cosine, and dilutes the coherence of products."""
        ds = of_gradients(np.array([[1.0, 0], [1, 0], [1, 0], [0, 0]]), ["a", "b", "a", "b"])
        got = gradient_coherence(ds).compute()

        np.testing.assert_allclose(got["coherence"].sel(kernel="cosine"), 1)
        np.testing.assert_allclose(got["m_coherence"].sel(kernel="cosine"), 3)
        np.testing.assert_allclose(got["coherence"].sel(kernel="gram"), (6 / 12) / (3 / 4))


class TestProperties:
    def test_size_of_gradients(self, made: xr.Dataset):
        """Gradients that are all 1,000 times as large change no measure without a scale."""
        larger = made.assign(gradient_norm=made["gradient_norm"] * 1e3)
        got, expected = neighbours(larger).compute(), neighbours(made).compute()

        for name in SCALE_FREE:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-9)
        for name in ("mean_product", "confusion"):
            np.testing.assert_allclose(
                got[name].sel(kernel="gram"), 1e6 * expected[name].sel(kernel="gram"), rtol=1e-6
            )

    def test_order_of_examples(self, made: xr.Dataset):
        """Rows and columns in another order, apart, change nothing."""
        random = np.random.default_rng(0)
        n = made.sizes["example"]
        shuffled = made.isel(example=random.permutation(n), other=random.permutation(n))

        xr.testing.assert_allclose(
            neighbours(shuffled).compute(), neighbours(made).compute(), rtol=1e-6, atol=1e-9
        )

    @settings(max_examples=4)
    @given(rows=st.integers(3, 40), columns=st.integers(3, 40), seeds=st.integers(1, 2))
    def test_chunks(self, made: xr.Dataset, rows: int, columns: int, seeds: int):
        """Chunk sizes do not matter."""
        chunked = made.chunk({"example": rows, "other": columns, "iteration": seeds})

        xr.testing.assert_allclose(
            neighbours(chunked).compute(), neighbours(made).compute(), rtol=1e-6, atol=1e-9
        )

    def test_each_checkpoint_alone(self, made: xr.Dataset):
        """Every checkpoint has the numbers that it has alone."""
        at = {"learning_rate": 1, "seed": 0, "iteration": 1}

        alone, together = neighbours(made.isel(at)).compute(), neighbours(made).compute().isel(at)
        xr.testing.assert_allclose(alone, together, rtol=1e-9)

    def test_shares(self, made: xr.Dataset):
        """The shares of the classes add up to 1."""
        share = gradient_coherence(made)["class_share"]
        np.testing.assert_allclose(share.sum("class_name"), 1, rtol=1e-9)

    def test_lazy(self, store):
        """No pair is read before the result is computed."""
        result = neighbours(xr.open_zarr(store))
        assert all(v.chunks is not None for v in result.data_vars.values())

    def test_described(self, made: xr.Dataset):
        """Every number says what it is."""
        for name, variable in neighbours(made).data_vars.items():
            assert variable.attrs["long_name"], name
            assert variable.attrs["units"] == "1", name
            assert variable.attrs["description"].endswith("."), name

    def test_many_examples(self, made: xr.Dataset, monkeypatch: pytest.MonkeyPatch):
        """Of too many examples the alignment is the same, without the error that needs K·K·1."""
        expected = kernel_alignment(made).compute()
        monkeypatch.setattr("distributed_stiffness.analysis.selection.WHOLE", 10)
        got = kernel_alignment(made).compute()

        np.testing.assert_array_equal(got["alignment"], expected["alignment"])
        assert expected["alignment_error"].notnull().all()
        assert got["alignment_error"].isnull().all()


class TestWhatThereIs:
    @pytest.mark.parametrize("splits", [None, SAME, ("train", "train")], ids=str)
    @pytest.mark.parametrize("scale", [1.0, 1e-150, 1e-300])
    def test_sums_in_place_of_pairs(
        self, made: xr.Dataset, splits: tuple[str, str] | None, scale: float
    ):
        """Sums give every measure that needs no single pair, whatever the size of gradients."""
        made = made.assign(gradient_norm=scale * made["gradient_norm"])
        expected = neighbours(made, splits=splits).compute()

        found = neighbours(reduced(made), splits=splits).compute()

        same = expected.drop_vars([*OF_SINGLE_PAIRS, "alignment_error", "quantile"])
        xr.testing.assert_allclose(found.drop_vars("alignment_error"), same, rtol=1e-9, atol=0)
        assert found["alignment_error"].isnull().all()
        for name, variable in found.data_vars.items():
            assert variable.attrs == expected[name].attrs

    def test_what_needs_single_pairs(self, made: xr.Dataset):
        """Least products, quantiles and eigenvalues are refused, and the message says why."""
        for reduce in (gradient_confusion, analysis.spectrum):
            with pytest.raises(DataError, match="keeps sums over each example's pairs, not pairs"):
                reduce(reduced(made))

    def test_sums_that_are_not_whole(self, made: xr.Dataset):
        """A checkpoint that lacks a pair has no number; the others have theirs."""
        half = made.copy(deep=True)
        half["cosine"].values[0, 0, 0, 30, 31] = half["cosine"].values[0, 0, 0, 31, 30] = np.nan
        got, expected = neighbours(reduced(half)).compute(), neighbours(reduced(made)).compute()

        at = {"learning_rate": 0, "iteration": 0}
        assert all(v.isel(at).isnull().all() for v in got.data_vars.values())
        xr.testing.assert_allclose(got.isel(iteration=1), expected.isel(iteration=1))

    def test_sums_of_an_earlier_version(self, made: xr.Dataset):
        """Without sums of squares and norms there is the coherence of cosines alone."""
        sums = reduced(made).drop_vars(["weighted_sums", "square_sums", "kernel"])
        expected = gradient_coherence(made, kernels=["cosine"]).compute()

        xr.testing.assert_allclose(neighbours(sums).compute(), expected, rtol=1e-9)
        for reduce in (participation_ratio, kernel_alignment):
            with pytest.raises(DataError, match=r"without square_sums.*compute the study anew"):
                reduce(sums)
        with pytest.raises(DataError, match=r"no Gram of it: .* without weighted_sums"):
            gradient_coherence(sums, kernels=["gram"])

    def test_without_norms(self, made: xr.Dataset):
        """Without the norms of gradients there are cosines alone."""
        bare = made.drop_vars("gradient_norm")

        for ds in (bare, reduced(bare)):
            assert neighbours(ds)["kernel"].values.tolist() == ["cosine"]
        with pytest.raises(DataError, match="no variable gradient_norm"):
            gradient_coherence(bare, kernels=["gram"])

    def test_missing_pairs(self, made: xr.Dataset):
        """A checkpoint with a pair that is not computed yet has no number."""
        half = made.copy(deep=True)
        half["cosine"].values[0, 0, 0, 30, 31] = half["cosine"].values[0, 0, 0, 31, 30] = np.nan
        got, expected = neighbours(half).compute(), neighbours(made).compute()

        at = {"learning_rate": 0, "iteration": 0}
        assert all(v.isel(at).isnull().all() for v in got.data_vars.values())
        xr.testing.assert_allclose(got.isel(iteration=1), expected.isel(iteration=1))

    def test_refused(self, made: xr.Dataset):
        """What does not exist is refused with what does."""
        with pytest.raises(DataError, match="the rows are other examples than the columns"):
            neighbours(made, splits=("train", "validation"))
        with pytest.raises(DataError, match="expected some of cosine, gram"):
            neighbours(made, kernels=["ntk"])
        with pytest.raises(DataError, match="expected shares from 0 to 1"):
            gradient_confusion(made, quantiles=[1.5])

    def test_summary(self):
        """A summary holds them, and their spectrum, where rows and columns are one set."""
        made = Synthetic(n_examples=20, n_train=8, iterations=(0,)).build()
        summary = analysis.summary(made)
        assert summary.neighbours is not None
        assert summary.spectrum is not None
        xr.testing.assert_allclose(summary.neighbours, neighbours(made).compute())
        xr.testing.assert_allclose(summary.spectrum, analysis.spectrum(made).compute())
        xr.testing.assert_allclose(summary.teaching, analysis.teaching(made).compute())

        of_two = analysis.summary(made, splits=("train", "validation"))
        assert of_two.neighbours is None
        assert of_two.spectrum is None
        of_sums = analysis.summary(reduced(made))
        assert of_sums.neighbours is not None
        assert of_sums.spectrum is None
