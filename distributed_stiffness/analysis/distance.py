"""Stiffness against the distance of two inputs.

Legend of the arrays: i examples in rows, j examples in columns, r relation of their classes (0
within one, 1 between two), k distance bins, S what is kept (as in `sums`). Each pair of chunks
(cosine, distance) is read once and ends in sums per row, bin and relation: enough for the profile
and its error bars.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.classes import relation_coordinate
from distributed_stiffness.analysis.jackknife import (
    MEASURES,
    Examples,
    Statistic,
    changes,
    error_attrs,
    examples_of,
    leave_one_out,
    slabs,
    spread_in_slabs,
)
from distributed_stiffness.analysis.metric import DISTANCE, Distance, with_distance
from distributed_stiffness.analysis.pairs import (
    DISTANCE_SUMS,
    Labels,
    Splits,
    as_text,
    checkpoint_coordinates,
    grouping,
    labels,
    leading_dims,
    origin,
    select,
)
from distributed_stiffness.analysis.sums import (
    COSINE,
    COSINE_PAIRS,
    PAIRS,
    SIGN,
    SUMS,
    in_one_piece,
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
    distance: Distance = DISTANCE,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Return mean stiffness of pairs in bins of their distance, with standard errors.

    Distance is 1 − x_i·x_j/(|x_i||x_j|), in [0, 2], of inputs as the network sees them (Fort et
    al., v3), or the one that is given. Self-pairs are left out. Profiles of two studies can be
    compared only under one preprocessing, and with the same edges. Errors are by jackknife over
    examples, all of them one sample; those of neighbouring bins are correlated, for bins share
    examples.

    Args:
        ds: a store.
        bins: how many bins of equal width, where `edges` is None; a reduced store has its own.
        edges: of the bins, ascending; a bin holds its lower edge, the last one both. None: equal
            bins over the distances that occur, for which the distances (not the cosines) are read
            once at this call.
        distance: name of another variable or coordinate, or an array: of pairs (…, example,
            other), symmetric, such as those that `distributed_stiffness.add_distances` adds, or of
            a number or vector of each example (example, …), whose Euclidean distance is taken. It
            may differ from checkpoint to checkpoint; the bins are the same for all.
        splits: of rows and columns, as in `class_matrix`.

    Returns:
        Lazy Dataset over leading dimensions + (relation: all, within, between; distance_bin): sign
        and cosine (float64, NaN in an empty bin), sign_error and cosine_error (float64, NaN where
        one example is in more than half of the bin's pairs), pairs and cosine_pairs (int64);
        coordinates distance_bin (the centre), lower_edge and upper_edge.

    Raises:
        DataError: the store has no such distance, or the edges do not ascend.
    """
    binned = binned_sums(ds, bins, edges, distance=distance, splits=splits)
    sums = _of_rows(binned).sum("example")
    both = sums.sum("relation").expand_dims("relation")
    sums = xr.concat([both, sums.drop_vars("relation")], dim="relation").chunk(relation=-1)
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
    dims = {"relation": 3, "distance_bin": len(binned.edges) - 1, "measure": 2}
    errors = binned.leave_one_out(partial(_bin_errors, binned.examples), dims)
    for k, measure in enumerate(MEASURES):
        attrs = error_attrs(_ATTRS[measure], "one example is in more than half of the pairs")
        result[f"{measure}_error"] = errors.isel(measure=k).assign_attrs(attrs)
    result = result.assign_coords(relation_coordinate("all", "within", "between"))
    return result.assign_coords(checkpoint_coordinates(ds))


_ATTRS = {"cosine": COSINE, "sign": SIGN, "pairs": PAIRS, "cosine_pairs": COSINE_PAIRS}


