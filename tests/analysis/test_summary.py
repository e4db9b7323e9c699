"""All statistics at once: the same numbers, each chunk read once, progress shown."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr.storage
from analysis.synthetic import Synthetic
from rich.console import Console

import distributed_stiffness.analysis as analysis
from distributed_stiffness.progress import Progress


class TestSummary:
    def test_same_numbers(self, store: Path):
        """A summary holds what each function returns."""
        ds = xr.open_zarr(store)
        summary = analysis.summary(ds, bins=8)

        assert summary.superclass_matrix is not None
        assert summary.distance_profile is not None
        assert summary.critical_length is not None
        assert summary.superclass_contrast is not None
        for got, expected in (
            (summary.class_matrix, analysis.class_matrix(ds)),
            (summary.superclass_matrix, analysis.superclass_matrix(ds)),
            (summary.within_between, analysis.within_between(ds)),
            (summary.superclass_contrast, analysis.superclass_contrast(ds)),
            (summary.distance_profile, analysis.distance_profile(ds, 8)),
            (summary.critical_length, analysis.critical_length(ds, 8)),
            (summary.curves, analysis.checkpoint_curves(ds)),
        ):
            xr.testing.assert_allclose(got, expected.compute())
            assert all(variable.chunks is None for variable in got.variables.values())

    def test_each_chunk_once(self, store: Path, monkeypatch: pytest.MonkeyPatch):
        """Every statistic together reads each chunk of cosines once."""
        reads: Counter[str] = Counter()
        get = zarr.storage.LocalStore.get

        async def counted(self, key, *args, **kwargs):
            reads[key] += 1
            return await get(self, key, *args, **kwargs)

        ds = xr.open_zarr(store)
        monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
        analysis.summary(ds)

        cosines = {key: n for key, n in reads.items() if key.startswith("cosine/c/")}
        # 16 training examples, then 24 of validation, in tiles of 12: four a side, without the two
        # of validation with training alone (their mirrors do); two rates, two stages.
        assert len(cosines) == (4 * 4 - 2) * 2 * 2
        assert set(cosines.values()) == {1}

    def test_each_chunk_once_of_two_splits(self, store: Path, monkeypatch: pytest.MonkeyPatch):
        """Errors of columns that are no rows cost no second reading."""
        reads: Counter[str] = Counter()
        get = zarr.storage.LocalStore.get

        async def counted(self, key, *args, **kwargs):
            reads[key] += 1
            return await get(self, key, *args, **kwargs)

        ds = xr.open_zarr(store)
        monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
        analysis.summary(ds, splits=("train", "validation"))

        cosines = {n for key, n in reads.items() if key.startswith("cosine/c/")}
        assert cosines == {1}

    def test_without_extras(self):
        """Without super-classes and distances the rest is there."""
        ds = Synthetic(n_examples=12).build().drop_vars("distance")
        summary = analysis.summary(ds)

        assert summary.superclass_matrix is None
        assert summary.distance_profile is None
        assert summary.critical_length is None
        assert summary.class_matrix["sign"].notnull().all()


class TestCheckpointCurves:
    def test_undecided(self):
        """The share of undecided pairs is of all pairs i < j, and NaN where it was not checked."""
        ds = Synthetic(n_examples=12).build()
        ds["undecided"].values[:] = [[[33, -1]]]

        share = analysis.checkpoint_curves(ds)["undecided_share"].values.ravel()

        np.testing.assert_array_equal(share, [33 / 66, np.nan])

    def test_zero_gradients(self, made: xr.Dataset):
        """Examples without a gradient are counted at each checkpoint."""
        assert (analysis.checkpoint_curves(made)["zero_gradients"] == 1).all()


class TestCompute:
    def test_progress(self, store: Path):
        """Reading a store is shown as a phase that ends."""
        text = io.StringIO()
        progress = Progress(console=Console(file=text, force_terminal=False, width=200))
        lazy = analysis.class_matrix(xr.open_zarr(store))

        analysis.compute(lazy, progress)

        lines = text.getvalue().splitlines()
        assert lines[0].startswith("reductions: 0/")
        assert "(100%)" in lines[-1]

    def test_stored_beside_derived(self, store: Path):
        """A variable of the store and one computed from it can be computed together."""
        ds = xr.open_zarr(store)[["undecided"]]
        ds["half"] = ds["undecided"] / 2

        xr.testing.assert_identical(analysis.compute(ds), ds.load())


class TestAccessor:
    def test_methods(self, store: Path):
        """`ds.stiffness` gives what the functions give, on any open store."""
        ds = xr.open_zarr(store)

        for name in (
            "class_matrix",
            "superclass_matrix",
            "within_between",
            "row_sums",
            "distance_profile",
        ):
            got, expected = getattr(ds.stiffness, name)(), getattr(analysis, name)(ds)
            # Lazy arrays of one name are computed by one graph.
            assert got["pairs"].data.name == expected["pairs"].data.name
        contrast, expected = ds.stiffness.superclass_contrast(), analysis.superclass_contrast(ds)
        assert contrast["sign_error"].data.name == expected["sign_error"].data.name
        length = analysis.critical_length(ds)
        got = ds.stiffness.critical_length()
        assert got["sign_length"].data.name == length["sign_length"].data.name
        assert ds.stiffness.curves()["undecided_share"].notnull().all()
        assert ds.stiffness.summary().sizes["example"] == 40

    def test_sign(self, store: Path):
        """The sign of each pair is there, lazy, described, and missing where the cosine is."""
        ds = xr.open_zarr(store)
        sign = ds.stiffness.sign

        assert sign.chunks == ds["cosine"].chunks
        np.testing.assert_array_equal(sign, np.sign(ds["cosine"]))
        assert sign.attrs["units"] == "1"


def test_light_imports():
    """Looking at results loads neither torch nor ray."""
    code = (
        "import sys, distributed_stiffness.analysis, distributed_stiffness.figures,"
        " distributed_stiffness.report; print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
