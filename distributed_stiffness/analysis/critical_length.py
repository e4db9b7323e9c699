"""The dynamical critical length ξ: the distance of two inputs at which stiffness reaches zero.

A weighted line through the means of bins needs five sums over pairs alone: of 1, x, x², y and x·y,
with x the centre of the pair's bin and y its stiffness. They are linear in the sums of an example,
so that the line without one example costs no more than the line.

Legend of the arrays: E examples, k bins, r relations, S sums (as in `sums`), F the five sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.distance import binned_sums
from distributed_stiffness.analysis.jackknife import MEASURES, Examples, slabs, spread
from distributed_stiffness.analysis.metric import DISTANCE, Distance
from distributed_stiffness.analysis.pairs import Splits, checkpoint_coordinates, origin
from distributed_stiffness.errors import DataError

# A slope that is not below 0 by so many of its errors crosses 0 nowhere that can be told.
ERRORS = 2.0
_RELATIONS = {
    "within": "pairs within one class",
    "between": "pairs between classes",
    "all": "all pairs",
}
_RANGE = ("lowest_distance", "highest_distance")
_LINE = ("length", "inside", "slope", "intercept")
_ERRORS = (
    "length_error",
    "length_low",
    "length_high",
    "outside_share",
    "slope_error",
    "intercept_error",
    "covariance",
)


def critical_length(
    ds: xr.Dataset,
    bins: int = 20,
    edges: Sequence[float] | np.ndarray | None = None,
    *,
    relation: str = "within",
    distance: Distance = DISTANCE,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Fit a line to mean stiffness against distance and return where it crosses zero.

    The means of the distance bins are fitted by least squares, each weighted by its pairs:
    stiffness = α + β·distance and ξ = −α/β (Fort et al., v3, for pairs within one class; v3's
    choice between binned means and all pairs was not seen). Errors are by jackknife over examples:
    the line is fitted again without each. The interval holds the distances at which the line is
    within two of its errors of zero (Fieller's). Where β is not below 0 by two errors that would be
    no interval, and ξ is not determined: it is NaN, and α, β and their covariance are all there is.

    Args:
        ds: a store, or what `distance_profile` returned for one. A profile no longer knows its
            examples: then there are no errors, and ξ is NaN only where β is not negative.
        bins: as in `distance_profile`, for a store.
        edges: as there.
        relation: which pairs, "within" (the paper's), "between" or "all".
        distance: as there, for a store.
        splits: as there.

    Returns:
        Lazy Dataset over leading dimensions: lowest_distance and highest_distance, the range of
        the bins that hold such pairs; and for each measure m (sign, cosine): m_length (ξ),
        m_slope (β), m_intercept (α) and m_inside (whether ξ lies in that range; bool). For a store
        also m_length_error, m_length_low and m_length_high (the interval), m_slope_error,
        m_intercept_error, m_covariance (of α and β) and m_outside_share (of the examples without
        which ξ lies outside that range or nowhere).

    Raises:
        DataError: the store has no such distance, or the edges do not ascend.
    """
    if relation not in _RELATIONS:
        raise DataError(f"relation is {relation!r}: expected one of {', '.join(_RELATIONS)}")
    if "distance_bin" in ds.dims and "example" not in ds.dims:  # a profile, not a store
        fitted = _of_profile(ds.sel(relation=relation, drop=True))
        result = _named(fitted, (*_RANGE, *_LINE)).assign_attrs(ds.attrs)
        return _described(result, _RELATIONS[relation], ds["distance_bin"].attrs)
    binned = binned_sums(ds, bins, edges, distance=distance, splits=splits)
    names = (*_RANGE, *_LINE, *_ERRORS)
    fitted = binned.leave_one_out(
        partial(_line_with_errors, binned.examples, binned.edges, relation),
        {"measure": 2, "value": len(names)},
    )
    result = _named(fitted, names).assign_coords(checkpoint_coordinates(ds))
    result = result.assign_attrs(origin(ds), splits=binned.chosen.attrs["splits"])
    return _described(result, _RELATIONS[relation], binned.distance)


def _named(fitted: xr.DataArray, names: Sequence[str]) -> xr.Dataset:
    """Give every value of (…, measure, value) its name."""
    result = xr.Dataset()
    for i, name in enumerate(names):
        value = fitted.isel(value=i)
        if name in _RANGE:  # the same for both measures
            result[name] = value.isel(measure=0)
            continue
        for k, measure in enumerate(MEASURES):
            of_measure = value.isel(measure=k)
            result[f"{measure}_{name}"] = of_measure > 0 if name == "inside" else of_measure
    return result


