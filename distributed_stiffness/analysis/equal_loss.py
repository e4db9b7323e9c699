"""Runs at equal training loss: what v1 and v2 of the paper compare learning rates at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from distributed_stiffness.errors import DataError


def at_equal_loss(result: xr.Dataset, loss: float) -> xr.Dataset:
    """Interpolate a result along iteration to where each run first reaches a training loss.

    Between the two checkpoints around it every number is taken as linear in the logarithm of the
    training loss. Both checkpoints' errors come from the same examples; they are added as if they
    moved together, so that the error of the interpolated number is never too small on that account.

    Args:
        result: of any reduction of a store with training curves, or of `checkpoint_curves`.
        loss: training loss, above 0.

    Returns:
        The same variables without the dimension iteration, lazy as they were; NaN for a run that
        never reaches the loss, or starts below it. Counts and flags are the smaller of the two
        checkpoints'; p-values are left out. The coordinate iteration tells at which step a run gets
        there, train_loss is `loss`, and the attribute never_reached names the runs that do not.

    Raises:
        DataError: there are no training losses or no iterations, or no run reaches the loss.
    """
    if "iteration" not in result.dims or "train_loss" not in result.variables:
        raise DataError(
            "expected a result over iterations that carries train_loss, found"
            f" {sorted(map(str, result.variables))}: take a reduction of a whole store"
        )
    if not loss > 0:
        raise DataError(f"loss is {loss!r}: expected a number above 0")
    losses = result["train_loss"].reset_coords(drop=True).compute()
    before, share = _crossing(losses, loss)
    reached = share.notnull()
    if not reached.any():
        raise DataError(
            f"no run passes a training loss of {loss:g}: theirs are between"
            f" {float(losses.min()):g} and {float(losses.max()):g} at the checkpoints"
        )
    done = _interpolated(result, before, share)
    done["train_loss"] = xr.DataArray(float(loss), attrs=losses.attrs)
    done = done.set_coords("train_loss").assign_attrs(result.attrs)
    return done.assign_attrs(never_reached="; ".join(_names(reached)))


def common_losses(train_loss: xr.DataArray, count: int = 3) -> list[float]:
    """Return training losses that every run passes, evenly spread in their logarithm.

    From the least with which a run starts to the highest at which one ends, without both ends;
    descending. Empty where a run ends above where another starts.
    """
    runs = [dim for dim in train_loss.dims if dim != "iteration"]
    low = float(train_loss.min("iteration").max(runs))
    high = float(train_loss.isel(iteration=0).min(runs))
    if not 0 < low < high:
        return []
    return [float(loss) for loss in np.geomspace(high, low, count + 2)[1:-1]]


def at_equal_losses(result: xr.Dataset, losses: Sequence[float] | None = None) -> xr.Dataset:
    """Interpolate a result to several training losses: `at_equal_loss` for each, side by side.

    Args:
        result: as there.
        losses: training losses; None: three that every run passes (`common_losses`).

    Returns:
        As there, along the first dimension `train_loss`.

    Raises:
        DataError: as there, or there is no loss that every run passes.
    """
    if losses is None:
        if "iteration" not in result.dims or "train_loss" not in result.variables:
            raise DataError("expected a result over iterations that carries train_loss")
        losses = common_losses(result["train_loss"].compute())
    if not losses:
        raise DataError("there is no training loss that every run passes: train longer, or give it")
    parts = [at_equal_loss(result, loss) for loss in losses]
    missed = {name for part in parts for name in part.attrs["never_reached"].split("; ") if name}
    found: xr.Dataset = xr.concat(
        parts, dim="train_loss", coords="different", compat="equals", combine_attrs="override"
    )
    return found.assign_attrs(never_reached="; ".join(sorted(missed)))


def _crossing(losses: xr.DataArray, loss: float) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the checkpoint before the loss is reached, and how far on to the next; NaN: never."""
    logs = losses.copy(data=np.log(np.maximum(losses.values, np.finfo(np.float64).tiny)))
    wanted, last = np.log(loss), losses.sizes["iteration"] - 1
    passes = (logs > wanted) & (logs.shift(iteration=-1) <= wanted)
    before = passes.argmax("iteration")
    first = logs.isel(iteration=before)
    second = logs.isel(iteration=(before + 1).clip(max=last))
    share = ((first - wanted) / (first - second)).where(passes.any("iteration"))
    at_once = logs.isel(iteration=0) == wanted
    return before.where(~at_once, 0), share.where(~at_once, 0.0).reset_coords(drop=True)


def _interpolated(result: xr.Dataset, before: xr.DataArray, share: xr.DataArray) -> xr.Dataset:
    left_out = [name for name in result.data_vars if str(name).endswith("_p_value")]
    on_steps = [name for name, c in result.coords.items() if "iteration" in c.dims]
    numbers = result.drop_vars(left_out).assign(step=result["iteration"].astype(np.float64))
    numbers = numbers.reset_coords([name for name in on_steps if name != "iteration"])
    after = (before + 1).clip(max=result.sizes["iteration"] - 1)
    first, second = (numbers.isel(iteration=place) for place in (before, after))
    between = {
        name: _between(first[name], second[name], share)
        for name, variable in numbers.data_vars.items()
        if "iteration" in variable.dims
    }
    done = numbers.drop_dims("iteration").assign(between)
    return done.rename(step="iteration").set_coords({*on_steps, "iteration"})


def _between(first: xr.DataArray, second: xr.DataArray, share: xr.DataArray) -> xr.DataArray:
    first, second = (at.reset_coords(drop=True) for at in (first, second))
    if first.dtype.kind in "biu":
        least = first.where(first < second, second).where(share.notnull(), first.dtype.type(0))
        return least.assign_attrs(first.attrs)
    # A number that is missing matters only where it has a share.
    mixed = (first * (1 - share)).where(share < 1, 0.0) + (second * share).where(share > 0, 0.0)
    return mixed.where(share.notnull()).assign_attrs(first.attrs)


def _names(reached: xr.DataArray) -> list[str]:
    """Name the runs that are not reached by their coordinates."""
    if not reached.dims:
        return []
    return [
        ", ".join(
            f"{dim} {reached[dim].values[k]:g}" for dim, k in zip(reached.dims, at, strict=True)
        )
        for at in np.argwhere(~reached.values)
    ]
