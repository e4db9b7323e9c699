"""Standard errors by jackknife over examples: what every mean would be without one example.

Pairs that share an example are dependent, so examples are left out one at a time, not pairs. Every
mean here is a ratio of sums over pairs, and without an example it is (T - t) / (P - p): T and P are
the sums over all pairs, t and p those over the pairs that the example is in. t and p come from the
row sums that one pass makes, and from column sums where the columns are other examples.

The variance is the sum over strata of (n-1)/n · Σ(mean without i - the mean of these)². With equal
counts that is, for one class, 4(n-1) / (n(n-2)²) · Σ(m_i - U)² and, for two, the two-sample form
(DeLong et al. 1988). It errs upwards (Efron and Stein 1981): where no example matters more than
another, errors are √2 too wide. See docs/design/0006-errors.md.

Legend of the arrays, which are those of one checkpoint: E examples, C groups, S sums (as in
`sums`), 2 measures (cosine, sign).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.identities import COLUMN_IDENTITY, ROW_IDENTITY
from distributed_stiffness.analysis.pairs import Grouping
from distributed_stiffness.errors import DataError

MEASURES = ("cosine", "sign")  # in the order of the last axis
# Examples whose sums are worked on at a time: a few copies of them all would take more memory than
# the matrix's chunks, and more time than those of a slab, which stay in the cache.
SLAB = 512
_BOTH, _ROW, _COLUMN = range(3)

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Examples:
    """The examples of a selection: each is left out once, with all its pairs.

    In a square selection every example is as often a row as a column. Its matrix is symmetric, as
    stores are, so that the sums of a column are those of its row. In any other, an example that was
    drawn several times is left out with all of its rows and columns.
    """

    groups: np.ndarray  # (E,) int64, group of each
    roles: np.ndarray  # (E,) int64, in rows and columns, in rows alone, or in columns alone
    rows: np.ndarray | None  # (N,) int64, which example each row is; None: a square selection
    columns: np.ndarray | None  # (M,) int64

    @property
    def square(self) -> bool:
        """Whether every example is as often a row as a column."""
        return self.rows is None

    def grouped(self, above: np.ndarray) -> Examples:
        """Return the same examples in groups of groups: `above` is the new one of each old."""
        return Examples(above[self.groups], self.roles, self.rows, self.columns)

    def sides(self, sums: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums over each example's pairs as a row, and as a column (E, …)."""
        if self.rows is None or self.columns is None:
            return sums[0], sums[0]
        n = len(self.groups)
        return _by_example(sums[0], self.rows, n), _by_example(sums[1], self.columns, n)


