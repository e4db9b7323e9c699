"""The measures that others take of the same matrix, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from distributed_stiffness.analysis.alignment import alignment_of
from distributed_stiffness.analysis.coherence import coherence_of
from distributed_stiffness.analysis.confusion import confusion_of
from distributed_stiffness.analysis.pairs import Splits
from distributed_stiffness.analysis.selection import Selection, one_set
from distributed_stiffness.analysis.spectrum import participation_of


def neighbours(
    ds: xr.Dataset, *, kernels: Sequence[str] | None = None, splits: Splits | None = None
) -> xr.Dataset:
    """Return every neighbouring measure that a store has the numbers for; the chunks are read once.

    Args:
        ds: a store. One of sums has no `gradient_confusion`, which is of single pairs.
        kernels: as in `gradient_coherence`.
        splits: of rows and columns, as in `class_matrix`; both the same.

    Returns:
        Lazy Dataset with the variables of `gradient_coherence`, `gradient_confusion`,
        `participation_ratio` and `kernel_alignment`.

    Raises:
        DataError: rows and columns are different examples, or the store lacks a kernel's numbers.
    """
    return neighbours_of(one_set(ds, kernels, splits))


def neighbours_of(selection: Selection) -> xr.Dataset:
    """As `neighbours`, of a selection."""
    result = coherence_of(selection)
    of_pairs = (confusion_of,) if selection.keeps_pairs else ()
    of_squares = (participation_of, alignment_of) if selection.keeps_squares else ()
    for more in (*of_pairs, *of_squares):
        result = result.merge(more(selection), join="exact", compat="override")
    return result