def _of_profile(profile: xr.Dataset) -> xr.DataArray:
    """Fit the line to means that are at hand: (…, measure, value of _RANGE and _LINE)."""
    edges = np.append(profile["lower_edge"], profile["upper_edge"][-1])
    names = ("cosine", "sign", "cosine_pairs", "pairs")
    fitted: xr.DataArray = xr.apply_ufunc(
        partial(_line_of_means, edges, profile["distance_bin"].values),
        *(profile[name] for name in names),
        input_core_dims=[["distance_bin"]] * len(names),
        output_core_dims=[["measure", "value"]],
        dask="parallelized",
        dask_gufunc_kwargs={"output_sizes": {"measure": 2, "value": len(_RANGE) + len(_LINE)}},
        output_dtypes=[np.float64],
    )
    return fitted


def _line_of_means(
    edges: np.ndarray,
    centres: np.ndarray,
    cosine: np.ndarray,
    sign: np.ndarray,
    cosine_pairs: np.ndarray,
    pairs: np.ndarray,
) -> np.ndarray:
    counts = np.stack([cosine_pairs, pairs], axis=-2).astype(np.float64)
    sums = np.where(counts > 0, np.stack([cosine, sign], axis=-2) * counts, 0)
    intercept, slope = _fit(_five_sums(counts, sums, centres), centres)
    lowest, highest = _observed(pairs, edges)
    return _crossing(
        intercept, slope, slope < 0, np.asarray(lowest)[..., None], np.asarray(highest)[..., None]
    )


def _line_with_errors(
    examples: Examples,
    edges: np.ndarray,
    relation: str,
    as_row: np.ndarray,
    as_column: np.ndarray,
) -> np.ndarray:
    """Fit the line, and again without each example: sums (E, r, k, S) to (2, values)."""
    centres = (edges[:-1] + edges[1:]) / 2
    parts, twice = [], np.zeros((as_row.shape[-1], len(centres)))
    for some in slabs(len(as_row)):
        lost = as_row[some] + as_column[some]
        of = lost.sum(1) if relation == "all" else lost[:, ("within", "between").index(relation)]
        of = np.moveaxis(of, -1, 0)  # (S, e, k)
        twice += of.sum(1)
        parts.append(_five_sums(of[2:], of[:2], centres))
    lost_five = np.concatenate(parts, axis=1)
    totals = twice / 2  # each pair is in two rows of the table
    five = _five_sums(totals[2:], totals[:2], centres)
    intercept, slope = _fit(five, centres)  # (2,)
    without = _fit(five[:, None] - lost_five, centres)  # (2, E) each
    variances = _variances(examples, intercept, slope, *without)
    lowest, highest = _observed(totals[3], edges)
    known = slope < -ERRORS * np.sqrt(variances["slope"])
    line = _crossing(intercept, slope, known, lowest, highest)
    of_length = _length_errors(intercept, slope, variances, *without, lowest, highest)
    errors = [*(np.where(known, value, np.nan) for value in of_length)]
    errors += [np.sqrt(variances["slope"]), np.sqrt(variances["intercept"]), variances["both"]]
    return np.concatenate([line, np.stack(errors, axis=-1)], axis=-1)


def _crossing(
    intercept: np.ndarray,
    slope: np.ndarray,
    known: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
) -> np.ndarray:
    """Return the values of _RANGE and _LINE (…, value); ξ is NaN where it is not known."""
    length = -intercept / np.where(known, slope, np.nan)
    inside = (length >= lowest) & (length <= highest)
    return np.stack(
        np.broadcast_arrays(lowest, highest, length, inside, slope, intercept), axis=-1
    ).astype(np.float64)