def _bin_errors(examples: Examples, as_row: np.ndarray, as_column: np.ndarray) -> np.ndarray:
    """Return the standard error of each mean (relation, bin, 2), from sums (E, r, k, S)."""

    def lost_of(some: slice) -> np.ndarray:
        lost = as_row[some] + as_column[some]
        return np.concatenate([lost.sum(1, keepdims=True), lost], axis=1)

    twice = sum(lost_of(some).sum(0) for some in slabs(len(as_row)))  # each pair in two examples
    largest = np.zeros_like(twice[..., 2:])
    for some in slabs(len(as_row)):
        np.maximum(largest, lost_of(some)[..., 2:].max(0), out=largest)
    totals = twice / 2
    variance = spread_in_slabs(lambda some: changes(totals, lost_of(some)), examples.roles).sum(0)
    variance[largest > totals[..., 2:] / 2] = np.nan
    return np.asarray(np.sqrt(variance))


@dataclass(frozen=True)
class BinnedSums:
    """A selection's sums by example, relation and distance bin, not computed yet."""

    chosen: xr.Dataset
    examples: Examples
    edges: np.ndarray  # of the bins
    distance: Mapping[Hashable, Any]  # attributes that say which
    # Of rows (lead…, N, r, k, S), and of columns (lead…, M, r, k, S) where these are others.
    sides: tuple[da.Array, ...]

    def leave_one_out(self, statistic: Statistic, dims: Mapping[str, int]) -> xr.DataArray:
        """Apply a function of each example's sums: see `jackknife.leave_one_out`."""
        lead = leading_dims(self.chosen)
        return leave_one_out(statistic, self.examples, self.sides, lead, dims)


def binned_sums(
    ds: xr.Dataset,
    bins: int = 20,
    edges: Sequence[float] | np.ndarray | None = None,
    *,
    distance: Distance = DISTANCE,
    splits: Splits | None = None,
) -> BinnedSums:
    """Sum the pairs of each example by relation and distance bin; as `distance_profile`.

    Raises:
        DataError: the store has no such distance, or the edges do not ascend.
    """
    chosen = select(with_distance(ds, distance), splits)
    groups = grouping(chosen, "class_name")
    examples = examples_of(chosen, groups)
    if "distance" not in chosen:
        kept = ["row"] if examples.square else ["row", "column"]
        sums = tuple(chosen[f"{side}_{DISTANCE_SUMS}"].data for side in kept)
        return BinnedSums(chosen, examples, _kept_edges(chosen, edges), _OF_INPUTS, sums)
    known_edges = _checked(edges) if edges is not None else _observed_edges(chosen, bins)
    of_rows = labels(chosen, groups)
    cosine, between = chosen["cosine"].data, _like_cosines(chosen)
    sides = [_sums(cosine, between, of_rows, known_edges)]
    if not examples.square:
        turned = cosine.swapaxes(-1, -2), between.swapaxes(-1, -2)
        sides.append(_sums(*turned, of_rows.transposed(), known_edges))
    described: Mapping[Hashable, Any] = chosen["distance"].attrs or _OF_INPUTS
    return BinnedSums(chosen, examples, known_edges, described, tuple(sides))


def _like_cosines(chosen: xr.Dataset) -> da.Array:
    """Return distances in the blocks of the cosines: (i, j), or (…, i, j) where they differ."""
    cosine, distance = chosen["cosine"], chosen["distance"]
    if distance.ndim > 2:
        missing = [dim for dim in cosine.dims if dim not in distance.dims]
        distance = distance.expand_dims(missing).transpose(*cosine.dims)
    pairs = dict(zip(distance.dims, cosine.data.chunks[-distance.ndim :], strict=True))
    blocks = {dim: size if distance.sizes[dim] > 1 else 1 for dim, size in pairs.items()}
    return distance.chunk(blocks).data


def distance_edges(
    ds: xr.Dataset,
    bins: int = 20,
    *,
    distance: Distance = DISTANCE,
    splits: Splits | None = None,
) -> np.ndarray:
    """Return the edges of equal bins over the distances that occur; they are read at this call.

    Raises:
        DataError: the store has no such distance, or no bin is asked for.
    """
    chosen = select(with_distance(ds, distance), splits)
    return _observed_edges(chosen, bins) if "distance" in chosen else _kept_edges(chosen, None)


