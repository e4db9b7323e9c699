"""What a study that keeps sums writes in place of a tile (docs/design/0007-sums.md).

A tile (I, J) becomes sums over the pairs of each example of I with those of J (of cosines by class
and by distance, of cosines times norms, of squares), and a count of its pairs near zero. Each has
one place in the store, so that a tile which is done twice is written twice and counted once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_stiffness.analysis.reduced import RELATIONS
from distributed_stiffness.analysis.selection import KERNELS
from distributed_stiffness.analysis.sums import SUMS
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.folding import Folded, count_exponents, fold
from distributed_stiffness.errors import StudyError
from distributed_stiffness.gradients.gram import folded_product
from distributed_stiffness.gradients.precision import product_of_rows
from distributed_stiffness.store import EXPONENTS

_SAMPLE = 1000  # examples whose distances say where the bins are
_MARGIN = 1.1  # the largest distance of all against that of the sample


@dataclass(frozen=True)
class TileSums:
    """What is kept of one tile (I, J)."""

    class_sums: np.ndarray  # (i, splits, C, S) float64
    distance_sums: np.ndarray  # (i, splits, r, k, S) float64
    weighted_sums: np.ndarray  # (i, splits, C) float64
    square_sums: np.ndarray  # (i, splits, kernels) float64
    near_zero: np.ndarray  # (exponents,) int64, pairs with 0 < |cosine| < 2**exponent, once each

    @classmethod
    def of(cls, folded: Folded, near_zero: np.ndarray) -> TileSums:
        """Give sums their names in the store."""
        return cls(
            class_sums=folded.by_class,
            distance_sums=folded.by_distance,
            weighted_sums=folded.weighted,
            square_sums=folded.squares,
            near_zero=near_zero,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the sums, as `bytes_of_sums` counts them."""
        sums = (self.class_sums, self.distance_sums, self.weighted_sums, self.square_sums)
        return sum(array.nbytes for array in sums)


def bytes_of_sums(data: StudyData, bins: int) -> int:
    """Return the bytes that one example's sums over one tile's columns take."""
    n_classes = data.labelled.n_classes
    by_class_and_distance = len(SUMS) * (n_classes + len(RELATIONS) * bins)
    numbers = by_class_and_distance + n_classes + len(KERNELS)
    return 8 * numbers * len(splits_of(data))


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
        self._splits = np.array([self.splits.index(name) for name in data.split])
        self._classes = np.array(data.examples.labels, dtype=np.int64)
        # A task's tiles share their columns.
        self._unit_inputs = functools.lru_cache(maxsize=4)(
            lambda start, stop: _unit_inputs(data, slice(start, stop))
        )

    def tile(
        self, rows: slice, columns: slice, cosine: np.ndarray, norms: np.ndarray
    ) -> tuple[TileSums, TileSums | None]:
        """Return what is kept of a tile (I, J), and of its mirror (J, I) if it is another.

        Args:
            rows: examples of I.
            columns: examples of J.
            cosine: (i, j) float32, finite.
            norms: of the gradients of all examples, (N,) float64; only those of I and J are looked
                at.
        """
        X, Y = (self._unit_inputs(part.start, part.stop) for part in (rows, columns))
        distance = (1 - product_of_rows(X, Y)).numpy()
        near_zero = count_near_zero(cosine, diagonal=rows == columns)
        tile = TileSums.of(self._folded(cosine, distance, (rows, columns), norms), near_zero)
        if rows == columns:
            return tile, None
        mirror = self._folded(cosine.T, distance.T, (columns, rows), norms)
        # Each pair is counted once.
        return tile, TileSums.of(mirror, np.zeros_like(near_zero))

    def _folded(
        self,
        cosine: np.ndarray,
        distance: np.ndarray,
        tile: tuple[slice, slice],
        norms: np.ndarray,
    ) -> Folded:
        rows, columns = tile
        return fold(
            cosine,
            distance,
            first=(rows.start, columns.start),
            classes=self._classes,
            splits=self._splits,
            norms=norms,
            edges=self.edges,
            n_splits=len(self.splits),
            n_classes=self.n_classes,
        )


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


def count_near_zero(cosine: np.ndarray, *, diagonal: bool) -> np.ndarray:
    """Count the pairs with 0 < |cosine| < 2**e for each exponent e, (exponents,) int64.

    Of a tile on the diagonal each pair is counted once, and self-pairs are not.
    """
    counts = count_exponents(cosine, diagonal=diagonal)
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
