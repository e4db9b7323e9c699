"""Blocks of two splits, and the reductions of each."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import (
    class_matrix,
    distance_profile,
    reduced,
    split_blocks,
    summary,
    within_between,
)
from distributed_stiffness.errors import DataError

BLOCKS = ["train-train", "train-validation", "validation-validation"]


class TestSplitBlocks:
    def test_each_block(self, made: xr.Dataset):
        """Each block is the reduction of its splits, of any reduction."""
        edges = np.linspace(0, 2, 5)
        for reduction, options in (
            (within_between, {}),
            (class_matrix, {}),
            (distance_profile, {"edges": edges}),
        ):
            got = split_blocks(made, reduction, **options).compute()
            assert got["block"].values.tolist() == BLOCKS
            for name in BLOCKS:
                alone = reduction(made, splits=tuple(name.split("-")), **options).compute()
                for variable in ("sign", "cosine_error", "pairs"):
                    np.testing.assert_allclose(got[variable].sel(block=name), alone[variable])

    def test_of_sums(self, made: xr.Dataset):
        """A store of sums has the same blocks."""
        xr.testing.assert_allclose(
            split_blocks(reduced(made)).compute(), split_blocks(made).compute(), rtol=1e-9
        )

    def test_order_of_splits(self):
        """Blocks come in the store's order of splits."""
        ds = Synthetic(n_examples=16, n_train=8).build()
        turned = ds.isel(example=slice(None, None, -1), other=slice(None, None, -1))

        assert split_blocks(turned)["block"].values.tolist() == [
            "validation-validation",
            "validation-train",
            "train-train",
        ]

    def test_one_split(self):
        """A store of one split has no blocks, and its summary says so by None."""
        ds = Synthetic(n_examples=12).build()

        with pytest.raises(DataError, match="examples of one split only"):
            split_blocks(ds)
        assert summary(ds).blocks is None

    def test_summary(self, made: xr.Dataset):
        """A summary of two splits holds means of all blocks."""
        blocks = summary(made).blocks

        assert blocks is not None
        np.testing.assert_allclose(
            blocks["sign"].sel(block="validation-validation"), within_between(made)["sign"]
        )
