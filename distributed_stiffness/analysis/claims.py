"""Claims of the paper, each as a pure function of stores: an estimate, its error, a verdict.

Every rule that picks a checkpoint, a loss or a measure is written here, before any number is seen:
within a class the cosine form is taken and between classes the sign form, which v3 finds the more
telling; "early" is a step that the caller names; over-fitting begins at the least validation loss
of the checkpoints. Where several seeds were run, the estimate is their mean, and its error is made
of the example-level error (jackknife) and the error over seeds, as a root of squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.classes import within_between
from distributed_stiffness.analysis.critical_length import critical_length
from distributed_stiffness.analysis.equal_loss import at_equal_loss, common_losses
from distributed_stiffness.analysis.one_pass import compute
from distributed_stiffness.analysis.paired import paired_differences
from distributed_stiffness.analysis.superclasses import superclass_contrast

Stores = Mapping[str, xr.Dataset]
Verdict = Literal["agrees", "does not", "undecided"]
WIDTH = 1.96  # standard errors on either side
_WHEN = ("iteration", "epoch")  # what tells two checkpoints of a run apart


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured for a claim."""

    estimate: float
    error: float  # standard error
    verdict: Verdict
    p_value: float | None = None  # of a permutation test, where there is one
    note: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of estimate ± 1.96 standard errors."""
        return self.estimate - WIDTH * self.error, self.estimate + WIDTH * self.error


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper that a study can bear out or not."""

    number: str
    claimed: str  # what is claimed
    quantity: str  # that is estimated, on what
    expected: str  # of the quantity, by the paper
    source: str  # version and figure or section
    studies: tuple[str, ...]  # whose stores `measure` reads
    measure: Callable[[Stores], Finding]


def verdict(estimate: float, error: float, *, expected: int) -> Verdict:
    """Say whether an estimate has the sign that is expected (1 or -1), beyond its error."""
    low, high = expected * estimate - WIDTH * error, expected * estimate + WIDTH * error
    if low > 0:
        return "agrees"
    return "does not" if high < 0 else "undecided"


def diagonal_at(stores: Stores, *, study: str, rate: float, step: int) -> Finding:
    """Mean within-class cosine stiffness at a step; expected above 0."""
    found = compute(within_between(_run(stores, study, rate).sel(iteration=[step])))
    found = found.isel(iteration=0)
    within = found.sel(relation="within")
    return _of_seeds(within["cosine"], within["cosine_error"], expected=1)


def fall_after_onset(stores: Stores, *, study: str, rate: float) -> Finding:
    """Within-class cosine stiffness at the least validation loss minus that at the end, pairwise.

    Expected above 0, and the rest near 0: the note says what is left. Undecided where a run has not
    over-fitted.
    """
    ds = _run(stores, study, rate)
    losses = ds["validation_loss"].compute()
    last = losses.sizes["iteration"] - 1
    onsets = [int(losses.isel(seed=k).argmin("iteration")) for k in range(losses.sizes["seed"])]
    if last in onsets:
        return _unknown("validation loss is least at the last checkpoint: no over-fitting yet")
    parts = [_change(ds.isel(seed=[k]), onset, last) for k, onset in enumerate(onsets)]
    found = xr.concat(parts, dim="seed").sel(relation="within")
    levels = compute(within_between(ds)).sel(relation="within")["cosine"]
    early = np.mean([float(levels.isel(seed=k, iteration=at)) for k, at in enumerate(onsets)])
    late = float(levels.isel(iteration=last).mean())
    steps = sorted({int(losses["iteration"].values[at]) for at in onsets})
    note = f"{early:.3f} at step {' or '.join(map(str, steps))}, {late:.3f} at the end"
    return _of_seeds(found["cosine"], found["cosine_error"], expected=1, note=note)


def true_minus_permuted(
    stores: Stores, *, true: str, permuted: str, rate: float, step: int, gap: bool
) -> Finding:
    """Cosine stiffness with true labels minus that with permuted ones, at a step; expected > 0.

    Of pairs within a class, or with `gap` of within minus between. Runs of one seed start from the
    same weights, so that this is how much more it has risen.
    """
    first, second = (_run(stores, name, rate).sel(iteration=[step]) for name in (true, permuted))
    found = compute(paired_differences(first, second)).isel(iteration=0)
    if not gap:
        found = found.sel(relation="within")
    name = "cosine_gap" if gap else "cosine"
    return _of_seeds(found[name], found[f"{name}_error"], expected=1)


def rate_effect(stores: Stores, *, study: str, loss: int) -> Finding:
    """Between-class sign stiffness at the highest rate minus that at the lowest, at equal loss.

    Expected above 0 by v1. `loss` is the place in `common_losses`, from 0.
    """
    ds = stores[study]
    losses = common_losses(ds["train_loss"].compute())
    if not losses:
        return _unknown("there is no training loss that every run passes")
    wanted = losses[loss]
    found = at_equal_loss(compute(within_between(ds)), wanted).sel(relation="between")
    low, high = found.isel(learning_rate=0), found.isel(learning_rate=-1)
    difference = (high["sign"] - low["sign"]).reset_coords(drop=True)
    error = _hypot(high["sign_error"], low["sign_error"])
    levels = f"{float(low['sign'].mean()):.3f} to {float(high['sign'].mean()):.3f}"
    return _of_seeds(difference, error, expected=1, note=f"at loss {wanted:.3g}: {levels}")


