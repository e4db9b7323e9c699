"""What a study shows, in a few sentences. Every number and every direction comes from the data."""

from __future__ import annotations

import numpy as np
import xarray as xr

from distributed_stiffness.analysis import Summary, over_seeds
from distributed_stiffness.figures.checkpoints import Names, of_seed, with_run_dims
from distributed_stiffness.figures.style import in_one_line
from distributed_stiffness.report.evidence import uncertain, undecided_share
from distributed_stiffness.report.words import counted, joined, measured, number, percent, sentence

# Sign stiffness nearer to 0 than this is called no effect: 1 pair in 20.
SMALL = 0.05
# A difference is claimed only where it is larger than so many of its errors.
ERRORS = 2
_WHERE = {"within": "within a class", "between": "between classes"}
_WHOSE = {"within": "of one class", "between": "of different classes"}


def findings(summary: Summary) -> list[str]:
    """Say in a few sentences what a study shows; means over seeds where there are several.

    Checkpoints whose cosines are not certain come first. For each learning rate, the first and the
    last iteration that are computed are compared; then come whether classes and super-classes can
    be told from chance, the classes that stand out, and the critical length. What ± means and what
    limits the numbers (missing or undecided pairs, zero gradients) comes last.
    """
    relations = of_seed(summary.within_between, None)
    matrices = of_seed(summary.class_matrix, None)
    n_seeds = with_run_dims(summary.within_between).sizes["seed"]
    names, lines = Names.of(summary.curves), uncertain(summary)
    for rate in relations["learning_rate"].values:
        one, name = relations.sel(learning_rate=rate), names.rate_title(rate)
        if n_seeds > 1:
            seeds = f"mean of {n_seeds} seeds"
            name = f"{name} ({seeds})" if name else seeds
        done = one["iteration"].values[one["sign"].notnull().any("relation")]
        if not done.size:
            lines.append(sentence(name, "no checkpoint is computed yet."))
            continue
        first, last = (one.sel(iteration=done[k]) for k in (0, -1))
        when = _when(last, names)
        if len(done) > 1:
            when = f"from {_when(first, names)} to {when}"
        lines.append(sentence(joined(name, when), _within_between(first, last, names)))
        at = joined(names.rate_title(rate), names.step_title(done[-1]))
        end = {"learning_rate": rate, "iteration": done[-1]}
        more = _gap(relations.sel(end)) + _class_pairs(matrices.sel(end))
        if summary.superclass_contrast is not None:
            more += _superclasses(of_seed(summary.superclass_contrast, None).sel(end))
        if summary.critical_length is not None:
            more += _critical_length(with_run_dims(summary.critical_length).sel(end))
        lines += [sentence(at, line) for line in more]
    return [*lines, errors_note(summary), *limits(summary)]


def errors_note(summary: Summary) -> str:
    """Say what ± means."""
    sizes = with_run_dims(summary.within_between).sizes
    n_seeds = sizes["seed"]
    alone = sizes["learning_rate"] * n_seeds * sizes["iteration"] == 1
    of = "this network" if alone else "these networks"
    note = f"Numbers are given ± one standard error, by jackknife over examples, of {of}"
    return note + (
        "; in brackets is the standard error over seeds, of training." if n_seeds > 1 else "."
    )


def limits(summary: Summary) -> list[str]:
    """Say what limits the numbers: missing pairs, signs left open by rounding, zero gradients."""
    lines = []
    missing, pairs = summary.class_matrix["missing"].sum(), summary.class_matrix["pairs"].sum()
    if missing > 0:
        share = float(missing / (missing + pairs))
        lines.append(f"{percent(share)} of the pairs are not computed yet and left out.")
    curves = summary.curves
    if (undecided := undecided_share(curves)) is not None:
        lines.append(_undecided(undecided, Names.of(curves)))
    if "zero_gradients" in curves and (worst := int(curves["zero_gradients"].max())):
        lines.append(
            f"Up to {counted(worst, 'example has', 'examples have')} a gradient of zero: sign 0"
            " with every other, and no part in cosine means."
        )
    return lines


