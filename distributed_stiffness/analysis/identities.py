"""Which example each row and each column of a store is: what makes a self-pair one.

Rows and columns may be left out, put in another order and drawn again (a bootstrap), each for
itself.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from distributed_stiffness.errors import DataError

# What a selection holds of each row and column (`pairs.select`): a number of its example, and
# whether its gradient is 0. With spaces, which no variable of a store has.
ROW_IDENTITY, COLUMN_IDENTITY = "identity of the row", "identity of the column"
ROW_ZERO, COLUMN_ZERO = "zero gradient of the row", "zero gradient of the column"


def identities(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Number the examples, rows and columns alike: a pair of one number is a self-pair.

    An example is told by its split and its position there, or where a store does not have both, by
    `example` and `other`.

    Args:
        ds: a store, or a part of one, with its labels in memory.

    Raises:
        DataError: nothing tells them.
    """
    n = ds.sizes["example"]
    by_position = {"index", "other_index", "split", "other_split"} <= set(ds.coords)
    told = [("index", "other_index")] if by_position else [("example", "other")]
    if {"split", "other_split"} <= set(ds.coords):
        told.append(("split", "other_split"))
    identity = np.zeros(n + ds.sizes["other"], dtype=np.int64)
    for row, column in told:
        if not _name_alike(ds, row, column):
            raise DataError(
                f"which pairs are of an example with itself cannot be told: {row!r} and {column!r}"
                " do not name the examples of rows and columns alike, each once for its row or"
                " column. Select from a store with its coordinates and leave them as they are;"
                " several draws of examples are reduced one after the other"
            )
        names = ds[row].values, ds[column].values
        _, number = np.unique(np.concatenate(names), return_inverse=True)
        identity = identity * (number.max(initial=0) + 1) + number
    return identity[:n], identity[n:]


def _name_alike(ds: xr.Dataset, row: str, column: str) -> bool:
    names = ds[row], ds[column]
    if any(of.ndim != 1 or bool(of.isnull().any()) for of in names):
        return False
    texts = {of.dtype.kind in "OUST" for of in names}
    named = {name in ds.coords for name in (row, column)}
    # Without a coordinate xarray counts: whole dimensions are of the same examples.
    counted = named == {False} and names[0].size == names[1].size
    return len(texts) == 1 and (named == {True} or counted)


def places(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where each of some numbers is among others, all of which are there."""
    order = np.argsort(numbers)
    return np.asarray(order[np.searchsorted(numbers, wanted, sorter=order)])


def occurrences(numbers: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Count how often each of some numbers is among others."""
    ordered = np.sort(among)
    left, right = (np.searchsorted(ordered, numbers, side=side) for side in ("left", "right"))
    return np.asarray(right - left)