def slope_at(stores: Stores, *, study: str, rate: float, step: int) -> Finding:
    """Slope of within-class cosine stiffness against input distance; expected below 0."""
    found = _lengths(stores, study, rate, [step]).isel(iteration=0)
    return _of_seeds(found["cosine_slope"], found["cosine_slope_error"], expected=-1)


def length_inside(stores: Stores, *, study: str, rate: float, step: int) -> Finding:
    """ξ, expected to lie within the distances that occur."""
    found = _lengths(stores, study, rate, [step]).isel(iteration=0)
    one = _of_seeds(found["cosine_length"], found["cosine_length_error"], expected=1)
    lowest, highest = float(found["lowest_distance"].max()), float(found["highest_distance"].min())
    note = f"distances {lowest:.2f} to {highest:.2f}"
    if not math.isfinite(one.estimate + one.error):
        return _unknown(f"{_undetermined(found)}; {note}")
    low, high = one.interval
    decided: Verdict = "undecided"
    if lowest < low and high < highest:
        decided = "agrees"
    elif high < lowest or low > highest:
        decided = "does not"
    return Finding(estimate=one.estimate, error=one.error, verdict=decided, note=note)


def length_change(stores: Stores, *, study: str, rate: float, steps: tuple[int, int]) -> Finding:
    """ξ at the second step minus ξ at the first; expected below 0.

    The errors of both are added as if independent; the examples are the same.
    """
    found = _lengths(stores, study, rate, list(steps))
    first, second = found.isel(iteration=0, drop=True), found.isel(iteration=1, drop=True)
    change = (second["cosine_length"] - first["cosine_length"]).reset_coords(drop=True)
    error = _hypot(second["cosine_length_error"], first["cosine_length_error"])
    if not bool(np.isfinite(change + error).all()):
        return _unknown(_undetermined(found))
    levels = [float(at["cosine_length"].mean()) for at in (first, second)]
    note = f"{levels[0]:.2f} to {levels[1]:.2f}"
    return _of_seeds(change, error, expected=-1, note=note)


def superclasses_show(stores: Stores, *, study: str, rate: float, step: int) -> Finding:
    """Cosine stiffness of classes within a super-class minus across; expected above 0."""
    found = superclass_contrast(_run(stores, study, rate).sel(iteration=[step]))
    found = compute(found).isel(iteration=0)
    one = _of_seeds(found["cosine_contrast"], found["cosine_contrast_error"], expected=1)
    p_value = float(found["cosine_p_value"].max())
    return Finding(
        estimate=one.estimate, error=one.error, verdict=one.verdict, p_value=p_value, note=one.note
    )


def table(claims: Sequence[Claim], findings: Sequence[Finding]) -> str:
    """Return claims and findings as a Markdown table."""
    head = "| | claim | quantity | the paper says | measured | verdict |\n|---|---|---|---|---|---|"
    rows = [
        f"| {c.number} | {c.claimed} | {c.quantity} | {c.expected} ({c.source}) | {in_words(f)} |"
        f" {f.verdict} |"
        for c, f in zip(claims, findings, strict=True)
    ]
    return "\n".join([head, *rows])


def in_words(finding: Finding) -> str:
    """Write what was measured."""
    if math.isnan(finding.estimate):
        return finding.note
    text = f"{finding.estimate:.3f} ± {WIDTH * finding.error:.3f}"
    if finding.p_value is not None:
        text += f", p = {finding.p_value:.2g}"
    return text + (f" ({finding.note})" if finding.note else "")


def _run(stores: Stores, study: str, rate: float) -> xr.Dataset:
    return stores[study].sel(learning_rate=rate)


def _change(ds: xr.Dataset, first: int, second: int) -> xr.Dataset:
    """Return the first checkpoint minus the second, computed."""
    parts = [
        ds.isel(iteration=at).drop_vars(["iteration", "epoch"], errors="ignore")
        for at in (first, second)
    ]
    return compute(paired_differences(*parts))


def _hypot(a: xr.DataArray, b: xr.DataArray) -> xr.DataArray:
    squares: xr.DataArray = a.reset_coords(drop=True) ** 2 + b.reset_coords(drop=True) ** 2
    return squares**0.5


def _lengths(stores: Stores, study: str, rate: float, steps: list[int]) -> xr.Dataset:
    return compute(critical_length(_run(stores, study, rate).sel(iteration=steps)))


def _undetermined(found: xr.Dataset) -> str:
    unknown = ~np.isfinite(found["cosine_length_error"])
    return f"ξ is not determined in {int(unknown.sum())} of {unknown.size} networks"


def _unknown(note: str) -> Finding:
    return Finding(estimate=math.nan, error=math.nan, verdict="undecided", note=note)


def _of_seeds(
    values: xr.DataArray, errors: xr.DataArray, *, expected: int, note: str = ""
) -> Finding:
    """Average over seeds; the error is of examples and of seeds together."""
    per_seed, of_examples = np.atleast_1d(values.values), np.atleast_1d(errors.values)
    estimate, n = float(per_seed.mean()), len(per_seed)
    of_seeds = float(per_seed.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    error = math.hypot(float(of_examples.mean()), of_seeds)
    decided = verdict(estimate, error, expected=expected)
    return Finding(estimate=estimate, error=error, verdict=decided, note=note)
