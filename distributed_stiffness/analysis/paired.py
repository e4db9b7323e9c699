"""Two stores of the same examples, pair by pair: true against permuted labels, early against late.

The difference of the stiffness of one pair in two networks is again a number for each pair of
examples. Its means have errors by the same jackknife, which so keep what both networks share: the
examples. Errors of two means, taken as independent, would be too wide.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.classes import within_between
from distributed_stiffness.analysis.jackknife import MEASURES
from distributed_stiffness.analysis.pairs import Splits
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
    cosines = _matched(first, second)
    either_zero = _either_zero(first, second)
    parts = []
    for measure in MEASURES:
        a, b = (np.sign(c) if measure == "sign" else c for c in cosines)
        made = xr.Dataset({"cosine": a - b}, attrs=first.attrs)
        if measure == "cosine" and either_zero is not None:
            made["gradient_norm"] = (~either_zero).astype(np.float64)
        found = within_between(made, splits=splits)
        parts.append(_described(found, measure))
    return xr.merge(parts, compat="override", join="exact", combine_attrs="override")


def _matched(first: xr.Dataset, second: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    for which, ds in (("first", first), ("second", second)):
        if "cosine" not in ds:
            raise DataError(
                f"the {which} store keeps no pairs (no variable cosine): no differences"
            )
    for name in (*_SAME, *(f"other_{name}" for name in _SAME[1:]), "other"):
        if (name in first.coords) != (name in second.coords) or (
            name in first.coords and not np.array_equal(first[name].values, second[name].values)
        ):
            raise DataError(
                f"the two stores differ in {name!r}: expected the same examples in the same order;"
                " draw both with one sample_seed and as many examples"
            )
    a, b = xr.align(first["cosine"], second["cosine"], join="inner")
    if a.size == 0:
        raise DataError("the two stores have no checkpoint in common: nothing to subtract")
    lead = [dim for dim in b.dims if dim not in ("example", "other")]
    return a, b.drop_vars([name for name in b.coords if name not in lead])


def _either_zero(first: xr.Dataset, second: xr.Dataset) -> xr.DataArray | None:
    if "gradient_norm" not in first or "gradient_norm" not in second:
        return None
    a, b = (ds["gradient_norm"].reset_coords(drop=True) == 0 for ds in (first, second))
    a, b = xr.align(a, b, join="inner")
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
