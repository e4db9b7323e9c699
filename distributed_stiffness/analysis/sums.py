"""Sums of pairs by row and group: each pair is read once, and all that follows is made from these.

Legend of the arrays: i examples in rows, j examples in columns, S what is kept of each (cosine sum,
sign sum, pairs in them). Sums and counts are float64: counts are whole numbers below 2**53.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.jackknife import (
    Examples,
    Statistic,
    examples_of,
    leave_one_out,
)
from distributed_stiffness.analysis.pairs import (
    CLASS_SUMS,
    Grouping,
    Labels,
    Splits,
    grouping,
    labels,
    leading_dims,
    select,
)
from distributed_stiffness.errors import DataError

SUMS = ("cosine_sum", "sign_sum", "cosine_pairs", "pairs")

COSINE = {
    "long_name": "cosine stiffness",
    "units": "1",
    "description": "Mean of cos(g_i, g_j) over pairs, in [-1, 1]: above 0 where a small gradient"
    " step on one example lowers the loss of the other, on average. Pairs with a zero gradient are"
    " left out.",
}
SIGN = {
    "long_name": "sign stiffness",
    "units": "1",
    "description": "Mean of sign(g_i.g_j) over pairs, in [-1, 1]: the share of pairs that help each"
    " other minus the share that harm each other.",
}
PAIRS = {
    "long_name": "ordered pairs counted",
    "units": "1",
    "description": "Ordered pairs (i, j) in the sign means; 0 or more. Self-pairs and pairs that"
    " are not computed yet are left out.",
}
COSINE_PAIRS = {
    "long_name": "ordered pairs in the cosine means",
    "units": "1",
    "description": "As pairs, without those where a gradient is zero; 0 or more.",
}


def row_sums(ds: xr.Dataset, by: str = "class_name", *, splits: Splits | None = None) -> xr.Dataset:
    """Sum cosine and sign of each row's pairs, by the class of the other example.

    Self-pairs and missing pairs (NaN) are in no sum and no count. A pair with a zero gradient has
    sign 0 and is left out of the cosines. The chunks are read once.

    Args:
        ds: a store.
        by: coordinate of examples to group columns by; its twin `other_<by>` must be there.
        splits: of rows and columns, as in `class_matrix`.

    Returns:
        Lazy Dataset with cosine_sum, sign_sum, cosine_pairs and pairs, float64, over the store's
        leading dimensions + (example, other_<by>).

    Raises:
        DataError: the store lacks what is asked for.
    """
    return of_rows(grouped_sums(select(ds, splits), by))


@dataclass(frozen=True)
class GroupedSums:
    """A selection's sums by example and group, not computed yet."""

    chosen: xr.Dataset
    groups: Grouping
    examples: Examples
    # Of rows (lead…, N, group, S), and of columns (lead…, M, group, S) where these are others.
    sides: tuple[da.Array, ...]

    def leave_one_out(self, statistic: Statistic, dims: Mapping[str, int]) -> xr.DataArray:
        """Apply a function of each example's sums: see `jackknife.leave_one_out`."""
        lead = leading_dims(self.chosen)
        return leave_one_out(statistic, self.examples, self.sides, lead, dims)


def grouped_sums(chosen: xr.Dataset, by: str) -> GroupedSums:
    """Sum the pairs of each row, and of each column where columns are not the rows, by group."""
    groups = grouping(chosen, by)
    examples = examples_of(chosen, groups)
    if "cosine" not in chosen:
        return GroupedSums(chosen, groups, examples, _kept_sums(chosen, groups, examples))
    cosine, of_rows = chosen["cosine"].data, labels(chosen, groups)
    sides = [_sums(cosine, of_rows, len(groups))]
    if not examples.square:
        sides.append(_sums(cosine.swapaxes(-1, -2), of_rows.transposed(), len(groups)))
    return GroupedSums(chosen, groups, examples, tuple(sides))


def _kept_sums(chosen: xr.Dataset, groups: Grouping, examples: Examples) -> tuple[da.Array, ...]:
    """Add up sums by class, which a reduced store keeps, to sums by group."""
    inside = membership(chosen, groups)
    sides = ["row"] if examples.square else ["row", "column"]
    return tuple(
        da.einsum("...cs,cg->...gs", chosen[f"{side}_{CLASS_SUMS}"].data, inside) for side in sides
    )


def membership(chosen: xr.Dataset, groups: Grouping) -> np.ndarray:
    """Return which class of a store of sums is in which group, (classes, groups), 0 or 1.

    Raises:
        DataError: a class lies in several groups.
    """
    classes = grouping(chosen, "class_name")
    group_of = np.full(len(classes), -1)
    group_of[classes.rows], group_of[classes.columns] = groups.rows, groups.columns
    if not (
        (group_of[classes.rows] == groups.rows).all()
        and (group_of[classes.columns] == groups.columns).all()
    ):
        raise DataError(
            f"cannot group by {groups.by!r}: this store keeps sums by class, not pairs, and a class"
            f" lies in several of these groups"
        )
    kept = chosen["class_of_other"].values.astype(str).tolist()
    inside = np.zeros((len(kept), len(groups)))
    for name, group in zip(classes.names.tolist(), group_of, strict=True):
        inside[kept.index(str(name)), group] = 1
    return inside


