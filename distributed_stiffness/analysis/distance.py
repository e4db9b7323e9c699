"""Stiffness against the distance of two inputs.

Legend of the arrays: i examples in rows, j examples in columns, r relation of their classes (0
within one, 1 between two), k distance bins, S what is kept (as in `classes`). Each pair of chunks
(cosine, distance) is read once and ends in sums per row, bin and relation: enough for the profile
and its error bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.classes import COSINE, COSINE_PAIRS, PAIRS, SIGN, SUMS
from distributed_stiffness.analysis.pairs import (
    Labels,
    Splits,
    checkpoint_coordinates,
    grouping,
    labels,
    leading_dims,
    origin,
    select,
)
from distributed_stiffness.errors import DataError

LARGEST = 2.0  # 1 − cosine of two inputs is at most this
# Four kinds of pair are told apart by one integer, so that one counting pass serves sign sums and
# both counts.
_HARMS, _NEUTRAL, _HELPS, _ZERO_GRADIENT = range(4)


def distance_profile(
    ds: xr.Dataset,
    bins: int = 20,
    edges: Sequence[float] | np.ndarray | None = None,
    *,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Return mean stiffness of pairs in bins of input distance.

    Distance is 1 − x_i·x_j/(|x_i||x_j|), in [0, 2], of inputs as the network sees them (Fort et
    al., v3). Self-pairs are left out. Profiles of two studies can be compared only under one
    preprocessing, and with the same edges.

    Args:
        ds: a store.
        bins: how many bins of equal width, where `edges` is None.
        edges: of the bins, ascending; a bin holds its lower edge, the last one both. None: equal
            bins over the distances that occur, for which the distances (not the cosines) are read
            once at this call.
        splits: of rows and columns, as in `class_matrix`.

    Returns:
        Lazy Dataset over leading dimensions + (relation: all, within, between; distance_bin): sign
        and cosine (float64, NaN in an empty bin), pairs and cosine_pairs (int64); coordinates
        distance_bin (the centre), lower_edge and upper_edge.

    Raises:
        DataError: the store has no distances, or the edges do not ascend.
    """
    sums = distance_row_sums(ds, bins, edges, splits=splits).sum("example")
    both = sums.sum("relation").expand_dims(relation=["all"])
    sums = xr.concat([both, sums], dim="relation")
    result = xr.Dataset(
        {
            "cosine": sums["cosine_sum"] / sums["cosine_pairs"].where(sums["cosine_pairs"] > 0),
            "sign": sums["sign_sum"] / sums["pairs"].where(sums["pairs"] > 0),
            "pairs": sums["pairs"].astype(np.int64),
            "cosine_pairs": sums["cosine_pairs"].astype(np.int64),
        },
        attrs=origin(ds) | sums.attrs,
    ).transpose(..., "relation", "distance_bin")
    for name, attrs in _ATTRS.items():
        result[name].attrs = dict(attrs)
    result["relation"].attrs = {"long_name": "relation of the two examples' classes"}
    return result.assign_coords(checkpoint_coordinates(ds))


_ATTRS = {"cosine": COSINE, "sign": SIGN, "pairs": PAIRS, "cosine_pairs": COSINE_PAIRS}


