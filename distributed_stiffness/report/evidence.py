"""Why the numbers of a store can be trusted, and how to see for oneself."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness import data
from distributed_stiffness.analysis import Summary
from distributed_stiffness.attributes import decoded
from distributed_stiffness.certainty import allowed_error, decides_nothing
from distributed_stiffness.figures.checkpoints import RUN, Names, with_run_dims
from distributed_stiffness.report.words import bound, counted, percent


def evidence(numbers: Summary) -> dict[str, str]:
    """Return what was checked and what came of it, a sentence each."""
    curves, names = with_run_dims(numbers.curves), Names.of(numbers.curves)
    attrs = decoded(numbers.attrs)
    said = {
        "Error bound of a cosine": _error_bound(curves, names),
        "Undecided signs": _undecided(curves, names),
        "All pairs at once": _whole_matrix(attrs.get("whole_matrix_check"), names),
        "Gradients of zero": _zero_gradients(curves, int(numbers.sizes["example"])),
        "Missing pairs": _missing(numbers.class_matrix),
        "Files of the data": _files(attrs),
    }
    return {name: text for name, text in said.items() if text}


def uncertain(numbers: Summary) -> list[str]:
    """Warn of each checkpoint whose error bound is above what is allowed, in a line."""
    curves, names = with_run_dims(numbers.curves), Names.of(numbers.curves)
    if "error_bound" not in curves:
        return []
    allowed = allowed_error(_precision(numbers.attrs))
    overridden = " It was let pass (--allow-error)." if numbers.attrs.get("allow_error") else ""
    values = curves["error_bound"].transpose(*RUN)
    lines = []
    for place in np.argwhere((values > allowed).values):
        at = values.isel(dict(zip(RUN, place.tolist(), strict=True)))
        where = names.place(at.coords)
        lines.append(
            f"WARNING: the error bound of a cosine{' at ' * bool(where)}{where} is"
            f" {bound(float(at))}, above the {allowed:g} that is allowed: cosines and signs, and"
            f" what follows from them, may be wrong there.{overridden}"
        )
    return lines


def _precision(attrs: Mapping[Hashable, Any]) -> str:
    try:
        return str(json.loads(attrs["study"])["gradients"]["precision"])
    except (KeyError, TypeError, ValueError):  # a store of others
        return ""


def _error_bound(curves: xr.Dataset, names: Names) -> str:
    if "error_bound" not in curves or not curves["error_bound"].notnull().any():
        return "not determined yet"
    values = curves["error_bound"]
    worst = values.isel(values.fillna(-1.0).argmax(...))
    text = bound(float(worst))
    if values.size > 1:
        text = (
            f"at most {text} ({names.place(worst.coords)}), median {bound(float(values.median()))}"
        )
    return (
        f"{text}: the largest difference from one-example float64 gradients over a sample of"
        f" pairs, times a margin{_unchecked(values)}."
    )


def undecided_share(curves: xr.Dataset) -> xr.DataArray | None:
    """Return the share of pairs whose sign is open; None where nothing is known of signs."""
    share = curves.get("undecided_share")
    if share is None or not share.notnull().any():
        return None
    none_counted = float(share.max()) == 0
    return None if none_counted and decides_nothing(float(curves["error_bound"].max())) else share


def _undecided(curves: xr.Dataset, names: Names) -> str:
    if (share := undecided_share(curves)) is None:
        return ""
    worst = share.isel(share.fillna(-1.0).argmax(...))
    if float(worst) == 0:
        return f"none: no cosine lies within its error bound of 0{_unchecked(share)}."
    n = int(curves["undecided"].sel({dim: worst[dim] for dim in share.dims}))
    most, where = "", ""
    if share.size > 1:
        most, where = " at most", f", {names.place(worst.coords)}"
    return (
        f"{counted(n, 'pair', 'pairs')}{most} ({percent(float(worst))} of all{where}): their cosine"
        f" lies within its error bound of 0{_unchecked(share)}."
    )


def _unchecked(values: xr.DataArray) -> str:
    n = int(values.isnull().sum())
    return f"; {counted(n, 'checkpoint is', 'checkpoints are')} not checked yet" if n else ""


def _whole_matrix(check: Any, names: Names) -> str:
    if not isinstance(check, Mapping):
        return "not compared yet; it is done once the last checkpoint is complete."
    where = names.place(check)
    return (
        f"{f'at one checkpoint ({where}) ' if where else ''}the mean cosines of"
        f" {counted(check['classes'], 'class', 'classes')}"
        f" ({counted(check['examples'], 'example', 'examples')}) over all stored pairs are within"
        f" {bound(check['largest_difference'])} of those from sums of float64 gradients, which need"
        " no pairs."
    )


def _zero_gradients(curves: xr.Dataset, n: int) -> str:
    if "zero_gradients" not in curves:
        return ""
    worst = int(curves["zero_gradients"].max())
    return f"{worst:,} of {n:,} examples at most." if worst else "none."


def _missing(matrix: xr.Dataset) -> str:
    missing, pairs = int(matrix["missing"].sum()), int(matrix["pairs"].sum())
    if not missing:
        one = with_run_dims(matrix)["missing"].isel(class_name=0, other_class_name=0).size == 1
        return f"none: the matrix is complete{'' if one else ' at every checkpoint'}."
    return f"{missing:,} ({percent(missing / (missing + pairs))}) are not computed yet."


def _files(attrs: Mapping[str, Any]) -> str:
    """Say whether files are the published ones, of data that are published."""
    if attrs.get("dataset") not in data.NAMES or "dataset_verified" not in attrs:
        return ""
    return f"{'have' if attrs['dataset_verified'] else 'do not have'} the published checksums."
