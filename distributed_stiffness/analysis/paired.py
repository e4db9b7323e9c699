"""Two stores of the same examples, pair by pair: true against permuted labels, early against late.

The difference of the stiffness of one pair in two networks is again a number for each pair of
examples. Its means have errors by the same jackknife, which so keep what both networks share: the
examples. Errors of two means, taken as independent, would be too wide.
"""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.classes import within_between
from distributed_stiffness.analysis.jackknife import MEASURES
from distributed_stiffness.analysis.pairs import (
    Splits,
    as_text,
    of_either_split,
    with_labels_in_memory,
)
from distributed_stiffness.errors import DataError

_SAME = ("example", "split", "class_name")
_KEPT = ("{}", "{}_error", "{}_gap", "{}_gap_error")


def paired_differences(
    first: xr.Dataset, second: xr.Dataset, *, splits: Splits | None = None
) -> xr.Dataset:
    """Return mean stiffness in the first store minus that in the second, within and between.

    Checkpoints are matched by their coordinates; those that one store alone has are left out. A
    pair with a zero gradient in either is in no cosine mean.

    Args:
        first: a store of pairs, or a selection of its checkpoints.
        second: another, of the same examples in the same order.
        splits: of rows and columns, as in `class_matrix`.

    Returns:
        Lazy Dataset over leading dimensions + (relation: within, between): sign and cosine, in
        [-2, 2], with sign_error and cosine_error; over leading dimensions: sign_gap and cosine_gap,
        the difference of the gaps within - between, with their errors.

    Raises:
        DataError: the stores have other examples, no pairs, or no checkpoint in common.
    """
    first, second = _matched(first, second, splits)
    either_zero = _either_zero(first, second)
    parts = []
    for measure in MEASURES:
        a, b = (
            np.sign(ds["cosine"]) if measure == "sign" else ds["cosine"] for ds in (first, second)
        )
        made = xr.Dataset({"cosine": a - b}, attrs=first.attrs)
        if measure == "cosine" and either_zero is not None:
            made["gradient_norm"] = (~either_zero).astype(np.float64)
        parts.append(_described(within_between(made, splits=splits), measure))
    return xr.merge(parts, compat="override", join="exact", combine_attrs="override")


def paired_curves(
    first: xr.Dataset, second: xr.Dataset, *, splits: Splits | None = None
) -> xr.Dataset:
    """Return mean stiffness in each of two stores, within and between, and their difference.

    Args:
        first: as in `paired_differences`.
        second: as there.
        splits: as there.

    Returns:
        Lazy Dataset over leading dimensions + (relation: within, between): of `within_between`,
        sign and cosine with sign_error and cosine_error along the first dimension `study` (first,
        second); and sign_difference and cosine_difference with their errors, of
        `paired_differences`. Of the checkpoints that both have. The coordinate study_name says
        "true labels", "permuted labels", or the titles.

    Raises:
        DataError: as there.
    """
    differences = paired_differences(first, second, splits=splits)
    kept = [name.format(measure) for measure in MEASURES for name in ("{}", "{}_error")]
    of_each = [within_between(ds, splits=splits)[kept] for ds in _matched(first, second, splits)]
    bare = [
        found.drop_vars([c for c in found.coords if c not in found.indexes]) for found in of_each
    ]
    both = xr.concat(
        bare,
        dim="study",
        coords="minimal",
        compat="override",
        join="inner",
        combine_attrs="override",
    )
    renamed = {
        f"{measure}{end}": f"{measure}_difference{end}"
        for measure in MEASURES
        for end in ("", "_error")
    }
    both = both.assign(differences[list(renamed)].rename(renamed).data_vars)
    return both.assign_coords(
        study=("study", as_text(["first", "second"]), {"long_name": "which store"}),
        study_name=(
            "study",
            as_text(_names(first, second)),
            {"long_name": "what it was trained on"},
        ),
    )


def _matched(
    first: xr.Dataset, second: xr.Dataset, splits: Splits | None
) -> tuple[xr.Dataset, xr.Dataset]:
    """Return both stores at the checkpoints that both have, the examples of either split alone.

    What the others are may differ: where labels are permuted, training examples have other classes.
    """
    for which, ds in (("first", first), ("second", second)):
        if "cosine" not in ds:
            raise DataError(
                f"the {which} store keeps no pairs (no variable cosine): no differences"
            )
    first, second = (of_either_split(with_labels_in_memory(ds), splits) for ds in (first, second))
    for name in (*_SAME, *(f"other_{name}" for name in _SAME[1:]), "other"):
        if (name in first.coords) != (name in second.coords) or (
            name in first.coords and not np.array_equal(first[name].values, second[name].values)
        ):
            raise DataError(
                f"the two stores differ in {name!r}: expected the same examples in the same order,"
                " of the same classes; draw both with one sample_seed and as many examples, and"
                " where labels are permuted take validation pairs"
            )
    kept = [name for name in ("cosine", "gradient_norm") if name in first and name in second]
    a, b = xr.align(first[kept], second[kept], join="inner")
    if a["cosine"].size == 0:
        raise DataError("the two stores have no checkpoint in common: nothing to subtract")
    return a, b


def _names(first: xr.Dataset, second: xr.Dataset) -> tuple[str, str]:
    """Name two studies by their labels, or where these do not tell them apart by their titles."""
    for name in (_labels, lambda ds: str(ds.attrs.get("title", ""))):
        a, b = name(first), name(second)
        if a != b and a and b:
            return a, b
    return "first store", "second store"


def _labels(ds: xr.Dataset) -> str:
    try:
        share = json.loads(ds.attrs["study"])["data"]["permuted_labels"]
    except (KeyError, TypeError, ValueError):  # a store of others
        return ""
    if share == 0:
        return "true labels"
    return "permuted labels" if share == 1 else f"{100 * share:g} % of labels permuted"


def _either_zero(first: xr.Dataset, second: xr.Dataset) -> xr.DataArray | None:
    if "gradient_norm" not in first:
        return None
    a, b = (ds["gradient_norm"].reset_coords(drop=True) == 0 for ds in (first, second))
    return a | b


def _described(found: xr.Dataset, measure: str) -> xr.Dataset:
    kept = found[[name.format("cosine") for name in _KEPT]]
    kept = kept.rename({name.format("cosine"): name.format(measure) for name in _KEPT})
    for name in _KEPT:
        error = "standard error of the " if name.endswith("error") else ""
        gap = "gap (within - between) of " if "gap" in name else ""
        kept[name.format(measure)].attrs = {
            "long_name": f"{error}difference of {gap}{measure} stiffness",
            "units": "1",
            "description": "First store minus second, pair by pair; errors by jackknife over the"
            " examples that both share.",
        }
    return kept
