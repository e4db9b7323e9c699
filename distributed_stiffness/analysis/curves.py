"""What a study says of each checkpoint: training curves, and how far its numbers can be trusted."""

from __future__ import annotations

import numpy as np
import xarray as xr

from distributed_stiffness.attributes import decoded

PLACES = ("learning_rate", "seed", "iteration", "epoch")  # which checkpoint it is
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


def checkpoint_curves(ds: xr.Dataset) -> xr.Dataset:
    """Return everything that a store has one number of for each checkpoint.

    Returns:
        Lazy Dataset over the store's leading dimensions: train_loss, train_accuracy,
        validation_loss, validation_accuracy, error_bound, undecided as in the store (those that it
        has), and

        undecided_share: undecided pairs divided by all pairs; NaN where it was not checked, and
            where examples of the store are left out;
        zero_gradients: examples whose gradient is zero (int64).
    """
    names = [name for name in (*CURVES, "error_bound", "undecided") if name in ds]
    places = [name for name in PLACES if name in ds.coords]
    result = ds[names].reset_coords(drop=True).drop_attrs(deep=False)
    result = result.assign_coords({name: ds[name].variable for name in places})
    if "undecided" in ds:
        n = ds.sizes["example"]
        whole = decoded(ds.attrs).get("plan", {}).get("n_examples", n) == n
        # Undecided pairs are counted over all examples: of some of them nobody knows.
        result["undecided_share"] = _share(ds["undecided"] if whole else ds["undecided"] * 0 - 1, n)
    if "gradient_norm" in ds:
        result["zero_gradients"] = (
            (ds["gradient_norm"] == 0)
            .sum("example")
            .astype(np.int64)
            .assign_attrs(
                long_name="examples whose gradient is zero",
                units="1",
                description="They have sign 0 with every other, and are in no cosine mean.",
            )
            .reset_coords(drop=True)
        )
    return result


def _share(undecided: xr.DataArray, n: int) -> xr.DataArray:
    pairs = max(n * (n - 1) // 2, 1)
    share = (undecided / pairs).where(undecided >= 0)
    return share.reset_coords(drop=True).assign_attrs(
        long_name="share of pairs of undecided sign",
        units="1",
        description="Pairs (i < j) with |cosine| below the error bound, divided by all such pairs;"
        " in [0, 1].",
    )
