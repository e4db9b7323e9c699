"""Standard errors of a class matrix, and of means of its cells.

A cell C(a, b) changes when an example of a (one of its rows) or of b (one of its columns) is left
out. Cells that share a class share examples: the error of a mean of cells comes from what each
example does to that mean, never from the errors of the cells.

Legend as in `jackknife`: E examples, C groups (rows a, columns b), S sums, 2 measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distributed_stiffness.analysis.jackknife import Examples, changes, means, spread


def group_totals(examples: Examples, as_row: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Add up the rows of each group: sums (E, C, S) to (C, C, S)."""
    return _totals(as_row, examples.groups)


def cell_errors(examples: Examples, as_row: np.ndarray, as_column: np.ndarray) -> np.ndarray:
    """Return the standard error of every cell (C, C, 2), from sums (E, C, S) of each example."""
    in_row, in_column = _cell_changes(examples, as_row, as_column)
    variance = _by_group(in_row, examples) + _by_group(in_column, examples).swapaxes(0, 1)
    return np.asarray(np.sqrt(variance))


def mean_errors(
    masks: Sequence[np.ndarray],
    examples: Examples,
    as_row: np.ndarray,
    as_column: np.ndarray,
) -> np.ndarray:
    """Return the standard errors of the means over two sets of cells, and of their difference.

    Args:
        masks: two of (C, C), true for the cells of a set; cells without a pair count in none.
        examples: of the selection.
        as_row: sums (E, C, S) over each example's pairs as a row.
        as_column: as a column.

    Returns:
        (3, 2): of the first mean, the second, and the first minus the second.
    """
    there = np.isfinite(means(_totals(as_row, examples.groups)))
    in_row, in_column = _cell_changes(examples, as_row, as_column)
    first, second = (
        _change_of_mean(mask[..., None] & there, in_row, in_column, examples.groups)
        for mask in masks
    )
    change = np.stack([first, second, first - second], axis=1)
    return np.asarray(np.sqrt(spread(change, _strata(examples, len(there))).sum(0)))


def pooled_errors(examples: Examples, as_row: np.ndarray, as_column: np.ndarray) -> np.ndarray:
    """Return the standard errors of the means over pairs (2, 2): within a group, and between.

    Classes are no strata here: how many examples each has is as much a matter of chance.
    """
    lost = as_row + as_column
    within = lost[np.arange(len(lost)), examples.groups]
    both = np.stack([within, lost.sum(1) - within], axis=1)
    return np.asarray(np.sqrt(spread(changes(both), examples.roles).sum(0)))


def _cell_changes(
    examples: Examples, as_row: np.ndarray, as_column: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how cells change without each example: (E, C, 2) in its row of cells and its column.

    Entry (e, b) is of the cell (group of e, b) in the first and of (b, group of e) in the second;
    the cell that is in both counts in the first alone.
    """
    groups = examples.groups
    own = np.arange(len(groups)), groups
    totals = _totals(as_row, groups)
    left = totals[groups]
    left -= as_row
    left[own] -= as_column[own]
    in_row = means(left) - means(totals)[groups]
    if as_column is as_row:  # a symmetric matrix
        # A store that is half written may hold (i, j) without (j, i): the sums tell too little.
        in_row[(totals[..., 2:] != totals.swapaxes(0, 1)[..., 2:])[groups]] = np.nan
        in_column = in_row.copy()
    else:
        totals = totals.swapaxes(0, 1)
        in_column = means(totals[groups] - as_column) - means(totals)[groups]
    in_column[own] = 0
    return in_row, in_column


def _totals(as_row: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Add up the rows of each group: (E, C, S) to (C, C, S)."""
    member = (groups == np.arange(as_row.shape[1])[:, None]).astype(np.float64)
    return np.asarray(np.tensordot(member, as_row, axes=1))


def _strata(examples: Examples, n_groups: int) -> np.ndarray:
    """Number the samples that the examples are: one for each role and group."""
    return np.asarray(examples.groups + n_groups * examples.roles)


def _by_group(change: np.ndarray, examples: Examples) -> np.ndarray:
    """Add up what the examples of each group add to the variance: (E, C, 2) to (C, C, 2)."""
    n, n_roles = change.shape[1], int(examples.roles.max()) + 1
    variance = spread(change, _strata(examples, n), n * n_roles)
    return np.asarray(variance.reshape(n_roles, n, *change.shape[1:]).sum(0))


def _change_of_mean(
    cells: np.ndarray, in_row: np.ndarray, in_column: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Return the change (E, 2) of the mean over `cells` (C, C, 2) without each example."""
    of_row = np.where(cells[groups], in_row, 0).sum(1)
    of_column = np.where(cells.swapaxes(0, 1)[groups], in_column, 0).sum(1)
    n = cells.sum((0, 1))
    return np.asarray((of_row + of_column) / np.where(n > 0, n, np.nan))
