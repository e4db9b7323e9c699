"""Stiffness between classes: the class matrix and its means, each with its standard error.

Everything here follows from the row sums R[i, b] of one pass over the pairs (`sums`).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.cells import (
    cell_errors,
    group_totals,
    mean_errors,
    pooled_errors,
)
from distributed_stiffness.analysis.identities import COLUMN_IDENTITY, ROW_IDENTITY, occurrences
from distributed_stiffness.analysis.jackknife import MEASURES, error_attrs
from distributed_stiffness.analysis.pairs import (
    Grouping,
    Splits,
    as_text,
    checkpoint_coordinates,
    grouping,
    origin,
    select,
)
from distributed_stiffness.analysis.sums import (
    COSINE,
    COSINE_PAIRS,
    PAIRS,
    SIGN,
    SUMS,
    GroupedSums,
    grouped_sums,
)
from distributed_stiffness.errors import DataError

MISSING = {
    "long_name": "ordered pairs not computed yet",
    "units": "1",
    "description": "Ordered pairs that the store has no number for; 0 where it is complete.",
}
_COUNTS = ("pairs", "cosine_pairs", "missing")
_ATTRS = {
    "cosine": COSINE,
    "sign": SIGN,
    "pairs": PAIRS,
    "cosine_pairs": COSINE_PAIRS,
    "missing": MISSING,
}
HANGS_ON = "there is no pair without one of the examples"


def class_matrix(
    ds: xr.Dataset, by: str = "class_name", *, splits: Splits | None = None
) -> xr.Dataset:
    """Return the class matrix C(a, b) of sign and cosine stiffness, with standard errors.

    C(a, b) is the mean over ordered pairs of an example of class a and another of class b,
    self-pairs left out (Fort et al., arXiv 1901.09491 v3; equation 6 of v1 for the sign form).
    Errors are by jackknife over examples, each class a sample of its own.

    Args:
        ds: a store.
        by: coordinate of examples to group by; its twin `other_<by>` must be there.
        splits: of rows and columns, such as ("train", "validation"); None: validation with
            validation where there are several splits, else the one that there is.

    Returns:
        Lazy Dataset over leading dimensions + (<by>, other_<by>), in class order: sign and cosine
        (float64, NaN where there is no pair), sign_error and cosine_error (float64, NaN where one
        example's absence leaves no pair: fewer than three examples within a class, or one example
        of a class between two), pairs, cosine_pairs and missing (int64).

    Raises:
        DataError: the store lacks what is asked for.
    """
    sums = grouped_sums(select(ds, splits), by)
    size = len(sums.groups)
    errors = sums.leave_one_out(
        partial(cell_errors, sums.examples), {by: size, f"other_{by}": size, "measure": 2}
    )
    return cell_means(cell_totals(sums), errors, ds)


def within_between(ds: xr.Dataset, *, splits: Splits | None = None) -> xr.Dataset:
    """Return mean stiffness within a class and between classes, and the gap, with standard errors.

    within is the mean over classes of C(a, a); between is the mean over ordered pairs of different
    classes of C(a, b) (S_between of Fort et al., v3): every class weighs the same, whatever its
    number of examples. The variables that end in `_over_pairs` are means over all pairs of
    examples instead. Both agree where the classes are of one size. gap is within - between; its
    error is not that of two independent means, since both are of the same examples.

    Returns:
        Lazy Dataset over leading dimensions + (relation: within, between): sign, cosine,
        sign_over_pairs, cosine_over_pairs (float64), pairs, cosine_pairs and missing (int64); over
        leading dimensions: sign_gap and cosine_gap (float64). Each mean and gap has its standard
        error, such as sign_error, sign_over_pairs_error and sign_gap_error: NaN where it hangs on
        one example, as in `class_matrix`.

    Raises:
        DataError: the store lacks what is asked for.
    """
    sums = grouped_sums(select(ds, splits), "class_name")
    totals = cell_totals(sums)
    matrix = cell_means(totals, None, ds)
    same = matrix["class_name"] == matrix["other_class_name"]
    parts = [_related(totals, matrix, mask) for mask in (same, ~same)]
    result = xr.concat(parts, dim="relation").transpose(..., "relation")
    masks = (same.values, ~same.values)
    result = with_mean_errors(result, sums, masks, difference="gap", text="within - between")
    pooled = sums.leave_one_out(
        partial(pooled_errors, sums.examples), {"relation": 2, "measure": 2}
    )
    result = with_errors(result, pooled, [f"{measure}_over_pairs" for measure in MEASURES])
    result = result.assign_coords(relation_coordinate("within", "between"))
    return result.assign_coords(checkpoint_coordinates(ds)).assign_attrs(matrix.attrs)


def with_mean_errors(
    result: xr.Dataset,
    sums: GroupedSums,
    masks: tuple[np.ndarray, np.ndarray],
    *,
    difference: str,
    text: str,
) -> xr.Dataset:
    """Add errors of the means over two sets of cells, and their difference with its error.

    Args:
        result: with sign and cosine over (relation: first set, second set).
        sums: that they are made of.
        masks: which cells (C, C) are in each set.
        difference: name of the difference.
        text: what it is.
    """
    errors = sums.leave_one_out(
        partial(mean_errors, masks, sums.examples), {"relation": 3, "measure": 2}
    )
    result = result.assign(differences(result, difference, text))
    result = with_errors(result, errors.isel(relation=slice(2)), MEASURES)
    return with_errors(
        result, errors.isel(relation=2), [f"{measure}_{difference}" for measure in MEASURES]
    )


def differences(result: xr.Dataset, name: str, text: str) -> dict[str, xr.DataArray]:
    """Return the first relation's mean minus the second's, described."""
    return {
        f"{measure}_{name}": (
            result[measure].isel(relation=0) - result[measure].isel(relation=1)
        ).assign_attrs(
            long_name=f"{name} of {measure} stiffness",
            units="1",
            description=f"{text}, in [-2, 2].",
        )
        for measure in MEASURES
    }


def with_errors(
    result: xr.Dataset, errors: xr.DataArray, names: tuple[str, ...] | list[str]
) -> xr.Dataset:
    """Add NAME_error to each variable, from errors over (…, measure)."""
    return result.assign(
        {
            f"{name}_error": errors.isel(measure=k).assign_attrs(
                error_attrs(result[name].attrs, HANGS_ON)
            )
            for k, name in enumerate(names)
        }
    )


def cell_totals(sums: GroupedSums) -> xr.Dataset:
    """Add row sums over the rows of each group: sums over (…, <by>, other_<by>), and `possible`."""
    groups, size = sums.groups, len(sums.groups)
    by, other = groups.by, f"other_{groups.by}"
    added = sums.leave_one_out(
        partial(group_totals, sums.examples), {by: size, other: size, "sum": len(SUMS)}
    )
    totals = xr.Dataset({name: added.isel(sum=k) for k, name in enumerate(SUMS)})
    totals["possible"] = ((by, other), _possible_pairs(sums.chosen, groups))
    totals = totals.assign_coords({by: groups.names, other: groups.names})
    above = _superclass_of(sums.chosen, groups)
    return totals.assign_coords(above).assign_attrs(splits=sums.chosen.attrs["splits"])


def membership(codes: np.ndarray, names: np.ndarray, dim: str, by: str) -> xr.DataArray:
    """Return 1 where an element of `dim` is in a group, else 0."""
    one_hot = (codes[:, None] == np.arange(len(names))).astype(np.float64)
    return xr.DataArray(one_hot, dims=(dim, by), coords={by: names})


def _possible_pairs(chosen: xr.Dataset, groups: Grouping) -> np.ndarray:
    """Count the ordered pairs that there are when nothing is missing; float64, exact."""
    rows, columns = (np.bincount(of, minlength=len(groups)) for of in (groups.rows, groups.columns))
    counts = np.outer(rows, columns)
    own = occurrences(chosen[ROW_IDENTITY].values, chosen[COLUMN_IDENTITY].values)
    np.subtract.at(counts, (groups.rows, groups.rows), own)
    return counts.astype(np.float64)


def superclasses_of_classes(chosen: xr.Dataset) -> Grouping:
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
    above = superclasses_of_classes(chosen)
    known = {"superclass": above.rows, "superclass_name": above.names[above.rows]}
    return {name: ("class_name", values) for name, values in known.items()} | {
        f"other_{name}": ("other_class_name", values) for name, values in known.items()
    }


def cell_means(totals: xr.Dataset, errors: xr.DataArray | None, ds: xr.Dataset) -> xr.Dataset:
    """Turn sums into means and counts, with errors and the coordinates of the checkpoints."""
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
    for name in result.data_vars:
        result[name].attrs = dict(_ATTRS[str(name)])
    if errors is not None:
        result = with_errors(result, errors, MEASURES)
    return result.assign_coords(checkpoint_coordinates(ds))


def _ratio(sums: xr.DataArray, pairs: xr.DataArray) -> xr.DataArray:
    return sums / pairs.where(pairs > 0)


def _related(totals: xr.Dataset, matrix: xr.Dataset, mask: xr.DataArray) -> xr.Dataset:
    result = class_means(matrix, mask, weight="every class, or pair of classes, alike")
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


def class_means(matrix: xr.Dataset, mask: xr.DataArray, *, weight: str) -> xr.Dataset:
    """Average the cells of a class matrix that are in `mask` and have pairs."""
    means = {
        name: matrix[name]
        .where(mask)
        .mean(["class_name", "other_class_name"], skipna=True)
        .assign_attrs(matrix[name].attrs, weight=weight)
        for name in ("cosine", "sign")
    }
    return xr.Dataset(means)


def relation_coordinate(*names: str) -> dict[str, xr.DataArray]:
    """Return the coordinate that names the relations."""
    attrs = {"long_name": "relation of the two examples' classes"}
    return {"relation": xr.DataArray(as_text(names), dims="relation", attrs=attrs)}