def _sums(cosine: da.Array, labels: Labels, n_groups: int) -> da.Array:
    # Labels go in whole and each block cuts its own: as dask arrays, shared by all blocks, they
    # made dask hold a hundred blocks' sums at a time instead of ten.
    return da.map_blocks(
        _sums_of_block,
        cosine,
        labels=labels,
        n_groups=n_groups,
        new_axis=[cosine.ndim, cosine.ndim + 1],
        chunks=(*cosine.chunks[:-1], (1,) * cosine.numblocks[-1], (n_groups,), (len(SUMS),)),
        dtype=np.float64,
        meta=np.empty((0,) * (cosine.ndim + 2)),
    ).sum(axis=cosine.ndim - 1)


def in_one_piece(of_examples: da.Array, axis: int) -> da.Array:
    """Put numbers of examples into one chunk: those of a split may not be cut as Zarr cuts."""
    return of_examples.rechunk({axis: -1})


def of_rows(sums: GroupedSums) -> xr.Dataset:
    """Return the sums of rows as a described Dataset."""
    chosen, other = sums.chosen, f"other_{sums.groups.by}"
    dims = (*leading_dims(chosen), "example", other)
    kept = {name: c for name, c in chosen.coords.items() if set(c.dims) <= set(dims)}
    whole = in_one_piece(sums.sides[0], len(leading_dims(chosen)))
    result = xr.Dataset(
        {name: (dims, whole[..., k]) for k, name in enumerate(SUMS)},
        coords=kept | {other: sums.groups.names},
        attrs={"splits": chosen.attrs["splits"]},
    )
    return _described_sums(result)


def _described_sums(result: xr.Dataset) -> xr.Dataset:
    result["cosine_sum"].attrs = _summed(COSINE)
    result["sign_sum"].attrs = _summed(SIGN)
    result["cosine_pairs"].attrs = COSINE_PAIRS
    result["pairs"].attrs = PAIRS
    return result


def _summed(attrs: dict[str, str]) -> dict[str, str]:
    name = attrs["long_name"]
    return {
        "long_name": f"sum of {name}",
        "units": "1",
        "description": f"{name.capitalize()} of each pair in the row, added up; its size is at most"
        " the number of pairs.",
    }


def _sums_of_block(
    cosine: np.ndarray, *, labels: Labels, n_groups: int, block_info: Any
) -> np.ndarray:
    """Sum one block of pairs over the columns of each group.

    Returns:
        (…, i, 1, n_groups, S) float64.
    """
    sums = sums_of_pairs(cosine, labels.of_block(block_info), n_groups)
    return sums[..., None, :, :]


def sums_of_pairs(cosine: np.ndarray, labels: Labels, n_groups: int) -> np.ndarray:
    """Sum pairs (…, i, j) over the columns of each group; return (…, i, n_groups, S) float64."""
    out = np.zeros((*cosine.shape[:-1], n_groups, len(SUMS)))
    for rows, slab in labels.slabs():
        _add_rows(out[..., rows, :, :], cosine[..., rows, :], slab)
    return out


def _add_rows(out: np.ndarray, cosine: np.ndarray, block: Labels) -> None:
    """Fill `out` (…, i, n_groups, S) with the sums of a few rows.

    Sorting the columns and adding each run costs the same for any number of groups; products with
    one-hot columns cost twice as much at 100 groups, and more beyond, and in float32 they would
    round the sums.
    """
    order = np.argsort(block.column_groups, kind="stable")
    present, starts = np.unique(block.column_groups[order], return_index=True)

    def added(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.add.reduceat(values, starts, axis=-1, dtype=np.float64))

    known = np.isfinite(cosine)
    if (self_pair := block.self_pairs()) is not None:
        known &= ~self_pair
    cosine = cosine[..., order]
    everything = known.all()
    if not everything:
        known = known[..., order]
        cosine = np.where(known, cosine, np.float32(0))
    pairs = np.diff(starts, append=len(order)) if everything else added(known)
    sign = (cosine > 0).view(np.int8) - (cosine < 0).view(np.int8)
    out[..., present, 1] = added(sign)
    out[..., present, 3] = pairs
    if (zero := block.zero_pairs()) is not None:
        nonzero = ~zero[..., order]
        cosine = np.where(nonzero, cosine, np.float32(0))
        pairs = added(known & nonzero)
    out[..., present, 0] = added(cosine)
    out[..., present, 2] = pairs