def _kept_edges(chosen: xr.Dataset, edges: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Return the edges of the bins that a reduced store keeps.

    Raises:
        DataError: others are asked for.
    """
    kept = np.append(chosen["lower_edge"].values, chosen["upper_edge"].values[-1])
    if edges is not None and not np.array_equal(_checked(edges), kept):
        raise DataError(
            f"edges is {edges!r}, but this store keeps sums in {len(kept) - 1} bins from"
            f" {kept[0]:g} to {kept[-1]:g}, not pairs: leave edges out"
        )
    return np.asarray(kept)


def distance_row_sums(
    ds: xr.Dataset,
    bins: int = 20,
    edges: Sequence[float] | np.ndarray | None = None,
    *,
    distance: Distance = DISTANCE,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Sum cosine and sign of each row's pairs, by relation and distance bin.

    Returns:
        Lazy Dataset with cosine_sum, sign_sum, cosine_pairs and pairs, float64, over leading
        dimensions + (example, relation: within, between; distance_bin). Arguments, bins and
        coordinates are those of `distance_profile`.

    Raises:
        DataError: the store has no such distance, or the edges do not ascend.
    """
    return _of_rows(binned_sums(ds, bins, edges, distance=distance, splits=splits))


def _of_rows(binned: BinnedSums) -> xr.Dataset:
    chosen = binned.chosen
    dims = (*leading_dims(chosen), "example", "relation", "distance_bin")
    kept = {name: c for name, c in chosen.coords.items() if set(c.dims) <= set(dims)}
    whole = in_one_piece(binned.sides[0], len(leading_dims(chosen)))
    return xr.Dataset(
        {name: (dims, whole[..., k]) for k, name in enumerate(SUMS)},
        coords=kept
        | {"relation": as_text(["within", "between"])}
        | bin_coordinates(binned.edges, binned.distance),
        attrs={"splits": chosen.attrs["splits"]},
    )


def _sums(cosine: da.Array, distance: da.Array, labels: Labels, edges: np.ndarray) -> da.Array:
    n_bins = len(edges) - 1
    return da.map_blocks(
        _sums_of_block,
        cosine,
        distance,
        labels=labels,
        edges=edges,
        new_axis=[cosine.ndim, cosine.ndim + 1, cosine.ndim + 2],
        chunks=(*cosine.chunks[:-1], (1,) * cosine.numblocks[-1], (2,), (n_bins,), (len(SUMS),)),
        dtype=np.float64,
        meta=np.empty((0,) * (cosine.ndim + 3)),
    ).sum(axis=cosine.ndim - 1)


def _sums_of_block(
    cosine: np.ndarray, distance: np.ndarray, *, labels: Labels, edges: np.ndarray, block_info: Any
) -> np.ndarray:
    """Sum one block of pairs by row, relation and bin.

    Args:
        cosine: (…, i, j).
        distance: (i, j), or (…, i, j) where checkpoints differ.
        labels: of all rows and columns.
        edges: of the bins, float64.
        block_info: from dask, where the block lies.

    Returns:
        (…, i, 1, r, k, S) float64.
    """
    out = np.empty((*cosine.shape[:-1], 2, len(edges) - 1, len(SUMS)))
    for rows, slab in labels.of_block(block_info).slabs():
        part = cosine[..., rows, :], distance[..., rows, :]
        out[..., rows, :, :, :] = _sums_of_rows(*part, slab, edges)
    return out[..., None, :, :, :]


def _sums_of_rows(
    cosine: np.ndarray, distance: np.ndarray, block: Labels, edges: np.ndarray
) -> np.ndarray:
    """Sum a few rows of a block; return (…, i, r, k, S)."""
    n_bins, (*lead, n_rows, _) = len(edges) - 1, cosine.shape
    zero, self_pair = block.zero_pairs(), block.self_pairs()
    out = np.empty((*lead, n_rows, 2, n_bins, len(SUMS)))
    placed = None
    for at in np.ndindex(*lead):
        if placed is None or distance.ndim > 2:
            of = distance if distance.ndim == 2 else np.broadcast_to(distance, cosine.shape)[at]
            placed = _placed(of, block, self_pair, edges)
        kept, place = placed
        kind = _kind(cosine[at], None if zero is None else zero[at])
        sums = _added(cosine[at], place + kind, kept, size=8 * n_rows * n_bins)
        out[at] = sums.reshape(n_rows, 2, n_bins, len(SUMS))
    return out


def _placed(
    distance: np.ndarray, block: Labels, self_pair: np.ndarray | None, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs (i, j) count, and (row, relation, bin) of each as one integer times 4.

    The kind of pair is added to it for each checkpoint.
    """
    n_bins = len(edges) - 1
    kept = (distance >= edges[0]) & (distance <= edges[-1])  # false where it is NaN
    if self_pair is not None:
        kept &= ~self_pair
    place = _bins(distance, kept, edges)
    np.add(place, n_bins, out=place, where=block.row_groups[:, None] != block.column_groups)
    place += 2 * n_bins * np.arange(len(distance))[:, None]
    place *= 4
    return kept, place


def _kind(cosine: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    kind = np.int8(_NEUTRAL) + (cosine > 0).view(np.int8) - (cosine < 0).view(np.int8)
    return np.asarray(kind if zero is None else np.where(zero, np.int8(_ZERO_GRADIENT), kind))


def _added(cosine: np.ndarray, place: np.ndarray, kept: np.ndarray, *, size: int) -> np.ndarray:
    """Count and add up one checkpoint's pairs by place; return (place without kind, S)."""
    known = kept & np.isfinite(cosine)
    if not known.all():
        cosine, place = cosine[known], place[known]
    cosine, place = cosine.ravel(), place.ravel()
    harms, neutral, helps, zero = np.bincount(place, minlength=size).reshape(-1, 4).T
    totals = np.bincount(place, weights=cosine, minlength=size).reshape(-1, 4).T
    out = np.empty((size // 4, len(SUMS)))
    # Whole columns at a time: sums along an axis of four take as long as the counting.
    out[:, 0] = totals[_HARMS] + totals[_NEUTRAL] + totals[_HELPS]
    out[:, 1] = helps - harms
    out[:, 2] = harms + neutral + helps
    out[:, 3] = out[:, 2] + zero
    return out


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
    distance = _like_cosines(chosen)
    extremes = da.map_blocks(
        _extremes_of_block,
        distance,
        labels=labels(chosen, grouping(chosen, "class_name")),
        new_axis=distance.ndim,
        chunks=(*((1,) * n for n in distance.numblocks), (2,)),
        dtype=np.float64,
        meta=np.empty((0,) * (distance.ndim + 1)),
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
    return np.array([low, high], dtype=np.float64).reshape((1,) * distance.ndim + (2,))


_OF_INPUTS: Mapping[Hashable, Any] = {
    "long_name": "cosine distance of the inputs",
    "units": "1",
    "description": "In [0, 2].",
}


def bin_coordinates(
    edges: np.ndarray, distance: Mapping[Hashable, Any] = _OF_INPUTS
) -> dict[str, xr.DataArray]:
    """Return centre, lower and upper edge of each bin; the centre is named after the distance."""
    units = distance.get("units", "1")
    centre = xr.DataArray(
        (edges[:-1] + edges[1:]) / 2,
        dims="distance_bin",
        attrs={
            "long_name": distance.get("long_name", "distance"),
            "units": units,
            "description": f"Centre of the bin. {distance.get('description', '')}".strip(),
        },
    )
    sides = {"lower_edge": edges[:-1], "upper_edge": edges[1:]}
    return {"distance_bin": centre} | {
        name: xr.DataArray(
            values,
            dims="distance_bin",
            attrs={"long_name": name.replace("_", " ") + " of the distance bin", "units": units},
        )
        for name, values in sides.items()
    }
