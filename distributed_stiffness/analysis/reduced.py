"""A store without its pairs: the sums over each example's pairs, which most questions need alone.

N² cosines become N·(5C + 8K + 2) sums for C classes and K distance bins. Means, neighbouring
measures, their standard errors and figures that ask for no single pair come out of them through the
same functions, and are the same numbers. A run with `--reduce-only` writes such a store from the
start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.distance import (
    bin_coordinates,
    binned_sums,
    distance_edges,
)
from distributed_stiffness.analysis.identities import identities
from distributed_stiffness.analysis.pairs import (
    CLASS_SUMS,
    DISTANCE_SUMS,
    OTHER_SPLIT,
    SQUARE_SUMS,
    SUMS_DIMS,
    WEIGHTED_SUMS,
    Grouping,
    Splits,
    as_text,
    checkpoint_dims,
    grouping,
    labels,
    leading_dims,
    select,
    with_labels_in_memory,
)
from distributed_stiffness.analysis.products import Block, weighted_sums
from distributed_stiffness.analysis.selection import KERNELS, norms_of
from distributed_stiffness.analysis.sums import SUMS, grouped_sums
from distributed_stiffness.errors import DataError

BINS = 50
RELATIONS = ("within", "between")
LONG_NAMES = {
    CLASS_SUMS: "sums over the pairs of an example, by class of the other",
    DISTANCE_SUMS: "sums over the pairs of an example, by relation and distance",
    WEIGHTED_SUMS: "sums of cosine times norm over the pairs of an example, by class of the other",
    SQUARE_SUMS: "sums of squares over the pairs of an example",
}
_EACH = (
    "Of each example's pairs with others of a split: sum of cosines, sum of signs, pairs in the"
    " cosine sum (no zero gradients), pairs in the sign sum. Self-pairs are in none."
)
DESCRIPTIONS = {
    CLASS_SUMS: _EACH,
    DISTANCE_SUMS: _EACH,
    WEIGHTED_SUMS: "Of each example's pairs with others of a split and class: sum of cosine *"
    " gradient_norm of the other. Times its own gradient_norm, the sum of products of gradients."
    " Self-pairs are in none.",
    SQUARE_SUMS: "Of each example's pairs with others of a split: sum of squared cosines (kernel"
    " cosine), and of squared cosine * gradient_norm of the other (kernel gram; times its own"
    " gradient_norm squared, of squared products of gradients). Self-pairs are in none.",
}


def reduced(
    ds: xr.Dataset, bins: int = BINS, edges: Sequence[float] | np.ndarray | None = None
) -> xr.Dataset:
    """Put sums in place of a store's pairs; every reduction of the result is that of the store.

    Args:
        ds: a store, or a part of one, with every example both as a row and as a column.
        bins: of equal width over the distances that occur, where `edges` is None.
        edges: of the distance bins.

    Returns:
        Lazy Dataset: class_sums (…, example, split_of_other, class_of_other, sum), weighted_sums
        (…, example, split_of_other, class_of_other), square_sums (…, example, split_of_other,
        kernel) and, where the store has distances, distance_sums (…, example, split_of_other,
        relation, distance_bin, sum), float64; all else but cosine and distance is kept.

    Raises:
        DataError: `ds` is no store, or its rows are not its columns, in one order.
    """
    checkpoint_dims(ds)
    if "cosine" not in ds:
        raise DataError("this store keeps sums in place of its pairs already")
    ds = with_labels_in_memory(ds)
    if not np.array_equal(*identities(ds)):
        raise DataError(
            "sums are over the pairs of each example with all others: expected the same examples as"
            " rows and as columns, in the same order (select by `example` and `other` alike)"
        )
    splits = _splits(ds)
    classes = _all_classes(ds)
    sums = {
        CLASS_SUMS: _joined(ds, splits, lambda s: _by_class(ds, s, classes)),
        WEIGHTED_SUMS: _joined(ds, splits, lambda s: _for_kernels(ds, s, classes)[0]),
        SQUARE_SUMS: _joined(ds, splits, lambda s: _for_kernels(ds, s, classes)[1]),
    }
    coordinates: dict[str, Any] = sums_coordinates(classes, _names(splits))
    if "distance" in ds:
        if edges is None:
            every = [distance_edges(ds, bins, splits=s) for s in _pairs_of_splits(splits)]
            low, high = min(e[0] for e in every), max(e[-1] for e in every)
            edges = np.linspace(low, high, bins + 1)
        found = np.asarray(edges, dtype=np.float64)
        sums[DISTANCE_SUMS] = _joined(ds, splits, lambda s: _by_distance(ds, s, found))
        coordinates |= distance_coordinates(found)
    result = ds.drop_vars(["cosine", "distance"], errors="ignore").assign(sums)
    for name in sums:
        # One chunk for each checkpoint: Zarr asks for chunks of one size.
        whole = dict.fromkeys(("example", OTHER_SPLIT, *SUMS_DIMS[name]), -1)
        result[name] = result[name].transpose(..., *whole).chunk(whole)
        result[name].attrs = {
            "long_name": LONG_NAMES[name],
            "units": "1",
            "description": DESCRIPTIONS[name],
        }
    return result.assign_coords(coordinates)


def sums_coordinates(classes: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    """Return the coordinates of the dimensions of class sums."""
    return {
        OTHER_SPLIT: as_text(splits),
        "class_of_other": as_text(classes),
        "sum": as_text(SUMS),
        "kernel": as_text(KERNELS),
    }


def distance_coordinates(edges: np.ndarray) -> dict[str, Any]:
    """Return the coordinates of the dimensions of distance sums."""
    return {"relation": as_text(RELATIONS)} | bin_coordinates(edges)


def _splits(ds: xr.Dataset) -> list[str] | None:
    if "split" not in ds.coords or "other_split" not in ds.coords:
        return None
    return list(dict.fromkeys(ds["other_split"].values.astype(str).tolist()))


def _names(splits: list[str] | None) -> list[str]:
    return splits or ["all"]


def _pairs_of_splits(splits: list[str] | None) -> list[Splits | None]:
    return [None] if splits is None else [(a, b) for a in splits for b in splits]


def _all_classes(ds: xr.Dataset) -> list[str]:
    examples = ds[["example", "other"]].reset_coords(drop=True)
    bare = examples.assign_coords(
        class_name=("example", ds["class_name"].values),
        other_class_name=("other", ds["other_class_name"].values),
    )
    return list(map(str, grouping(bare.assign_attrs(ds.attrs), "class_name").names))


def _joined(
    ds: xr.Dataset, splits: list[str] | None, sums: Callable[[Splits | None], xr.DataArray]
) -> xr.DataArray:
    """Put the sums of each pair of splits in their places."""
    if splits is None:
        return sums(None).expand_dims(OTHER_SPLIT)
    rows = ds["split"].values.astype(str)
    parts = [
        xr.concat([sums((row, column)) for column in splits], dim=OTHER_SPLIT) for row in splits
    ]
    order = np.argsort(np.concatenate([np.flatnonzero(rows == row) for row in splits]))
    whole: xr.DataArray = xr.concat(parts, dim="example").isel(example=order)
    return whole


def _by_class(ds: xr.Dataset, splits: Splits | None, classes: list[str]) -> xr.DataArray:
    found = grouped_sums(select(ds, splits), "class_name")
    values = da.einsum("...gs,gc->...cs", found.sides[0], _among(classes, found.groups))
    return xr.DataArray(
        values, dims=(*leading_dims(found.chosen), "example", *SUMS_DIMS[CLASS_SUMS])
    )


def _for_kernels(
    ds: xr.Dataset, splits: Splits | None, classes: list[str]
) -> tuple[xr.DataArray, xr.DataArray]:
    """Return sums weighted with the columns' norms, by class, and sums of squares, by kernel."""
    chosen = select(ds, splits)
    groups = grouping(chosen, "class_name")
    every = Block(
        labels(chosen, groups), norms_of(ds, chosen, "row"), norms_of(ds, chosen, "column")
    )
    found = weighted_sums(chosen["cosine"].data, every, len(groups))
    by_class = da.einsum("...g,gc->...c", found[..., : len(groups)], _among(classes, groups))
    dims = (*leading_dims(chosen), "example")
    return (
        xr.DataArray(by_class, dims=(*dims, *SUMS_DIMS[WEIGHTED_SUMS])),
        xr.DataArray(found[..., len(groups) :], dims=(*dims, *SUMS_DIMS[SQUARE_SUMS])),
    )


def _among(classes: list[str], groups: Grouping) -> np.ndarray:
    """Return which of all classes each of some is, (some, all), 0 or 1."""
    inside = np.zeros((len(groups), len(classes)))
    for k, name in enumerate(groups.names.tolist()):
        inside[k, classes.index(str(name))] = 1
    return inside


def _by_distance(ds: xr.Dataset, splits: Splits | None, edges: np.ndarray) -> xr.DataArray:
    found = binned_sums(ds, edges=edges, splits=splits)
    dims = (*leading_dims(found.chosen), "example", *SUMS_DIMS[DISTANCE_SUMS])
    return xr.DataArray(found.sides[0], dims=dims)
