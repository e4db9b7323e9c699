"""What a study shows, in a few sentences. Every number and every direction comes from the data."""

from __future__ import annotations

import numpy as np
import xarray as xr

from distributed_stiffness.analysis import Summary, superclass_contrast
from distributed_stiffness.figures.checkpoints import of_seed, with_run_dims

# Sign stiffness nearer to 0 than this is called no effect: 1 pair in 20.
SMALL = 0.05


def findings(summary: Summary) -> list[str]:
    """Say in a few sentences what a study shows; means over seeds where there are several.

    For each learning rate, the first and the last iteration that are computed are compared; then
    come the classes that stand out, super-classes, and the critical length. What limits the numbers
    (missing or undecided pairs, zero gradients) comes last.
    """
    relations = of_seed(summary.within_between, None)
    matrices = of_seed(summary.class_matrix, None)
    n_seeds = with_run_dims(summary.within_between).sizes["seed"]
    lines = []
    for rate in relations["learning_rate"].values:
        one = relations.sel(learning_rate=rate)
        name = f"Learning rate {rate:g}" + (f" (mean of {n_seeds} seeds)" if n_seeds > 1 else "")
        done = one["iteration"].values[one["sign"].notnull().all("relation")]
        if not done.size:
            lines.append(f"{name}: no checkpoint is computed yet.")
            continue
        lines.append(f"{name}, {_within_between(one, done)}")
        last = {"learning_rate": rate, "iteration": done[-1]}
        at = f"Learning rate {rate:g}, step {done[-1]:,}: "
        more = _class_pairs(matrices.sel(last)) + _superclasses(matrices.sel(last))
        if summary.critical_length is not None:
            more += _critical_length(with_run_dims(summary.critical_length).sel(last))
        lines += [at + line for line in more]
    return lines + limits(summary)


def limits(summary: Summary) -> list[str]:
    """Say what limits the numbers: missing pairs, signs left open by rounding, zero gradients."""
    lines = []
    missing, pairs = summary.class_matrix["missing"].sum(), summary.class_matrix["pairs"].sum()
    if missing > 0:
        share = float(missing / (missing + pairs))
        lines.append(f"{_percent(share)} of the pairs are not computed yet and left out.")
    curves = summary.curves
    if "undecided_share" in curves and curves["undecided_share"].notnull().any():
        lines.append(_undecided(curves))
    if "zero_gradients" in curves and (worst := int(curves["zero_gradients"].max())):
        lines.append(
            f"Up to {_counted(worst, 'example has', 'examples have')} a gradient of zero: sign 0"
            " with every other, and no part in cosine means."
        )
    return lines


