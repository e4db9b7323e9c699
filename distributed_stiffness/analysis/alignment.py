"""Kernel-target alignment: how far the loss-gradient kernel groups examples as their labels do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.pairs import Splits
from distributed_stiffness.analysis.products import Sums, kernel_sums, named, ratio
from distributed_stiffness.analysis.selection import Selection, one_set

_ATTRS = {
    "alignment": {
        "long_name": "centred kernel-target alignment",
        "units": "1",
        "description": "Cosine between the centred kernel of loss gradients and the centred kernel"
        " of labels, self-pairs in both; in [-1, 1]. Loss gradients know their labels, so that it"
        " is above 0 in a network that has learnt nothing.",
    }
}


def kernel_alignment(
    ds: xr.Dataset, *, kernels: Sequence[str] | None = None, splits: Splits | None = None
) -> xr.Dataset:
    """Return the centred alignment of the loss-gradient kernel with the labels.

    ⟨HKH, HYH⟩ / (‖HKH‖ ‖HYH‖), H = I − 11ᵀ/n (Cortes, Mohri and Rostamizadeh, JMLR 2012; after
    Cristianini et al. 2001), Y_ij = 1 for two examples of one class, else −1/(C − 1); what is added
    to all of Y, or multiplied with it, changes nothing. Self-pairs count, as in the definition. K
    is the kernel of loss gradients, not the neural tangent kernel.

    Args:
        ds: a store, of pairs or of sums.
        kernels: as in `gradient_coherence`.
        splits: of rows and columns, as in `class_matrix`; both the same.

    Returns:
        Lazy Dataset over leading dimensions + (kernel): alignment, and alignment_error by jackknife
        over examples (float64). Both are NaN where a pair is not computed yet; the error also of
        sums and of more than 2,000 examples, since it takes K·K·1, for which the matrix is looked
        at twice.

    Raises:
        DataError: rows and columns are different examples, or the store lacks a kernel's numbers.
    """
    return alignment_of(one_set(ds, kernels, splits))


def alignment_of(selection: Selection) -> xr.Dataset:
    """As `kernel_alignment`, of a selection."""
    selection.require_squares("the alignment with the labels")
    sums = kernel_sums(selection, squares=True, product=True)
    pair = sums.value_and_error(_alignments, {"value": 1})
    return selection.described(*named(pair, _ATTRS))


def _alignments(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return the alignment (K, 1), and that without each example (E, K, 1)."""
    row = sums.others + sums.diagonal
    in_class = sums.member[..., None] * sums.one_hot  # (E, K, C)
    n_c = in_class.sum(0, keepdims=True)
    by_class, by_class_without = sums.class_totals()
    same, squares = sums.own + sums.diagonal, sums.squares + sums.diagonal**2
    value = _aligned(n_c, by_class, same.sum(0), squares.sum(0), np.square(row).sum(0), row.sum(0))
    without = _aligned(
        n_c - in_class,
        by_class_without,
        same.sum(0) - 2 * sums.own - sums.diagonal,
        squares.sum(0) - 2 * sums.squares - sums.diagonal**2,
        # Σ over j ≠ i of (row_j − K_ij)²
        np.square(row).sum(0) - row**2 - 2 * (sums.product - row * sums.diagonal) + sums.squares,
        row.sum(0) - 2 * row + sums.diagonal,
    )
    return value[0, :, None], without[..., None]


def _aligned(
    n_c: np.ndarray,
    by_class: np.ndarray,
    same: np.ndarray,
    squares: np.ndarray,
    row_squares: np.ndarray,
    total: np.ndarray,
) -> np.ndarray:
    """Return the alignment from sums over the kernel, its diagonal in all of them.

    Args:
        n_c: (…, C) examples of each class.
        by_class: (…, C) sum of the rows of each class.
        same: (…) sum over pairs of one class.
        squares: (…) sum of squares.
        row_squares: (…) sum of the squares of the sums of rows.
        total: (…) sum.
    """
    n, second, third = n_c.sum(-1), (n_c**2).sum(-1), (n_c**3).sum(-1)
    product = same - 2 * ratio((n_c * by_class).sum(-1), n) + ratio(total * second, n**2)
    kernel = squares - 2 * ratio(row_squares, n) + ratio(total**2, n**2)
    labels = second - 2 * ratio(third, n) + ratio(second**2, n**2)
    norms = np.sqrt(np.maximum(kernel, 0)) * np.sqrt(np.maximum(labels, 0))
    return ratio(product, norms)