def distance_row_sums(
    ds: xr.Dataset,
    bins: int = 20,
    edges: Sequence[float] | np.ndarray | None = None,
    *,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Sum cosine and sign of each row's pairs, by relation and distance bin.

    Returns:
        Lazy Dataset with cosine_sum, sign_sum, cosine_pairs and pairs, float64, over leading
        dimensions + (example, relation: within, between; distance_bin). Arguments, bins and
        coordinates are those of `distance_profile`.

    Raises:
        DataError: the store has no distances, or the edges do not ascend.
    """
    chosen = select(ds, splits)
    if "distance" not in chosen:
        raise DataError("the store has no variable distance (example, other): no profile")
    known_edges = _checked(edges) if edges is not None else _observed_edges(chosen, bins)
    groups = grouping(chosen, "class_name")
    lead, cosine, n_bins = leading_dims(chosen), chosen["cosine"].data, len(known_edges) - 1
    sums = da.map_blocks(
        _sums_of_block,
        cosine,
        chosen["distance"].data.rechunk(cosine.chunks[-2:]),
        labels=labels(chosen, groups),
        edges=known_edges,
        new_axis=[cosine.ndim, cosine.ndim + 1, cosine.ndim + 2],
        chunks=(*cosine.chunks[:-1], (1,) * cosine.numblocks[-1], (2,), (n_bins,), (len(SUMS),)),
        dtype=np.float64,
        meta=np.empty((0,) * (cosine.ndim + 3)),
    ).sum(axis=cosine.ndim - 1)
    dims = (*lead, "example", "relation", "distance_bin")
    kept = {name: c for name, c in chosen.coords.items() if set(c.dims) <= {*lead, "example"}}
    return xr.Dataset(
        {name: (dims, sums[..., k]) for k, name in enumerate(SUMS)},
        coords=kept | {"relation": ["within", "between"]} | _bin_coordinates(known_edges),
        attrs={"splits": chosen.attrs["splits"]},
    ).drop_vars("row_identity")


def _sums_of_block(
    cosine: np.ndarray, distance: np.ndarray, *, labels: Labels, edges: np.ndarray, block_info: Any
) -> np.ndarray:
    """Sum one block of pairs by row, relation and bin.

    Args:
        cosine: (…, i, j).
        distance: (i, j).
        labels: of all rows and columns.
        edges: of the bins, float64.
        block_info: from dask, where the block lies.

    Returns:
        (…, i, 1, r, k, S) float64.
    """
    lead, n_bins = cosine.shape[:-2], len(edges) - 1
    out = np.empty((*lead, len(distance), 1, 2, n_bins, len(SUMS)))
    for rows, slab in labels.of_block(block_info).slabs():
        part = cosine[..., rows, :], distance[rows]
        out[..., rows, 0, :, :, :] = _sums_of_rows(*part, slab, edges)
    return out


def _sums_of_rows(
    cosine: np.ndarray, distance: np.ndarray, block: Labels, edges: np.ndarray
) -> np.ndarray:
    """Sum a few rows of a block; return (…, i, r, k, S)."""
    n_bins, n_rows = len(edges) - 1, len(distance)
    kept = (distance >= edges[0]) & (distance <= edges[-1])  # false where it is NaN
    if (self_pair := block.self_pairs()) is not None:
        kept &= ~self_pair
    # (row, relation, bin, kind of pair) as one integer; the kind is added for each checkpoint.
    place = _bins(distance, kept, edges)
    place += n_bins * (block.row_groups[:, None] != block.column_groups)
    place += 2 * n_bins * np.arange(n_rows)[:, None]
    place *= 4
    lead, zero = cosine.shape[:-2], block.zero_pairs()
    out = np.empty((*lead, n_rows, 2, n_bins, len(SUMS)))
    for at in np.ndindex(lead):
        kind = _kind(cosine[at], None if zero is None else zero[at])
        sums = _added(cosine[at], place + kind, kept, size=8 * n_rows * n_bins)
        out[at] = sums.reshape(n_rows, 2, n_bins, len(SUMS))
    return out


def _kind(cosine: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    kind = np.int8(_NEUTRAL) + (cosine > 0).view(np.int8) - (cosine < 0).view(np.int8)
    return np.asarray(kind if zero is None else np.where(zero, np.int8(_ZERO_GRADIENT), kind))


def _added(cosine: np.ndarray, place: np.ndarray, kept: np.ndarray, *, size: int) -> np.ndarray:
    """Count and add up one checkpoint's pairs by place; return (place without kind, S)."""
    known = kept & np.isfinite(cosine)
    if not known.all():
        cosine, place = cosine[known], place[known]
    cosine, place = cosine.ravel(), place.ravel()
    counts = np.bincount(place, minlength=size).reshape(-1, 4)
    totals = np.bincount(place, weights=cosine, minlength=size).reshape(-1, 4)
    pairs = counts.sum(1)
    return np.stack(
        [
            totals[:, :_ZERO_GRADIENT].sum(1),
            counts[:, _HELPS] - counts[:, _HARMS],
            pairs - counts[:, _ZERO_GRADIENT],
            pairs,
        ],
        axis=1,
    ).astype(np.float64)


def _bins(distance: np.ndarray, kept: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin of each kept distance, and any bin for the others; int64."""
    n_bins = len(edges) - 1
    distance = distance if kept.all() else np.where(kept, distance, edges[0])
    if np.allclose(edges, np.linspace(edges[0], edges[-1], n_bins + 1), rtol=0, atol=1e-15):
        # Four times as fast as searching; rounding can move a distance only if it lies within
        # 1e-15 of an edge.
        scaled = distance - edges[0]
        scaled *= n_bins / (edges[-1] - edges[0])
        found = scaled.astype(np.int64)
    else:
        found = np.searchsorted(edges, distance, side="right") - 1
    return np.asarray(found.clip(max=n_bins - 1))  # the last bin holds its upper edge


def _checked(edges: Sequence[float] | np.ndarray) -> np.ndarray:
    checked = np.asarray(edges, dtype=np.float64)
    if checked.ndim != 1 or len(checked) < 2 or not (np.diff(checked) > 0).all():
        raise DataError(f"edges is {edges!r}: expected two or more numbers, ascending")
    return checked


def _observed_edges(chosen: xr.Dataset, bins: int) -> np.ndarray:
    """Return equal bins over the distances that occur, self-pairs left out."""
    if bins < 1:
        raise DataError(f"bins is {bins}: expected 1 or more")
    distance = chosen["distance"].data
    extremes = da.map_blocks(
        _extremes_of_block,
        distance,
        labels=labels(chosen, grouping(chosen, "class_name")),
        new_axis=2,
        chunks=((1,) * distance.numblocks[0], (1,) * distance.numblocks[1], (2,)),
        dtype=np.float64,
        meta=np.empty((0, 0, 0)),
    ).compute()
    low, high = float(extremes[..., 0].min()), float(extremes[..., 1].max())
    if not low <= high:  # nothing is known
        low, high = 0.0, LARGEST
    if low == high:
        low, high = low - 1e-3, high + 1e-3
    return np.linspace(low, high, bins + 1)


def _extremes_of_block(distance: np.ndarray, *, labels: Labels, block_info: Any) -> np.ndarray:
    known = np.isfinite(distance)
    if (self_pair := labels.of_block(block_info).self_pairs()) is not None:
        known &= ~self_pair
    low = np.min(distance, initial=np.inf, where=known)
    high = np.max(distance, initial=-np.inf, where=known)
    return np.array([[[low, high]]], dtype=np.float64)


def _bin_coordinates(edges: np.ndarray) -> dict[str, xr.DataArray]:
    centre = xr.DataArray(
        (edges[:-1] + edges[1:]) / 2,
        dims="distance_bin",
        attrs={
            "long_name": "cosine distance of the inputs",
            "units": "1",
            "description": "Centre of the bin, in [0, 2].",
        },
    )
    sides = {"lower_edge": edges[:-1], "upper_edge": edges[1:]}
    return {"distance_bin": centre} | {
        name: xr.DataArray(
            values,
            dims="distance_bin",
            attrs={"long_name": name.replace("_", " ") + " of the distance bin", "units": "1"},
        )
        for name, values in sides.items()
    }
