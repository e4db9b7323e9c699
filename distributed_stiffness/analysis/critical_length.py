"""The dynamical critical length ξ: the input distance at which stiffness reaches zero."""

from __future__ import annotations

import numpy as np
import xarray as xr


def critical_length(profile: xr.Dataset, *, relation: str = "within") -> xr.Dataset:
    """Fit a line to mean stiffness against distance and return where it crosses zero.

    The means of the distance bins are fitted by least squares, each weighted by its pairs:
    stiffness = α + β·distance and ξ = −α/β (Fort et al., v3, for pairs within one class; v3's
    choice between binned means and all pairs was not seen).

    Args:
        profile: of `distance_profile`.
        relation: which pairs, "within" (the paper's), "between" or "all".

    Returns:
        Dataset over the profile's leading dimensions; for each measure m (sign, cosine):
        m_length (ξ; NaN where the slope is not negative), m_slope (β), m_intercept (α) and
        m_inside (whether ξ lies within the observed distances of those pairs).
    """
    chosen = profile.sel(relation=relation, drop=True)
    result = xr.Dataset()
    for measure, counts in (("sign", "pairs"), ("cosine", "cosine_pairs")):
        weights = chosen[counts].where(chosen[counts] > 0, 0).astype(np.float64)
        intercept, slope = _fit(chosen["distance_bin"], chosen[measure], weights)
        length = -intercept / slope.where(slope < 0)
        observed = weights > 0
        low = chosen["lower_edge"].where(observed).min("distance_bin")
        high = chosen["upper_edge"].where(observed).max("distance_bin")
        result[f"{measure}_length"] = length
        result[f"{measure}_slope"] = slope
        result[f"{measure}_intercept"] = intercept
        result[f"{measure}_inside"] = (length >= low) & (length <= high)
    return _described(result, relation)


def _fit(
    x: xr.DataArray, y: xr.DataArray, weights: xr.DataArray
) -> tuple[xr.DataArray, xr.DataArray]:
    """Return intercept and slope of the weighted least-squares line; NaN from one point."""
    total = weights.sum("distance_bin")
    total = total.where(total > 0)
    y = y.where(weights > 0, 0.0)
    mean_x = (weights * x).sum("distance_bin") / total
    mean_y = (weights * y).sum("distance_bin") / total
    spread = (weights * (x - mean_x) ** 2).sum("distance_bin")
    # One bin alone leaves a spread of nothing but rounding.
    spread = spread.where((weights > 0).sum("distance_bin") > 1)
    slope = (weights * (x - mean_x) * (y - mean_y)).sum("distance_bin") / spread
    return mean_y - slope * mean_x, slope


def _described(result: xr.Dataset, relation: str) -> xr.Dataset:
    pairs = {"within": "pairs within one class", "between": "pairs between classes"}.get(
        relation, "all pairs"
    )
    for measure in ("sign", "cosine"):
        fit = f"of the line through mean {measure} stiffness against input distance, {pairs}"
        result[f"{measure}_length"].attrs = {
            "long_name": f"critical length of {measure} stiffness",
            "units": "1",
            "description": f"Zero crossing {fit}: -intercept / slope, a cosine distance. NaN where"
            " the slope is not negative: stiffness does not fall with distance there.",
        }
        result[f"{measure}_slope"].attrs = {
            "long_name": f"slope of {measure} stiffness",
            "units": "1",
            "description": f"Slope {fit}: stiffness per unit of cosine distance, any sign.",
        }
        result[f"{measure}_intercept"].attrs = {
            "long_name": f"intercept of {measure} stiffness",
            "units": "1",
            "description": f"Value at distance 0 {fit}; any sign.",
        }
        result[f"{measure}_inside"].attrs = {
            "long_name": f"critical length of {measure} stiffness is inside",
            "units": "1",
            "description": "True where the critical length lies within the distances that occur"
            " among these pairs; elsewhere it is an extrapolation.",
        }
    return result
