"""Seeds as replicates: the mean over runs, and how far runs differ."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import xarray as xr

from distributed_stiffness.errors import DataError


def over_seeds(result: xr.Dataset) -> xr.Dataset:
    """Average a result over seeds, with the standard error over seeds beside that over examples.

    They answer two questions. NAME_error is of these networks: what other examples would change.
    NAME_seed_error is of the training: what other seeds would change, as far as those that were run
    tell. Where runs are compared (learning rates, models) the second comes first.

    Args:
        result: of any reduction, with the dimension seed.

    Returns:
        The same variables without the dimension, averaged over the seeds that have a number; flags
        are true where all seeds' are, p-values the largest. NAME_error is the mean of the seeds'
        errors: their examples are the same, so that it does not shrink with their number. Where a
        variable has an error there is also NAME_seed_error, the standard deviation over seeds / √n;
        NaN with fewer than two seeds.

    Raises:
        DataError: there is no dimension seed.
    """
    if "seed" not in result.dims:
        raise DataError(f"there is no dimension seed, only {sorted(map(str, result.dims))}")
    of_runs = [name for name, c in result.coords.items() if "seed" in c.dims and name != "seed"]
    everything = result.reset_coords(of_runs)
    averaged = {name: _average(name, variable) for name, variable in everything.data_vars.items()}
    averaged |= {
        f"{name}_seed_error": _seed_error(everything[name])
        for name in result.data_vars
        if f"{name}_error" in result
    }
    return (
        everything.drop_vars(["seed", *everything.data_vars]).assign(averaged).set_coords(of_runs)
    )


def _average(name: Hashable, variable: xr.DataArray) -> xr.DataArray:
    if "seed" not in variable.dims:
        return variable
    if str(name).endswith("_p_value"):
        return variable.max("seed", skipna=False, keep_attrs=True)
    if variable.dtype == bool:
        return variable.all("seed", keep_attrs=True)
    return variable.mean("seed", skipna=True, keep_attrs=True)


def _seed_error(variable: xr.DataArray) -> xr.DataArray:
    n = variable.notnull().sum("seed")
    centred = variable - variable.mean("seed", skipna=True)
    variance = (centred**2).sum("seed") / (n - 1).where(n > 1)
    return ((variance / n) ** 0.5).assign_attrs(_attrs(variable.attrs))


def _attrs(of: Mapping[Hashable, Any]) -> dict[str, str]:
    return {
        "long_name": f"standard error over seeds of {of.get('long_name', 'the mean')}",
        "units": "1",
        "description": "Standard deviation over seeds divided by the root of their number; 0 or"
        " more, NaN with fewer than two seeds.",
    }
