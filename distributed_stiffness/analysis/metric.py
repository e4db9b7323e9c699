"""The distance that a profile is taken over: of the inputs, of a layer, or anybody's own.

Legend of the arrays: i examples in rows, j examples in columns, F features.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.identities import identities
from distributed_stiffness.analysis.pairs import (
    BLOCK,
    DISTANCE_SUMS,
    checkpoint_dims,
    with_labels_in_memory,
)
from distributed_stiffness.errors import DataError

# The name of a variable of a store, or an array: of pairs (…, example, other), or of one value or
# vector of each example (example, …), whose Euclidean distance is taken.
Distance = str | xr.DataArray

DISTANCE = "distance"  # cosine distance of the inputs, which every store of pairs has


def with_distance(ds: xr.Dataset, distance: Distance) -> xr.Dataset:
    """Return a store whose variable `distance` is the one asked for.

    Args:
        ds: a store.
        distance: name of a variable or coordinate, or an array, of `example` and `other` in the
            order of the store. With both dimensions it is a distance of pairs, symmetric. With
            `example` alone it is a position of each example, one number or a vector, and the
            distance of two is the Euclidean one, made block by block when it is needed. It may
            have dimensions of checkpoints.

    Returns:
        The store with distance (…, example, other).

    Raises:
        DataError: there is no such variable, it does not fit the store, or is no number; or the
            store keeps sums by the distance of the inputs.
    """
    if isinstance(distance, str) and distance == DISTANCE:
        if DISTANCE not in ds and DISTANCE_SUMS not in ds:
            raise DataError("the store has no variable distance (example, other): no profile")
        return ds
    if "cosine" not in ds:
        raise DataError(
            f"distance is {_called(distance)!r}, but this store keeps sums by the cosine distance"
            " of the inputs, not pairs: leave distance out, or run the study with its pairs"
        )
    found = _named(ds, distance) if isinstance(distance, str) else distance
    _require_fit(found, ds)
    if "other" not in found.dims:
        found = _of_positions(found, ds)
    lead = [
        dim for dim in ds["cosine"].dims if dim in found.dims and dim not in ("example", "other")
    ]
    found = found.transpose(*lead, "example", "other")
    return ds.assign(distance=(found.dims, found.data, _described(found, _called(distance))))


def distances_of(ds: xr.Dataset) -> list[str]:
    """Return the names of a store's distances of pairs."""
    return [
        str(name)
        for name, variable in ds.data_vars.items()
        if name != "cosine" and {"example", "other"} <= set(variable.dims)
    ]


def _called(distance: Distance) -> str:
    return distance if isinstance(distance, str) else str(distance.name or "an array")


def _named(ds: xr.Dataset, name: str) -> xr.DataArray:
    if name not in ds.variables:
        raise DataError(
            f"distance is {name!r}, but the store has no such variable; its distances are"
            f" {', '.join(distances_of(ds)) or 'none'}. `stiffness distances` adds others"
        )
    return ds[name]


def _require_fit(found: xr.DataArray, ds: xr.Dataset) -> None:
    """Refuse what is not of this store's examples and checkpoints."""
    called = f"distance {_called(found)!r}"
    if "example" not in found.dims:
        raise DataError(
            f"{called} has the dimensions {found.dims}: expected example and other, or example"
        )
    if found.dtype.kind not in "fiub":
        raise DataError(f"{called} holds {found.dtype}: expected numbers")
    known = {"example", "other", *checkpoint_dims(ds)}
    if "other" in found.dims and (extra := set(found.dims) - known):
        raise DataError(
            f"{called} has the dimensions {found.dims}: expected example, other and dimensions of"
            f" checkpoints, not {', '.join(sorted(map(str, extra)))}"
        )
    for dim in found.dims:
        if dim not in known:
            continue
        if found.sizes[dim] != ds.sizes[dim]:
            raise DataError(
                f"{called} has {found.sizes[dim]} along {dim}, the store has {ds.sizes[dim]}:"
                " select the same of both"
            )
        if dim in found.coords and not np.array_equal(found[dim].values, ds[dim].values):
            raise DataError(f"{called} and the store differ in {dim!r}: select the same of both")


def _of_positions(found: xr.DataArray, ds: xr.Dataset) -> xr.DataArray:
    """Return |x_i - x_j| of one value or vector of each example, lazily."""
    lead = [dim for dim in ds["cosine"].dims if dim in found.dims and dim != "example"]
    X = found.transpose(*lead, "example", ...).data
    X = X.reshape(*X.shape[: len(lead) + 1], -1)  # (…, i, F)
    places = _places_of_columns(ds)
    chunks = [(1,) * X.shape[k] for k in range(len(lead))]
    rows, columns = _cut(X, (*chunks, BLOCK, -1)), _cut(X[..., places, :], (*chunks, BLOCK, -1))
    n = len(lead)
    axes = tuple(range(n))
    made = da.blockwise(
        _euclidean,
        (*axes, n, n + 1),
        rows,
        (*axes, n, n + 2),
        columns,
        (*axes, n + 1, n + 2),
        concatenate=True,
        dtype=np.float64,
        meta=np.empty((0,) * (n + 2)),
    )
    name = found.attrs.get("long_name", found.name or "position")
    attrs = {
        "long_name": f"distance by {name}",
        "units": found.attrs.get("units", "1"),
        "description": f"|x_i - x_j| of each example's {name}; 0 or more.",
    }
    return xr.DataArray(made, dims=(*lead, "example", "other"), attrs=attrs)


def _cut(X: Any, chunks: tuple[Any, ...]) -> da.Array:
    return X.rechunk(chunks) if isinstance(X, da.Array) else da.from_array(X, chunks=chunks)


def _places_of_columns(ds: xr.Dataset) -> np.ndarray:
    """Return the row that each column is.

    Raises:
        DataError: a column is no row.
    """
    rows, columns = identities(with_labels_in_memory(ds))
    first, position = np.unique(rows, return_index=True)
    place = np.searchsorted(first, columns).clip(max=len(first) - 1)
    if not (first[place] == columns).all():
        raise DataError(
            "a position of each example says nothing of columns that are no rows: give distances of"
            " pairs (example, other), or select the same examples as rows and as columns"
        )
    return np.asarray(position[place])


def _euclidean(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Return |x_i - x_j| (…, i, j) float64 of (…, i, F) and (…, j, F)."""
    X, Y = X.astype(np.float64), Y.astype(np.float64)
    if X.shape[-1] == 1:  # exact, and most positions are one number
        return np.asarray(np.abs(X - Y.swapaxes(-1, -2)))
    squares = (X**2).sum(-1)[..., :, None] + (Y**2).sum(-1)[..., None, :]
    squares -= 2 * X @ Y.swapaxes(-1, -2)
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _described(found: xr.DataArray, called: str) -> dict[str, str]:
    """Say what a distance is: for axes, and beside results."""
    return {
        "long_name": str(found.attrs.get("long_name", called.replace("_", " "))),
        "units": str(found.attrs.get("units", "1")),
        "description": str(found.attrs.get("description", "A distance of the user's own.")),
    }
