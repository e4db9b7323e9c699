"""What a study that keeps sums writes in place of a tile (docs/design/0007-sums.md).

A tile (I, J) becomes sums over the pairs of each example of I with those of J, by class and by
distance, and a count of its pairs near zero. Each has one place in the store, so that a tile which
is done twice is written twice and counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_stiffness.analysis.sums import SUMS
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.errors import StudyError
from distributed_stiffness.gradients.gram import folded_product
from distributed_stiffness.store import EXPONENTS

SLAB = 32  # rows folded at a time
LARGEST = 2**22  # places of sums that are worked on at a time
_ZERO, _KINDS = 3, 4  # pairs that harm, do neither, help; and those with a zero gradient
_SAMPLE = 1000  # examples whose distances say where the bins are
_MARGIN = 1.1  # the largest distance of all against that of the sample


@dataclass(frozen=True)
class TileSums:
    """What is kept of one tile (I, J)."""

    class_sums: np.ndarray  # (i, splits, C, S) float64
    distance_sums: np.ndarray  # (i, splits, r, k, S) float64
    near_zero: np.ndarray  # (exponents,) int64, pairs with 0 < |cosine| < 2**exponent, once each


class Folding:
    """Turns tiles into sums.

    Args:
        data: of the study.
        edges: of the distance bins; what lies beyond the outermost is counted in these bins.
    """

    def __init__(self, data: StudyData, edges: np.ndarray) -> None:
        self.data, self.edges = data, edges
        self.splits = splits_of(data)
        self.n_classes = data.labelled.n_classes
        split = torch.tensor([self.splits.index(name) for name in data.split])
        self._classes = torch.from_numpy(np.array(data.examples.labels, dtype=np.int64))
        self._groups = split * self.n_classes + self._classes

    def tile(
        self, rows: slice, columns: slice, cosine: np.ndarray, zero: np.ndarray
    ) -> tuple[TileSums, TileSums | None]:
        """Return what is kept of a tile (I, J), and of its mirror (J, I) if it is another.

        Args:
            rows: examples of I.
            columns: examples of J.
            cosine: (i, j) float32, finite.
            zero: examples without a gradient, (N,).
        """
        C, D = torch.from_numpy(cosine), distances(self.data, rows, columns)
        gone = torch.from_numpy(zero)
        tile = self._folded(rows, columns, C, D, gone)
        near_zero = count_near_zero(C, diagonal=rows == columns)
        if rows == columns:
            return TileSums(*tile, near_zero), None
        mirror = self._folded(columns, rows, C.T.contiguous(), D.T.contiguous(), gone)
        # Each pair is counted once.
        return TileSums(*tile, near_zero), TileSums(*mirror, np.zeros_like(near_zero))

    def _folded(
        self, rows: slice, columns: slice, cosine: Tensor, distance: Tensor, zero: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return class and distance sums of a tile, some rows at a time."""
        step = max(SLAB, LARGEST // self._size)
        parts = []
        for start in range(0, len(cosine), step):
            part = slice(start, start + step)
            some = slice(rows.start + start, min(rows.start + part.stop, rows.stop))
            parts.append(self._folded_rows(some, columns, cosine[part], distance[part], zero))
        by_class, by_distance = zip(*parts, strict=True)
        return torch.cat(by_class).numpy(), torch.cat(by_distance).numpy()

    def _folded_rows(
        self, rows: slice, columns: slice, cosine: Tensor, distance: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add up the pairs of some rows by one index: split and class of the other, bin, kind.

        Sums by class and by distance are added up from these.
        """
        n, size = len(cosine), self._size
        total = torch.zeros(n, size + 1, dtype=torch.float64)
        count = torch.zeros(n, (size + 1) * _KINDS, dtype=torch.int32)
        for start in range(0, n, SLAB):  # what is made of a few rows stays in the cache
            slab = slice(start, min(start + SLAB, n))
            some = slice(rows.start + slab.start, rows.start + slab.stop)
            place = self._places(some, columns, distance[slab])
            kind = torch.sign(cosine[slab]).to(torch.int64).add_(1)
            kind[zero[some].unsqueeze(1) | zero[columns]] = _ZERO
            total[slab].scatter_add_(1, place, cosine[slab].double())
            one = torch.ones(1, 1, dtype=torch.int32).expand_as(place)
            count[slab].scatter_add_(1, place.mul_(_KINDS).add_(kind), one)
        harms, neutral, helps, none = count.view(n, -1, _KINDS)[:, :size].double().unbind(2)
        pairs = harms + neutral + helps
        sums = torch.stack([total[:, :size], helps - harms, pairs, pairs + none], dim=2)
        sums = sums.view(n, len(self.splits), self.n_classes, -1, len(SUMS))
        within = sums[torch.arange(n), :, self._classes[rows]]
        return sums.sum(3), torch.stack([within, sums.sum(2) - within], dim=2)

    def _places(self, rows: slice, columns: slice, distance: Tensor) -> Tensor:
        """Return the place of each pair by split, class and bin; one of its own to self-pairs."""
        bins, first, last = len(self.edges) - 1, float(self.edges[0]), float(self.edges[-1])
        place = ((distance - first) * (bins / (last - first))).to(torch.int64)
        place.clamp_(0, bins - 1).add_(self._groups[columns] * bins)
        if columns.start <= rows.start < columns.stop:
            place[:, rows.start - columns.start :].fill_diagonal_(self._size)
        return place

    @property
    def _size(self) -> int:
        return len(self.splits) * self.n_classes * (len(self.edges) - 1)


def splits_of(data: StudyData) -> list[str]:
    """Return the splits that the examples are of, in order."""
    return list(dict.fromkeys(data.split))


def distances(data: StudyData, rows: slice | np.ndarray, columns: slice | np.ndarray) -> Tensor:
    """Return 1 − x_i·x_j/(|x_i||x_j|) of inputs as the network sees them, (i, j) float32."""
    X, Y = _unit_inputs(data, rows), _unit_inputs(data, columns)
    return 1 - folded_product(X, Y).clamp_(-1.0, 1.0)


def _unit_inputs(data: StudyData, examples: slice | np.ndarray) -> torch.Tensor:
    X = torch.from_numpy(data.features(examples))
    length = torch.linalg.vector_norm(X, dim=1, dtype=torch.float64)
    return X / torch.where(length > 0, length, 1.0).unsqueeze(1).to(X.dtype)


def bin_edges(data: StudyData, bins: int) -> np.ndarray:
    """Return equal bins over the distances that a sample of the examples has, and a margin.

    Raises:
        StudyError: there is no bin.
    """
    if bins < 1:
        raise StudyError(f"distance_bins is {bins}: expected 1 or more")
    n = data.n_examples
    sample = np.sort(np.random.default_rng(0).choice(n, size=min(n, _SAMPLE), replace=False))
    found = distances(data, sample, sample)
    largest = min(2.0, _MARGIN * float(found.max()))
    return np.linspace(0.0, largest if largest > 0 else 2.0, bins + 1)


def count_near_zero(cosine: Tensor, *, diagonal: bool) -> np.ndarray:
    """Count the pairs with 0 < |cosine| < 2**e for each exponent e, (exponents,) int64.

    Of a tile on the diagonal each pair is counted once, and self-pairs are not.
    """
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(cosine), SLAB):
        some = cosine[start : start + SLAB]
        some = torch.triu(some, start + 1) if diagonal else some
        # The bits of a float32 hold its exponent: 126 for [1/2, 1).
        exponent = (some.abs().view(torch.int32) >> 23).flatten()
        counts += torch.bincount(exponent, minlength=256).numpy()
        counts[0] -= int((some == 0).sum())
    at = np.clip(np.arange(len(counts)) - 126 - EXPONENTS[0], 0, len(EXPONENTS) - 1)
    found = np.bincount(at, weights=counts, minlength=len(EXPONENTS))
    return found.astype(np.int64).cumsum()


def rounded_up(bound: float) -> tuple[float, int]:
    """Return the smallest power of two that is no less than a bound, and its place."""
    k = int(np.searchsorted(2.0**EXPONENTS, bound))
    k = min(k, len(EXPONENTS) - 1)
    return float(2.0 ** EXPONENTS[k]), k


def pair_reader(
    product: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return what `error_bound.sample_examples` reads cosines with, where none are stored.

    Args:
        product: makes the gradients of some examples and some others, and their cosines.
        size: examples whose gradients are made at a time.
    """

    def read(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), len(columns)), dtype=np.float32)
        for i in range(0, len(rows), size):
            for j in range(0, len(columns), size):
                found[i : i + size, j : j + size] = product(
                    rows[i : i + size], columns[j : j + size]
                )
        return found

    return read