def _variances(
    examples: Examples,
    intercept: np.ndarray,
    slope: np.ndarray,
    intercepts: np.ndarray,
    slopes: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return the jackknife's variances of α, β and ξ, and the covariance of α and β."""
    change = (intercepts - intercept[:, None]).T, (slopes - slope[:, None]).T  # (E, 2)
    length = (-intercepts / np.where(slopes == 0, np.nan, slopes)).T
    shift = length + intercept / np.where(slope == 0, np.nan, slope)
    of_intercept, of_slope, of_sum, of_length = (
        spread(values, examples.roles).sum(0) for values in (*change, change[0] + change[1], shift)
    )
    return {
        "intercept": of_intercept,
        "slope": of_slope,
        "length": of_length,
        "both": (of_sum - of_intercept - of_slope) / 2,
    }


def _length_errors(
    intercept: np.ndarray,
    slope: np.ndarray,
    variances: dict[str, np.ndarray],
    intercepts: np.ndarray,
    slopes: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
) -> list[np.ndarray]:
    """Return ξ's error, both ends of its interval, and how often it leaves the observed range."""
    # (α + βx)² = 4 Var(α + βx), a square equation whose roots are real where β is known.
    square = slope**2 - ERRORS**2 * variances["slope"]
    half = intercept * slope - ERRORS**2 * variances["both"]
    constant = intercept**2 - ERRORS**2 * variances["intercept"]
    square = np.where(square > 0, square, np.nan)
    root = np.sqrt(np.maximum(half**2 - square * constant, 0))
    lengths = -intercepts / np.where(slopes < 0, slopes, np.nan)
    outside = ~((lengths >= lowest) & (lengths <= highest))
    return [
        np.sqrt(variances["length"]),
        (-half - root) / square,
        (-half + root) / square,
        outside.mean(-1),
    ]


def _five_sums(counts: np.ndarray, sums: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the sums over pairs of 1, x, x², y, x·y: (…, k) and (…, k) to (…, F)."""
    powers = (centres - centres.mean())[:, None] ** np.arange(3)
    return np.concatenate([counts @ powers, sums @ powers[:, :2]], axis=-1)


def _fit(five: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intercept and slope of the weighted least-squares line; NaN from one bin."""
    n = np.where(five[..., 0] > 0, five[..., 0], np.nan)
    mean_x, mean_xx, mean_y, mean_xy = (five[..., k] / n for k in range(1, 5))
    spread_x = mean_xx - mean_x**2
    # One bin alone leaves nothing but rounding.
    spread_x = np.where(spread_x > 1e-13 * np.ptp(centres) ** 2, spread_x, np.nan)
    slope = (mean_xy - mean_x * mean_y) / spread_x
    return mean_y - slope * (mean_x + centres.mean()), slope


def _observed(pairs: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outer edges of the bins that hold pairs: (…, k) to (…)."""
    there = pairs > 0
    some = there.any(-1)
    first = there.argmax(-1)
    last = there.shape[-1] - 1 - there[..., ::-1].argmax(-1)
    lowest = np.where(some, edges[:-1][first], np.nan)
    highest = np.where(some, edges[1:][last], np.nan)
    return lowest, highest


def _described(result: xr.Dataset, pairs: str, distance: Mapping[Hashable, Any]) -> xr.Dataset:
    name, units = distance.get("long_name", "distance"), distance.get("units", "1")
    for which in ("lowest", "highest"):
        result[f"{which}_distance"].attrs = {
            "long_name": f"{which} {name} observed",
            "units": units,
            "description": f"Edge of the bins that hold {pairs}.",
        }
    for measure in MEASURES:
        fit = f"of the line through mean {measure} stiffness against {name}, {pairs}"
        for value, (what, description) in _TEXTS.items():
            if f"{measure}_{value}" in result:
                is_distance = value in _DISTANCES
                result[f"{measure}_{value}"].attrs = {
                    "long_name": what.format(stiffness=f"{measure} stiffness"),
                    "units": units if is_distance else "1",
                    "description": description.format(fit=fit),
                }
    return result.assign_attrs(distance=name)


_LENGTH = "critical length of {stiffness}"
_DISTANCES = ("length", "length_error", "length_low", "length_high")  # in the distance's units
_TEXTS = {
    "length": (
        _LENGTH,
        "Zero crossing {fit}: -intercept / slope. NaN where the slope is not"
        " negative, or not by two of its errors where these are known: where stiffness reaches"
        " zero cannot be told there.",
    ),
    "inside": (
        f"{_LENGTH} is inside",
        "True where the critical length lies within the distances that occur among these pairs;"
        " elsewhere it is an extrapolation.",
    ),
    "slope": (
        "slope of {stiffness}",
        "Slope {fit}: stiffness per unit of distance, any sign.",
    ),
    "intercept": ("intercept of {stiffness}", "Value at distance 0 {fit}; any sign."),
    "length_error": (
        f"standard error of the {_LENGTH}",
        "By jackknife over examples, zero crossing {fit}; 0 or more, NaN where it is not known.",
    ),
    "length_low": (
        f"lower end of the interval of the {_LENGTH}",
        "Least distance at which the value {fit}, is within two of its errors of 0.",
    ),
    "length_high": (
        f"upper end of the interval of the {_LENGTH}",
        "Largest distance at which the value {fit}, is within two of its errors of 0.",
    ),
    "outside_share": (
        f"how often the {_LENGTH} is outside",
        "Share of examples without which the zero crossing {fit}, lies outside the distances that"
        " occur, or nowhere; in [0, 1].",
    ),
    "slope_error": (
        "standard error of the slope of {stiffness}",
        "By jackknife over examples, {fit}; 0 or more.",
    ),
    "intercept_error": (
        "standard error of the intercept of {stiffness}",
        "By jackknife over examples, {fit}; 0 or more.",
    ),
    "covariance": (
        "covariance of intercept and slope of {stiffness}",
        "By jackknife over examples, {fit}; any sign.",
    ),
}