def effect(value: float, error: float = 0.0) -> str:
    """Say in words what a mean sign stiffness means for two examples.

    What is not larger than two of its errors is no effect; an error that is not known is none.
    """
    if abs(value) < SMALL or abs(value) <= ERRORS * np.nan_to_num(error):
        return "help as often as they harm each other"
    verb, other = ("help", "harm") if value > 0 else ("harm", "help")
    if abs(value) < 0.3:
        return f"{verb} each other somewhat more often than they {other}"
    return f"{'nearly always' if abs(value) > 0.9 else 'mostly'} {verb} each other"


def _within_between(first: xr.Dataset, last: xr.Dataset, names: Names) -> str:
    """Compare the first and the last iteration that are computed, where there are such pairs."""
    known = [r for r in _WHERE if np.isfinite(last["sign"].sel(relation=r))]
    parts = [
        f"{measure} stiffness "
        + joined(*(f"{_WHERE[r]} {_change(first, last, measure, r)}" for r in known))
        for measure in ("sign", "cosine")
    ]
    step = names.step_title(float(last["iteration"]))
    effects = ", and ".join(f"two {_WHOSE[r]} {_effect(last.sel(relation=r))}" for r in known)
    effects = effects.replace("two ", "two examples ", 1)
    return f"{'; '.join(parts)}. {sentence('', f'at {step} {effects}' if step else effects)}."


def _effect(at: xr.Dataset) -> str:
    return effect(float(at["sign"]), largest_error(at, "sign"))


def largest_error(at: xr.Dataset, name: str) -> float:
    """Return the larger of the errors over examples and over seeds, NaN where neither is known."""
    errors = [float(at[key]) for key in (f"{name}_error", f"{name}_seed_error") if key in at]
    return max((error for error in errors if np.isfinite(error)), default=np.nan)


def _gap(at: xr.Dataset) -> list[str]:
    """Say whether examples of one class are told from others by more than chance."""
    lines = []
    for measure in ("sign", "cosine"):
        gap, error = float(at[f"{measure}_gap"]), largest_error(at, f"{measure}_gap")
        if not np.isfinite([gap, error]).all():
            continue
        said = (
            "is as large within a class as between classes, as far as its errors can tell"
            if abs(gap) <= ERRORS * error
            else f"is {'larger' if gap > 0 else 'smaller'} within a class than between classes"
        )
        lines.append(f"{measure} stiffness {said} (gap {measured(at, f'{measure}_gap')})")
    return [f"{'; '.join(lines)}."] if lines else []


def _change(first: xr.Dataset, last: xr.Dataset, measure: str, relation: str) -> str:
    before, after = (measured(at.sel(relation=relation), measure) for at in (first, last))
    return after if int(first["iteration"]) == int(last["iteration"]) else f"{before} → {after}"


def _when(at: xr.Dataset, names: Names) -> str:
    step, accuracy = names.step_title(float(at["iteration"])), ""
    if "validation_accuracy" in at.coords and np.isfinite(at["validation_accuracy"]):
        accuracy = f"validation accuracy {percent(float(at['validation_accuracy']))}"
    return f"{step} ({accuracy})" if step and accuracy else step or accuracy


def _class_pairs(matrix: xr.Dataset) -> list[str]:
    """Name the stiffest and the least stiff class, and the pairs of classes that stand out."""
    sign, names = matrix["sign"].values, [in_one_line(str(n)) for n in matrix["class_name"].values]
    if len(names) < 3 or sign.shape[0] != sign.shape[1] or not np.isfinite(sign).all():
        return []
    within = np.diag(sign)
    best, worst = int(within.argmax()), int(within.argmin())
    pairs = [(sign[a, b], a, b) for a in range(len(names)) for b in range(a)]
    (_, a, b), (_, c, d) = min(pairs), max(pairs)

    def cell(a: int, b: int) -> str:
        return measured(matrix.isel(class_name=a, other_class_name=b), "sign")

    own = (
        f"is highest for {names[best]} ({cell(best, best)}) and lowest for {names[worst]}"
        f" ({cell(worst, worst)})"
    )
    if number(within[best]) == number(within[worst]):
        own = f"is {number(within[best])} for every class"
    return [
        f"sign stiffness within a class {own}; between classes it is highest for {names[d]} with"
        f" {names[c]} ({cell(c, d)}) and lowest for {names[b]} with {names[a]} ({cell(a, b)})."
    ]


