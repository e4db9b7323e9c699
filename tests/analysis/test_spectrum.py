"""Spectra: eigenvalues of the matrix, all of them or those sought by iteration, and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis import kernels
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import reduced, spectrum
from distributed_stiffness.errors import DataError


def only(ds: xr.Dataset) -> xr.Dataset:
    return ds.isel(learning_rate=0, seed=0, iteration=0)


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return Synthetic(n_examples=30, n_parameters=12, zero_gradients=(3,)).build()


@pytest.mark.parametrize("kernel", ["cosine", "gram"])
class TestSpectrum:
    def test_definition(self, study: xr.Dataset, kernel: str):
        """Eigenvalues are those of the matrix, and the ranks what their shares say."""
        got = only(spectrum(study, 15).compute()).sel(kernel=kernel)
        K, _ = kernels.kernel(only(study), kernel)
        eigenvalues = np.sort(np.linalg.eigvalsh(K))[::-1]
        p = [value / np.trace(K) for value in eigenvalues if value > 1e-12 * np.trace(K)]

        np.testing.assert_allclose(
            got["eigenvalue"], eigenvalues[:15], rtol=1e-9, atol=1e-9 * eigenvalues[0]
        )
        np.testing.assert_allclose(
            got["share"], eigenvalues[:15] / np.trace(K), rtol=1e-9, atol=1e-9
        )
        entropy = -sum(value * np.log(value) for value in p)
        # Float32 cosines leave eigenvalues of 1e-7 where there should be none.
        np.testing.assert_allclose(got["effective_rank"], np.exp(entropy), rtol=1e-4)
        np.testing.assert_allclose(got["stable_rank"], np.trace(K) / eigenvalues[0], rtol=1e-9)

    def test_ranks(self, study: xr.Dataset, kernel: str):
        """Ranks lie between 1 and the number of parameters; the entropy's is the largest."""
        got = spectrum(study).compute().sel(kernel=kernel)

        assert (got["stable_rank"] >= 1).all()
        assert (got["participation_ratio"] >= got["stable_rank"] - 1e-9).all()
        assert (got["effective_rank"] >= got["participation_ratio"] - 1e-9).all()
        assert (got["effective_rank"] <= 12.01).all()

    @pytest.mark.parametrize("memory", [0, 2**30])
    def test_many_examples(
        self, study: xr.Dataset, kernel: str, memory: int, monkeypatch: pytest.MonkeyPatch
    ):
        """Sought by iteration they are the same, whether the matrix is kept or read each time."""
        random = np.random.default_rng(0)
        shuffled = study.isel(other=random.permutation(30)).chunk({"example": 7, "other": 11})
        expected = spectrum(study, 5).compute().sel(kernel=kernel)
        monkeypatch.setattr("distributed_stiffness.analysis.selection.WHOLE", 10)
        got = spectrum(shuffled, 5, memory=memory).compute().sel(kernel=kernel)

        for name in ("eigenvalue", "share", "stable_rank", "participation_ratio"):
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-6)
        assert got["effective_rank"].isnull().all()


def test_missing_pairs(study: xr.Dataset, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint with a pair that is not computed yet has no number, however it is sought."""
    half = study.copy(deep=True)
    half["cosine"].values[0, 0, 1, 5, 6] = np.nan
    for whole in (2_000, 10):
        monkeypatch.setattr("distributed_stiffness.analysis.selection.WHOLE", whole)
        got = spectrum(half, 4).compute()

        assert got["eigenvalue"].isel(iteration=1).isnull().all()
        assert got["eigenvalue"].isel(iteration=0).notnull().all()


def test_few_examples():
    """There are no more eigenvalues than examples."""
    ds = Synthetic(n_examples=6, n_classes=2).build()
    assert spectrum(ds).sizes["rank"] == 6


def test_refused(study: xr.Dataset):
    """Sums have no spectrum, and no eigenvalue is no spectrum."""
    with pytest.raises(DataError, match="a spectrum cannot be had"):
        spectrum(reduced(study))
    with pytest.raises(DataError, match="k is 0: expected 1 or more"):
        spectrum(study, 0)
