"""Why the numbers of a store can be trusted, and how to see for oneself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from distributed_stiffness.analysis import Summary
from distributed_stiffness.figures.checkpoints import rate_title, with_run_dims
from distributed_stiffness.report.words import bound, counted, percent


def evidence(numbers: Summary) -> dict[str, str]:
    """Return what was checked and what came of it, a sentence each."""
    curves = with_run_dims(numbers.curves)
    said = {
        "Error bound of a cosine": _error_bound(curves),
        "Undecided signs": _undecided(curves),
        "All pairs at once": _whole_matrix(numbers.attrs.get("whole_matrix_check")),
        "Gradients of zero": _zero_gradients(curves, int(numbers.sizes["example"])),
        "Missing pairs": _missing(numbers.class_matrix),
        "Files of the data": _files(numbers.attrs.get("dataset_verified")),
    }
    return {name: text for name, text in said.items() if text}


def _error_bound(curves: xr.Dataset) -> str:
    if "error_bound" not in curves or not curves["error_bound"].notnull().any():
        return "not determined yet"
    values = curves["error_bound"]
    worst = values.isel(values.fillna(-1.0).argmax(...))
    return (
        f"at most {bound(float(worst))} ({_place(worst)}), median"
        f" {bound(float(values.median()))}: five times the largest difference from one-example"
        f" float64 gradients over a sample of pairs{_unchecked(values)}."
    )


def _undecided(curves: xr.Dataset) -> str:
    if "undecided_share" not in curves or not curves["undecided_share"].notnull().any():
        return ""
    share = curves["undecided_share"]
    worst = share.isel(share.fillna(-1.0).argmax(...))
    if float(worst) == 0:
        return f"none: no cosine lies within its error bound of 0{_unchecked(share)}."
    n = int(curves["undecided"].sel({dim: worst[dim] for dim in share.dims}))
    return (
        f"{counted(n, 'pair', 'pairs')} at most ({percent(float(worst))} of all, {_place(worst)}):"
        f" their cosine lies within its error bound of 0{_unchecked(share)}."
    )


def _unchecked(values: xr.DataArray) -> str:
    n = int(values.isnull().sum())
    return f"; {counted(n, 'checkpoint is', 'checkpoints are')} not checked yet" if n else ""


def _whole_matrix(check: Any) -> str:
    if not isinstance(check, Mapping):
        return "not compared yet; it is done once the last checkpoint is complete."
    at = f"{rate_title(check['learning_rate'])}, seed {check['seed']}, step {check['iteration']:,}"
    return (
        f"at one checkpoint ({at}) the mean cosines of"
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
        return "none: the matrix is complete at every checkpoint."
    return f"{missing:,} ({percent(missing / (missing + pairs))}) are not computed yet."


def _files(verified: Any) -> str:
    if verified is None:
        return ""
    return "have the published checksums." if verified else "do not have the published checksums."


def _place(at: xr.DataArray) -> str:
    """Name a checkpoint."""
    seed = f", seed {int(at['seed'])}" if "seed" in at.coords else ""
    return f"{rate_title(float(at['learning_rate']))}{seed}, step {int(at['iteration']):,}"
