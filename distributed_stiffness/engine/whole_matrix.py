"""The whole-matrix check: every stored pair at once against sums that need no pair.

With unit gradients u and their sums U_a by class, the mean cosine of classes a and b is
U_a·U_b/(n_a n_b), self-pairs left out where a = b. A sum is one backward pass of Σ loss_i/|g_i|, so
that all of them cost as much as an epoch (`Reference.unit_sum`). The same means
follow from the tiles. A tile of other examples, a block that was left out or one that was put in
the wrong place moves them, wherever it is; a sample of pairs may miss it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distributed_stiffness.errors import GradientError
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, all_checkpoints

# What float32 norms and sums may add to the error of single cosines; and how much more than the
# norms of a sample those of others may be off.
ROUNDING, _MARGIN = 1e-6, 2.0
_TINY = 1e-290  # below, norms lose digits
SHARE = 4
FEW_EXAMPLES = 1000


def is_checked_whole(study: Study, checkpoint: Checkpoint) -> bool:
    """Whether this is the checkpoint of the study that is checked as a whole.

    The last iteration of the last rate and seed: it lies deepest in over-fitting, where numbers
    are hardest.
    """
    return checkpoint == list(all_checkpoints(*study.shape))[-1]


def allowed_difference(bound: float, norm_error: float = 0.0) -> float:
    """Return how far two means may lie from each other.

    Args:
        bound: on the error of single cosines.
        norm_error: of the norms that unit gradients are made with, relative: of large logits, whose
            last digits the size of a gradient is exponential in, it can be more than a cosine's.
    """
    return 2 * bound + ROUNDING + 2 * _MARGIN * norm_error


def norm_error(norms: np.ndarray, true: np.ndarray) -> float:
    """Return the largest relative error of some norms, of those that are no smaller than 1e-290."""
    there = true > _TINY
    return float(np.abs(norms[there] / true[there] - 1).max(initial=0.0))


def classes_to_check(
    labels: np.ndarray,
    *,
    n_parameters: int,
    n_checkpoints: int,
    memory: int,
    affordable: int,
) -> np.ndarray:
    """Return the classes that are checked, ascending; one at least.

    Their sums fit into half the memory, and their examples, whose gradients are made again in
    float64, are at most a quarter of those of the whole study, or a few; and no more than are
    affordable.
    """
    classes, counts = np.unique(labels, return_counts=True)
    examples = min(max(FEW_EXAMPLES, n_checkpoints * len(labels) // SHARE), affordable)
    fit = min(memory // (16 * n_parameters), int((counts.cumsum() <= examples).sum()))
    return classes[: max(1, fit)]


@dataclass(frozen=True)
class ClassMeans:
    """A check that held."""

    classes: int
    examples: int  # of these classes
    largest_difference: float  # of two means
    norm_error: float = 0.0  # of the norms that unit gradients are made with, relative


@dataclass
class ClassSums:
    """Sums of stored cosines by pair of classes.

    Args:
        labels: of all examples, (N,).
        classes: those which count, ascending.
    """

    labels: np.ndarray
    classes: np.ndarray
    totals: np.ndarray = field(init=False)  # (C, C) float64, self-pairs among them
    self_pairs: np.ndarray = field(init=False)  # (C,)

    def __post_init__(self) -> None:
        self._member_NC = (self.labels[:, None] == self.classes).astype(np.float64)
        self.totals = np.zeros((len(self.classes),) * 2)
        self.self_pairs = np.zeros(len(self.classes))

    def add(self, rows: slice, columns: slice, tile: np.ndarray) -> None:
        """Count the tile (I, J) of a symmetric matrix, and (J, I) with it."""
        part = self._member_NC[rows].T @ tile @ self._member_NC[columns]
        if rows == columns:
            self.totals += part
            self.self_pairs += np.diagonal(tile) @ self._member_NC[rows]
        else:
            self.totals += part + part.T

    def add_examples(self, sums: np.ndarray) -> None:
        """Count sums of each example's pairs with others, by class of these: (N, all classes)."""
        self.totals += self._member_NC.T @ sums[:, self.classes]

    def means(self, is_zero: np.ndarray, products: np.ndarray | None = None) -> np.ndarray:
        """Return the mean cosine of each pair of classes, (C, C); NaN where there is no pair.

        Args:
            is_zero: examples without a gradient, which are left out, (N,).
            products: U_a·U_b, (C, C), to take in place of the stored sums.
        """
        n = (~is_zero) @ self._member_NC
        totals, self_pairs = self.totals.copy(), self.self_pairs
        if products is not None:
            totals, self_pairs = products.copy(), n  # u_i·u_i = 1
        pairs = np.outer(n, n)
        totals[np.diag_indices_from(totals)] -= self_pairs
        pairs[np.diag_indices_from(pairs)] -= n
        means = np.full_like(totals, np.nan)
        np.divide(totals, pairs, out=means, where=pairs > 0)
        return means

    def compare(
        self,
        products: np.ndarray,
        *,
        is_zero: np.ndarray,
        bound: float,
        norm_error: float = 0.0,
    ) -> ClassMeans:
        """Compare with means that need no pairs.

        Args:
            products: U_a·U_b of sums of unit gradients, (C, C).
            is_zero: examples without a gradient, (N,).
            bound: on the error of one cosine.
            norm_error: as in `allowed_difference`.

        Raises:
            GradientError: they differ by more than that allows.
        """
        difference = np.abs(self.means(is_zero) - self.means(is_zero, products))
        largest = float(np.nanmax(difference, initial=0.0))
        if largest > allowed_difference(bound, norm_error):
            a, b = np.unravel_index(np.nanargmax(difference), difference.shape)
            raise GradientError(
                f"the whole-matrix check failed: the mean cosine of classes {self.classes[a]} and"
                f" {self.classes[b]} over all stored pairs is {largest:.2g} away from what sums of"
                f" their gradients give, and the error bound is {bound:.2g}. Run `stiffness verify"
                " --repair` to find and mend what is wrong"
            )
        n = int((self._member_NC.sum(1) > 0).sum())
        return ClassMeans(len(self.classes), n, largest, norm_error)
