"""Blocks of a store with two splits: training pairs, training with validation, validation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import xarray as xr

from distributed_stiffness.analysis.classes import within_between
from distributed_stiffness.analysis.pairs import Splits, as_text, with_labels_in_memory
from distributed_stiffness.errors import DataError


def blocks_of(ds: xr.Dataset) -> list[Splits]:
    """Return the pairs of splits of a store, in its order: (train, train), (train, validation), …

    The mirror of a block, (validation, train), holds the same pairs and is left out. Empty where
    the store does not tell splits apart.
    """
    if "split" not in ds.coords or "other_split" not in ds.coords:
        return []
    splits = dict.fromkeys(map(str, ds["split"].values))
    columns = set(map(str, ds["other_split"].values))
    return [
        (a, b) for a, b in combinations_with_replacement(splits, 2) if a in splits and b in columns
    ]


def split_blocks(
    ds: xr.Dataset, reduction: Callable[..., xr.Dataset] = within_between, **options: Any
) -> xr.Dataset:
    """Return a reduction of every block: training pairs, training with validation, validation.

    The pair modes of Fort et al. (v3), which finds that the three behave alike.

    Args:
        ds: a store with examples of both splits.
        reduction: `within_between`, `class_matrix`, `distance_profile` or `critical_length` (these
            two with `edges`, so that bins are the same), or any other function of (ds, splits=…).
        options: of `reduction`.

    Returns:
        Lazy Dataset with what `reduction` returns along the first dimension `block`: such as
        train-train, train-validation, validation-validation.

    Raises:
        DataError: the store has examples of one split only, or lacks what is asked for.
    """
    found = blocks_of(ds)
    if len(found) < 2:
        raise DataError(
            "the store has examples of one split only, so that there are no blocks to compare: run"
            " the study with both, such as --examples 1000 --train-examples 500"
        )
    ds = with_labels_in_memory(ds)  # once for all
    parts = [reduction(ds, splits=splits, **options) for splits in found]
    result = xr.concat(
        parts,
        dim="block",
        coords="minimal",
        compat="override",
        join="outer",
        combine_attrs="drop_conflicts",
    )
    names = as_text(["-".join(splits) for splits in found])
    attrs = {"long_name": "splits of the two examples"}
    return result.assign_coords(block=("block", names, attrs))