def _by_example(sums: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """Add up the rows of each of n examples; most have one."""
    out = np.zeros((n, *sums.shape[1:]))
    if len(np.unique(places)) == len(places):
        out[places] = sums
    else:
        np.add.at(out, places, sums)
    return out


def examples_of(chosen: xr.Dataset, groups: Grouping) -> Examples:
    """Return the examples of a selection, from `select` and `grouping`.

    Raises:
        DataError: an example has one group as a row and another as a column.
    """
    rows, columns = chosen[ROW_IDENTITY].values, chosen[COLUMN_IDENTITY].values
    known, place = np.unique(np.concatenate([rows, columns]), return_inverse=True)
    row_place, column_place = place[: len(rows)], place[len(rows) :]
    of_example = np.zeros(len(known), dtype=np.int64)
    of_example[column_place] = groups.columns
    of_example[row_place] = groups.rows
    if not (of_example[column_place] == groups.columns).all():
        raise DataError(
            f"an example differs in {groups.by!r} as a row and in 'other_{groups.by}' as a column:"
            " give both the same values"
        )
    is_row, is_column = (np.isin(known, some) for some in (rows, columns))
    if np.array_equal(np.sort(rows), np.sort(columns)):
        return Examples(groups.rows, np.full(len(rows), _BOTH), None, None)
    roles = np.where(is_row & is_column, _BOTH, np.where(is_row, _ROW, _COLUMN))
    return Examples(of_example, roles, row_place, column_place)


def leave_one_out(
    statistic: Statistic,
    examples: Examples,
    sums: Sequence[da.Array],
    lead: Sequence[Hashable],
    dims: Mapping[str, int],
) -> xr.DataArray:
    """Apply a function of each example's sums at every checkpoint, lazily.

    Args:
        statistic: from sums as a row and as a column (E, …, S) to an array of shape `dims`.
        examples: of the selection.
        sums: of rows (lead…, N, …, S), and of columns where the selection is not square.
        lead: names of the leading dimensions.
        dims: names and sizes of what the statistic returns.

    Returns:
        (lead…, dims…) float64.
    """
    n = len(lead)
    new_axes = dict(enumerate(dims.values(), start=n))
    arguments: list[Any] = []
    # In one piece, which all statistics share: each of them would put its own together.
    whole = [of_side.rechunk({n: -1}) for of_side in sums]
    for k, of_side in enumerate(whole, start=1):
        arguments += [of_side, (*range(n), *(100 * k + axis for axis in range(n, of_side.ndim)))]
    values = da.blockwise(
        partial(_at_each_checkpoint, statistic, examples, n),
        (*range(n), *new_axes),
        *arguments,
        new_axes=new_axes,
        concatenate=True,
        dtype=np.float64,
        meta=np.empty((0,) * (n + len(dims))),
    )
    return xr.DataArray(values, dims=(*lead, *dims))


def _at_each_checkpoint(
    statistic: Statistic, examples: Examples, n_lead: int, *sums: np.ndarray
) -> np.ndarray:
    lead = sums[0].shape[:n_lead]
    done = [
        statistic(*examples.sides([of_side[at] for of_side in sums])) for at in np.ndindex(lead)
    ]
    return np.stack(done).reshape(*lead, *done[0].shape)


def means(sums: np.ndarray) -> np.ndarray:
    """Divide sums by their pairs: (…, S) to (…, 2); NaN where there is no pair."""
    pairs = sums[..., 2:]
    ratio = np.full(pairs.shape, np.nan)
    np.divide(sums[..., :2], pairs, out=ratio, where=pairs > 0)
    return ratio


def changes(totals: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Return by how much every mean changes without each example: (e, …, S) to (e, …, 2).

    Args:
        totals: sums over all pairs (…, S), each pair once for every two of `lost` that it is in.
        lost: sums over the pairs that each of some examples is in.
    """
    return np.asarray(means(totals - lost) - means(totals))


def slabs(n: int) -> Iterator[slice]:
    """Yield n examples a few at a time."""
    for start in range(0, n, SLAB):
        yield slice(start, min(start + SLAB, n))


def spread(change: np.ndarray, strata: np.ndarray, n_strata: int = 0) -> np.ndarray:
    """As `spread_in_slabs`, of changes (E, …) that are at hand."""
    return spread_in_slabs(change.__getitem__, strata, n_strata)


def spread_in_slabs(
    changes_of: Callable[[slice], np.ndarray], strata: np.ndarray, n_strata: int = 0
) -> np.ndarray:
    """Return what the examples of each stratum add to the jackknife's variance.

    Args:
        changes_of: of some of the examples, (e, …) of a statistic without each; NaN where there is
            none then.
        strata: (E,) int64, from 0.
        n_strata: how many there are at least.

    Returns:
        (strata, …); NaN where the statistic hangs on one example.
    """
    n = np.bincount(strata, minlength=n_strata)
    total = squares = unknown = np.zeros(1)
    for some in slabs(len(strata)):
        change = changes_of(some)
        flat = change.reshape(len(change), -1)
        member = (strata[some] == np.arange(len(n))[:, None]).astype(np.float64)
        missing = np.isnan(flat)
        if missing.any():
            flat = np.where(missing, 0.0, flat)
            unknown = unknown + member @ missing
        total = total + member @ flat
        squares = squares + member @ flat**2
    size = np.maximum(n, 1)[:, None]
    variance = (1 - 1 / size) * np.maximum(squares - total**2 / size, 0)
    variance[((size == 1) & (squares > 0)) | (unknown > 0)] = np.nan
    return np.asarray(variance.reshape(-1, *change.shape[1:]))


def error_attrs(of: Mapping[str, Any], hangs_on: str) -> dict[str, Any]:
    """Describe the standard error of a described variable."""
    return {
        "long_name": f"standard error of {of['long_name']}",
        "units": "1",
        "description": "By jackknife over examples, of the one network and of the pairs' mean; 0 or"
        f" more. NaN where {hangs_on}.",
    }
