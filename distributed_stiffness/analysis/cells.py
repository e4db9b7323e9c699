"""Standard errors of a class matrix, and of means of its cells.

A cell C(a, b) changes when an example of a (one of its rows) or of b (one of its columns) is left
out. Cells that share a class share examples: the error of a mean of cells comes from what each
example does to that mean, never from the errors of the cells.

Legend as in `jackknife`: E examples, C groups (rows a, columns b), S sums, 2 measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distributed_stiffness.analysis.jackknife import (
    Examples,
    changes,
    means,
    slabs,
    spread,
    spread_in_slabs,
)


def group_totals(examples: Examples, as_row: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Add up the rows of each group: sums (E, C, S) to (C, C, S)."""
    totals = np.zeros((as_row.shape[1], *as_row.shape[1:]))
    for some in slabs(len(as_row)):
        member = examples.groups[some] == np.arange(len(totals))[:, None]
        totals += np.tensordot(member.astype(np.float64), as_row[some], axes=1)
    return totals


def cell_errors(examples: Examples, as_row: np.ndarray, as_column: np.ndarray) -> np.ndarray:
    """Return the standard error of every cell (C, C, 2), from sums (E, C, S) of each example."""
    n, n_roles = as_row.shape[1], int(examples.roles.max()) + 1
    cells = _Cells.of(examples, as_row, as_column)
    of_strata = spread_in_slabs(
        lambda some: np.stack(cells.changes(some), axis=1), _strata(examples, n), n * n_roles
    )
    in_row, in_column = np.moveaxis(of_strata.reshape(n_roles, n, 2, n, 2).sum(0), 1, 0)
    return np.asarray(np.sqrt(in_row + in_column.swapaxes(0, 1)))


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
    cells = _Cells.of(examples, as_row, as_column)
    chosen = [mask[..., None] & np.isfinite(cells.means) for mask in masks]

    def changes_of(some: slice) -> np.ndarray:
        in_row, in_column = cells.changes(some)
        groups = examples.groups[some]
        first, second = (_change_of_mean(set_, in_row, in_column, groups) for set_ in chosen)
        return np.stack([first, second, first - second], axis=1)

    return np.asarray(
        np.sqrt(spread_in_slabs(changes_of, _strata(examples, len(cells.means))).sum(0))
    )


def pooled_errors(examples: Examples, as_row: np.ndarray, as_column: np.ndarray) -> np.ndarray:
    """Return the standard errors of the means over pairs (2, 2): within a group, and between.

    Classes are no strata here: how many examples each has is as much a matter of chance.
    """
    own = np.arange(len(as_row)), examples.groups
    within = as_row[own] + as_column[own]
    lost = np.stack([within, as_row.sum(1) + as_column.sum(1) - within], axis=1)
    change = changes(lost.sum(0) / 2, lost)
    return np.asarray(np.sqrt(spread(change, examples.roles).sum(0)))


@dataclass(frozen=True)
class _Cells:
    """The cells of a class matrix, and how they change without each example."""

    examples: Examples
    as_row: np.ndarray  # (E, C, S)
    as_column: np.ndarray  # the same array where the matrix is symmetric
    totals: np.ndarray  # (C, C, S)
    means: np.ndarray  # (C, C, 2)
    one_sided: np.ndarray  # (C, C, 2) bool, pairs (i, j) are there without their (j, i)

    @classmethod
    def of(cls, examples: Examples, as_row: np.ndarray, as_column: np.ndarray) -> _Cells:
        totals = group_totals(examples, as_row, as_column)
        # A store that is half written may hold (i, j) without (j, i): the sums tell too little.
        one_sided = totals[..., 2:] != totals.swapaxes(0, 1)[..., 2:]
        return cls(examples, as_row, as_column, totals, means(totals), one_sided)

    def changes(self, some: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return how cells change without some examples (e, C, 2), in their row and their column.

        Entry (e, b) is of the cell (group of e, b) in the first and of (b, group of e) in the
        second; the cell that is in both counts in the first alone.
        """
        groups, as_row, as_column = (
            part[some] for part in (self.examples.groups, self.as_row, self.as_column)
        )
        own = np.arange(len(groups)), groups
        left = self.totals[groups]
        left -= as_row
        left[own] -= as_column[own]
        in_row = means(left) - self.means[groups]
        if self.as_column is self.as_row:
            in_row[self.one_sided[groups]] = np.nan
            in_column = in_row.copy()
        else:
            left = self.totals.swapaxes(0, 1)[groups]
            left -= as_column
            in_column = means(left) - self.means.swapaxes(0, 1)[groups]
        in_column[own] = 0
        return in_row, in_column


def _strata(examples: Examples, n_groups: int) -> np.ndarray:
    """Number the samples that the examples are: one for each role and group."""
    return np.asarray(examples.groups + n_groups * examples.roles)


def _change_of_mean(
    cells: np.ndarray, in_row: np.ndarray, in_column: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Return the change (e, 2) of the mean over `cells` (C, C, 2) without each example."""
    of_row = np.where(cells[groups], in_row, 0).sum(1)
    of_column = np.where(cells.swapaxes(0, 1)[groups], in_column, 0).sum(1)
    n = cells.sum((0, 1))
    return np.asarray((of_row + of_column) / np.where(n > 0, n, np.nan))