def _superclasses(contrast: xr.Dataset) -> list[str]:
    gap, error = float(contrast["sign_contrast"]), largest_error(contrast, "sign_contrast")
    if not np.isfinite(gap):
        return []
    said = (
        "super-classes make no difference"
        if abs(gap) <= max(SMALL / 2, ERRORS * np.nan_to_num(error))
        else "classes of one super-class are stiffer with each other"
        if gap > 0
        else "classes of one super-class are less stiff with each other"
    )
    same, other = (
        measured(contrast.sel(relation=relation), "sign")
        for relation in ("same_superclass", "other_superclass")
    )
    return [
        f"{said}: mean sign stiffness of two different classes is {same} inside a super-class,"
        f" {other} across (difference {measured(contrast, 'sign_contrast')};"
        f" {_chance(float(contrast['sign_p_value']))})."
    ]


def _chance(p_value: float) -> str:
    if not np.isfinite(p_value):
        return "nothing to compare with at random"
    return f"p = {p_value:.2g} against super-classes put together at random"


def _critical_length(length: xr.Dataset) -> list[str]:
    """Say where the line through within-class stiffness reaches zero; mean over seeds."""
    if not np.isfinite(length["cosine_slope"]).any():
        return []
    texts = []
    for measure in ("sign", "cosine"):
        known = np.isfinite(length[f"{measure}_length"].values)
        shown = over_seeds(length.isel(seed=known) if known.any() else length)
        text = length_text(shown, measure)
        if 0 < known.sum() < known.size:
            text = f"with {known.sum()} of {known.size} seeds {text}"
        texts.append(f"{measure} {text}")
    return [f"critical length ξ within a class: {'; '.join(texts)}."]


def length_text(at: xr.Dataset, measure: str) -> str:
    """Write ξ, its error and its interval; say where it is an extrapolation, or is not known."""
    name = f"{measure}_length"
    if not np.isfinite(at[name]):
        return f"not determined (slope {measured(at, f'{measure}_slope')})"
    text = measured(at, name)
    if f"{name}_low" in at and np.isfinite(at[f"{name}_low"]):
        text += f", two errors reach from {interval_text(at, measure)}"
    if not bool(at[f"{measure}_inside"]):
        lowest, highest = (number(float(at[f"{end}_distance"])) for end in ("lowest", "highest"))
        text += f", an extrapolation: the distances that occur are {lowest} to {highest}"
    return text


def interval_text(at: xr.Dataset, measure: str) -> str:
    """Write both ends of ξ's interval."""
    low, high = (number(float(at[f"{measure}_length_{end}"])) for end in ("low", "high"))
    return f"{low} to {high}"


def _undecided(share: xr.DataArray, names: Names) -> str:
    worst = float(share.max())
    unchecked = int(share.isnull().sum())
    if worst == 0:
        were = "was" if unchecked == 1 else "were"
        checked = f", at the checkpoints that were checked ({unchecked:,} {were} not)"
        return (
            "No cosine lies within its error bound of 0, so every sign is certain"
            f"{checked if unchecked else ''}."
        )
    at = share.isel(share.fillna(-1.0).argmax(...))
    share_text, most = percent(worst), ""
    if share.size > 1:
        share_text = share_text if share_text.startswith("less") else f"up to {share_text}"
        most = names.place(
            {dim: at[dim] for dim in ("iteration", "learning_rate") if dim in at.coords}
        )
    return sentence(
        "",
        f"{share_text} of all pairs have a cosine within its error bound of 0, so that their sign"
        f" is open{f' (most at {most})' if most else ''}.",
    )