def number(value: float, digits: int = 2) -> str:
    """Write a number with a true minus sign, and no minus before zero."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def effect(value: float) -> str:
    """Say in words what a mean sign stiffness means for two examples."""
    if abs(value) < SMALL:
        return "help as often as they harm each other"
    verb, other = ("help", "harm") if value > 0 else ("harm", "help")
    if abs(value) < 0.3:
        return f"{verb} each other somewhat more often than they {other}"
    return f"{'nearly always' if abs(value) > 0.9 else 'mostly'} {verb} each other"


def _within_between(one: xr.Dataset, done: np.ndarray) -> str:
    """Compare the first and the last iteration that are computed."""
    first, last = one.sel(iteration=done[0]), one.sel(iteration=done[-1])
    within, between = (float(last["sign"].sel(relation=r)) for r in ("within", "between"))
    when = _when(last) if len(done) == 1 else f"from {_when(first)} to {_when(last)}"
    parts = [
        f"{measure} stiffness within a class {_change(first, last, measure, 'within')},"
        f" between classes {_change(first, last, measure, 'between')}"
        for measure in ("sign", "cosine")
    ]
    return (
        f"{when}: {'; '.join(parts)}. At step {done[-1]:,} two examples of one class"
        f" {effect(within)}, and two of different classes {effect(between)}."
    )


def _change(first: xr.Dataset, last: xr.Dataset, measure: str, relation: str) -> str:
    before, after = (number(float(at[measure].sel(relation=relation))) for at in (first, last))
    return after if int(first["iteration"]) == int(last["iteration"]) else f"{before} → {after}"


def _when(at: xr.Dataset) -> str:
    step = int(at["iteration"])
    if "validation_accuracy" in at.coords and np.isfinite(at["validation_accuracy"]):
        return f"step {step:,} (validation accuracy {_percent(float(at['validation_accuracy']))})"
    return f"step {step:,}"


def _class_pairs(matrix: xr.Dataset) -> list[str]:
    """Name the stiffest and the least stiff class, and the pairs of classes that stand out."""
    sign, names = matrix["sign"].values, [str(name) for name in matrix["class_name"].values]
    if len(names) < 3 or sign.shape[0] != sign.shape[1] or not np.isfinite(sign).all():
        return []
    within = np.diag(sign)
    best, worst = within.argmax(), within.argmin()
    pairs = [(sign[a, b], a, b) for a in range(len(names)) for b in range(a)]
    (low, a, b), (high, c, d) = min(pairs), max(pairs)
    own = (
        f"is highest for {names[best]} ({number(within[best])}) and lowest for {names[worst]}"
        f" ({number(within[worst])})"
    )
    if number(within[best]) == number(within[worst]):
        own = f"is {number(within[best])} for every class"
    return [
        f"sign stiffness within a class {own}; between classes it is highest for {names[d]} with"
        f" {names[c]} ({number(high)}) and lowest for {names[b]} with {names[a]} ({number(low)})."
    ]


def _superclasses(matrix: xr.Dataset) -> list[str]:
    if "superclass_name" not in matrix.coords:
        return []
    contrast = superclass_contrast(matrix)["sign"]
    same, other = (
        float(contrast.sel(relation=f"{which}_superclass")) for which in ("same", "other")
    )
    if not np.isfinite([same, other]).all():
        return []
    gap = same - other
    said = (
        "classes of one super-class are stiffer with each other"
        if gap > SMALL / 2
        else "classes of one super-class are less stiff with each other"
        if gap < -SMALL / 2
        else "super-classes make no difference"
    )
    return [
        f"{said}: mean sign stiffness of two different classes is {number(same)} inside a"
        f" super-class, {number(other)} across."
    ]


def _critical_length(length: xr.Dataset) -> list[str]:
    """Say where the line through within-class stiffness reaches zero, for each seed."""
    if not np.isfinite(length["cosine_slope"]).any():
        return []
    texts = [
        f"{measure} "
        + ", ".join(length_text(length.sel(seed=seed), measure) for seed in length["seed"].values)
        for measure in ("sign", "cosine")
    ]
    line = f"critical length ξ within a class: {'; '.join(texts)}."
    if "(" in line:
        line += " In brackets: outside the observed distances, an extrapolation."
    if "none" in line:
        line += " None: stiffness does not fall with distance."
    return [line]


def length_text(at: xr.Dataset, measure: str) -> str:
    """Write ξ: in brackets where it is an extrapolation, "none" where stiffness does not fall."""
    value = float(at[f"{measure}_length"])
    if not np.isfinite(value):
        return "none"
    return number(value) if bool(at[f"{measure}_inside"]) else f"({number(value)})"


def _undecided(curves: xr.Dataset) -> str:
    share = curves["undecided_share"]
    worst = float(share.max())
    unchecked = int(share.isnull().sum())
    if worst == 0:
        return (
            "No cosine lies within its error bound of 0, so every sign is certain"
            + (
                f", at the checkpoints that were checked ({unchecked} were not)"
                if unchecked
                else ""
            )
            + "."
        )
    at = share.isel(share.fillna(-1.0).argmax(...))
    share_text = _percent(worst)
    share_text = share_text.capitalize() if share_text.startswith("less") else f"Up to {share_text}"
    return (
        f"{share_text} of all pairs have a cosine within its error bound of 0, so that their sign"
        f" is open (most at step {int(at['iteration']):,}, learning rate"
        f" {float(at['learning_rate']):g})."
    )


def _percent(share: float) -> str:
    percent = 100 * share
    if 0 < percent < 0.01:
        return "less than 0.01 %"
    digits = 0 if percent >= 9.95 or percent == 0 else 1 if percent >= 1 else 2
    return f"{percent:.{digits}f} %"


def _counted(n: int, one: str, several: str) -> str:
    return f"{n:,} {one if n == 1 else several}"
