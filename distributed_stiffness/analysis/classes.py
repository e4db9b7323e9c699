"""Stiffness between classes: the class matrix and its summaries.

Legend of the arrays: i examples in rows, j examples in columns, a and b classes of rows and
columns, S what is kept of each (cosine sum, sign sum, pairs in them). Sums and counts are float64:
counts are whole numbers below 2**53.

Every pair is read once, in one pass over the chunks, and ends in the row sums R[i, b]: enough for
the class matrix, all that follows from it, and its error bars.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.pairs import (
    Grouping,
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
MISSING = {
    "long_name": "ordered pairs not computed yet",
    "units": "1",
    "description": "Ordered pairs that the store has no number for; 0 where it is complete.",
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
    chosen = select(ds, splits)
    return _row_sums(chosen, grouping(chosen, by))


def class_matrix(
    ds: xr.Dataset, by: str = "class_name", *, splits: Splits | None = None
) -> xr.Dataset:
    """Return the class matrix C(a, b) of sign and cosine stiffness.

    C(a, b) is the mean over ordered pairs of an example of class a and another of class b,
    self-pairs left out (Fort et al., arXiv 1901.09491 v3; equation 6 of v1 for the sign form).

    Args:
        ds: a store.
        by: coordinate of examples to group by; its twin `other_<by>` must be there.
        splits: of rows and columns, such as ("train", "validation"); None: validation with
            validation where there are several splits, else the one that there is.

    Returns:
        Lazy Dataset over leading dimensions + (<by>, other_<by>), in class order: sign and cosine
        (float64, NaN where there is no pair), pairs, cosine_pairs and missing (int64).

    Raises:
        DataError: the store lacks what is asked for.
    """
    chosen = select(ds, splits)
    return _means(_totals(chosen, by), ds)


def superclass_matrix(ds: xr.Dataset, *, splits: Splits | None = None) -> xr.Dataset:
    """Return the matrix of stiffness between super-classes; every pair of examples weighs the same.

    It is added up from the sums by class, so that both matrices cost one pass.

    Returns:
        As `class_matrix`, over (superclass_name, other_superclass_name).

    Raises:
        DataError: the store has no super-classes.
    """
    chosen = select(ds, splits)
    above = _superclasses(chosen)
    totals = _totals(chosen, "class_name")
    inside = _membership(above.rows, above.names, "class_name", above.by)
    merged = totals.map(lambda sums: xr.dot(inside, sums, dim="class_name"))
    inside = inside.rename(class_name="other_class_name", superclass_name="other_superclass_name")
    merged = merged.map(lambda sums: xr.dot(sums, inside, dim="other_class_name"))
    merged = merged.transpose(..., "superclass_name", "other_superclass_name")
    return _means(merged.assign_attrs(totals.attrs), ds)


def within_between(ds: xr.Dataset, *, splits: Splits | None = None) -> xr.Dataset:
    """Return mean stiffness within a class and between classes.

    within is the mean over classes of C(a, a); between is the mean over ordered pairs of different
    classes of C(a, b) (S_between of Fort et al., v3): every class weighs the same, whatever its
    number of examples. The variables that end in `_over_pairs` are means over all pairs of
    examples instead. Both agree where the classes are of one size.

    Returns:
        Lazy Dataset over leading dimensions + (relation: within, between): sign, cosine,
        sign_over_pairs, cosine_over_pairs (float64), pairs, cosine_pairs and missing (int64).

    Raises:
        DataError: the store lacks what is asked for.
    """
    chosen = select(ds, splits)
    totals = _totals(chosen, "class_name")
    matrix = _means(totals, ds)
    same = matrix["class_name"] == matrix["other_class_name"]
    parts = [_related(totals, matrix, mask) for mask in (same, ~same)]
    result = xr.concat(parts, dim="relation").transpose(..., "relation")
    result = result.assign_coords(_relation_coordinate("within", "between"))
    return result.assign_coords(checkpoint_coordinates(ds)).assign_attrs(matrix.attrs)


def superclass_contrast(matrix: xr.Dataset) -> xr.Dataset:
    """Return mean stiffness between different classes of one super-class, and across super-classes.

    A difference above 0 means that a network finds super-classes that no label tells it of (Fort et
    al., v1 and v3, on CIFAR-100).

    Args:
        matrix: of `class_matrix`, from a store with super-classes.

    Returns:
        Dataset over leading dimensions + (relation: same_superclass, other_superclass): sign and
        cosine, means over ordered pairs of different classes.

    Raises:
        DataError: the class matrix has no super-classes.
    """
    if "superclass_name" not in matrix.coords:
        raise DataError("the class matrix has no super-classes: its data set has none")
    different = matrix["class_name"] != matrix["other_class_name"]
    same = matrix["superclass_name"] == matrix["other_superclass_name"]
    parts = [
        _class_means(matrix, different & mask, weight="every pair of classes alike")
        for mask in (same, ~same)
    ]
    result = xr.concat(parts, dim="relation").transpose(..., "relation")
    return result.assign_coords(_relation_coordinate("same_superclass", "other_superclass"))


def _row_sums(chosen: xr.Dataset, groups: Grouping) -> xr.Dataset:
    lead, cosine = leading_dims(chosen), chosen["cosine"].data
    # Labels go in whole and each block cuts its own: as dask arrays, shared by all blocks, they
    # made dask hold a hundred blocks' sums at a time instead of ten.
    sums = da.map_blocks(
        _sums_of_block,
        cosine,
        labels=labels(chosen, groups),
        n_groups=len(groups),
        new_axis=[cosine.ndim, cosine.ndim + 1],
        chunks=(*cosine.chunks[:-1], (1,) * cosine.numblocks[-1], (len(groups),), (len(SUMS),)),
        dtype=np.float64,
        meta=np.empty((0,) * (cosine.ndim + 2)),
    ).sum(axis=cosine.ndim - 1)
    dims = (*lead, "example", f"other_{groups.by}")
    kept = {name: c for name, c in chosen.coords.items() if set(c.dims) <= {*lead, "example"}}
    result = xr.Dataset(
        {name: (dims, sums[..., k]) for k, name in enumerate(SUMS)},
        coords=kept | {f"other_{groups.by}": groups.names},
        attrs={"splits": chosen.attrs["splits"]},
    ).drop_vars("row_identity")
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
    block = labels.of_block(block_info)
    out = np.zeros((*cosine.shape[:-1], 1, n_groups, len(SUMS)))
    for rows, slab in block.slabs():
        _add_rows(out[..., rows, 0, :, :], cosine[..., rows, :], slab)
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


def _totals(chosen: xr.Dataset, by: str) -> xr.Dataset:
    """Add row sums over the rows of each group: sums over (…, <by>, other_<by>), and `possible`."""
    groups = grouping(chosen, by)
    sums = _row_sums(chosen, groups)
    member = _membership(groups.rows, groups.names, "example", by)
    totals = sums[list(SUMS)].map(lambda column: xr.dot(member, column, dim="example"))
    totals = totals.transpose(..., by, f"other_{by}")
    totals["possible"] = ((by, f"other_{by}"), _possible_pairs(chosen, groups))
    above = _superclass_of(chosen, groups)
    return totals.assign_coords(above).assign_attrs(sums.attrs)


def _membership(codes: np.ndarray, names: np.ndarray, dim: str, by: str) -> xr.DataArray:
    """Return 1 where an element of `dim` is in a group, else 0."""
    one_hot = (codes[:, None] == np.arange(len(names))).astype(np.float64)
    return xr.DataArray(one_hot, dims=(dim, by), coords={by: names})


def _possible_pairs(chosen: xr.Dataset, groups: Grouping) -> np.ndarray:
    """Count the ordered pairs that there are when nothing is missing; float64, exact."""
    n = len(groups)
    counts = np.outer(
        np.bincount(groups.rows, minlength=n), np.bincount(groups.columns, minlength=n)
    )
    place = {identity: j for j, identity in enumerate(chosen["column_identity"].values.tolist())}
    for i, identity in enumerate(chosen["row_identity"].values.tolist()):
        if identity in place:
            counts[groups.rows[i], groups.columns[place[identity]]] -= 1
    return counts.astype(np.float64)


def _superclasses(chosen: xr.Dataset) -> Grouping:
    """Return the super-class of each class, as a grouping of classes."""
    examples = grouping(chosen, "superclass_name")
    classes = grouping(chosen, "class_name")
    above = np.zeros(len(classes), dtype=np.int64)
    above[classes.columns], above[classes.rows] = examples.columns, examples.rows
    consistent = (above[classes.rows] == examples.rows).all()
    if not (consistent and (above[classes.columns] == examples.columns).all()):
        raise DataError(
            "a class lies in two super-classes: use class_matrix(ds, by='superclass_name')"
        )
    return Grouping(by=examples.by, names=examples.names, rows=above, columns=above)


def _superclass_of(chosen: xr.Dataset, groups: Grouping) -> dict[str, tuple[str, np.ndarray]]:
    """Return the super-class of each class as coordinates, where there are super-classes."""
    if groups.by != "class_name" or "superclass_name" not in chosen.coords:
        return {}
    above = _superclasses(chosen)
    known = {"superclass": above.rows, "superclass_name": above.names[above.rows]}
    return {name: ("class_name", values) for name, values in known.items()} | {
        f"other_{name}": ("other_class_name", values) for name, values in known.items()
    }


def _means(totals: xr.Dataset, ds: xr.Dataset) -> xr.Dataset:
    """Turn sums into means and counts, with the coordinates of the checkpoints."""
    result = xr.Dataset(
        {
            "cosine": _ratio(totals["cosine_sum"], totals["cosine_pairs"]),
            "sign": _ratio(totals["sign_sum"], totals["pairs"]),
            "pairs": totals["pairs"].astype(np.int64),
            "cosine_pairs": totals["cosine_pairs"].astype(np.int64),
            "missing": (totals["possible"] - totals["pairs"]).astype(np.int64),
        },
        attrs=origin(ds) | totals.attrs,
    ).transpose(*totals["pairs"].dims)
    return _described(result).assign_coords(checkpoint_coordinates(ds))


def _ratio(sums: xr.DataArray, pairs: xr.DataArray) -> xr.DataArray:
    return sums / pairs.where(pairs > 0)


def _described(result: xr.Dataset) -> xr.Dataset:
    described = {
        "cosine": COSINE,
        "sign": SIGN,
        "pairs": PAIRS,
        "cosine_pairs": COSINE_PAIRS,
        "missing": MISSING,
    }
    for name in result.data_vars:
        result[name].attrs = dict(described[str(name)])
    return result


def _related(totals: xr.Dataset, matrix: xr.Dataset, mask: xr.DataArray) -> xr.Dataset:
    result = _class_means(matrix, mask, weight="every class, or pair of classes, alike")
    classes = ["class_name", "other_class_name"]
    sums = totals.where(mask, 0.0).sum(classes)
    for name, attrs in (("cosine", COSINE), ("sign", SIGN)):
        pairs = sums["cosine_pairs" if name == "cosine" else "pairs"]
        pooled = _ratio(sums[f"{name}_sum"], pairs)
        result[f"{name}_over_pairs"] = pooled.assign_attrs(
            attrs, long_name=f"{attrs['long_name']}, mean over pairs", weight="every pair alike"
        )
    counts = {name: matrix[name].where(mask, 0).sum(classes).astype(np.int64) for name in _COUNTS}
    return result.assign(
        {name: counts[name].assign_attrs(matrix[name].attrs) for name in _COUNTS}
    ).drop_vars([name for name in result.coords if name not in result.indexes])


_COUNTS = ("pairs", "cosine_pairs", "missing")


def _class_means(matrix: xr.Dataset, mask: xr.DataArray, *, weight: str) -> xr.Dataset:
    """Average the cells of a class matrix that are in `mask` and have pairs."""
    means = {
        name: matrix[name]
        .where(mask)
        .mean(["class_name", "other_class_name"], skipna=True)
        .assign_attrs(matrix[name].attrs, weight=weight)
        for name in ("cosine", "sign")
    }
    return xr.Dataset(means)


def _relation_coordinate(*names: str) -> dict[str, xr.DataArray]:
    values = np.empty(len(names), dtype=object)
    values[:] = names
    attrs = {"long_name": "relation of the two examples' classes"}
    return {"relation": xr.DataArray(values, dims="relation", attrs=attrs)}
