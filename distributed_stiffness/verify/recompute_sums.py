"""Sums over the pairs of sampled examples, computed again from a checkpoint.

Axis letters: n sampled examples, M examples of a part J, S splits, C classes, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.tiling import Tiling, pieces
from distributed_stiffness.verify.recompute import MEMORY, Source, wrong_examples
from distributed_stiffness.verify.tile_sums import Labels


@dataclass
class SumsAgain:
    """What a checkpoint's sums should be.

    Args:
        source: data and network.
        reference: of the checkpoint.
        labels: of all examples.
        tiling: of the matrix.
        norms: that the store holds, (N,); NaN: not known. Unit gradients are made one by one there.
        batch: examples of one backward pass.
        advance: called with the number of examples that were done.
    """

    source: Source
    reference: Reference
    labels: Labels
    tiling: Tiling
    norms: np.ndarray
    batch: int
    advance: Callable[[float], None]

    def sums(self, sampled: np.ndarray, parts: Iterable[int]) -> np.ndarray:
        """Return the sums of cosines with each class of each part, (n, parts, S, C) float64.

        Self-pairs are in none; NaN for parts that are not asked for.
        """
        parts, n, groups = list(parts), len(sampled), self.labels.n_splits * self.labels.n_classes
        found = np.full((n, self.tiling.n_chunks, groups), np.nan)
        found[:, parts] = 0.0
        own = self.labels.groups(sampled), sampled // self.tiling.tile
        for block in self._blocks(n):
            units = self._units(sampled[block])
            rows = np.arange(block.start, block.stop)
            found[rows, own[1][block], own[0][block]] -= units.square().sum(1).numpy()  # u·u
            for part in parts:
                for group, members in self._groups(self.tiling.examples(part)):
                    found[block, part, group] += (units @ self._unit_sum(members)).numpy()
                    self.advance(len(members) if block.start == 0 else 0)
        return found.reshape(n, -1, self.labels.n_splits, self.labels.n_classes)

    def cosines(self, sampled: np.ndarray, columns: slice) -> np.ndarray:
        """Return the cosines with the examples of a part, (n, M) float64; 0 where a norm is."""
        found = np.empty((len(sampled), columns.stop - columns.start))
        for block in self._blocks(len(sampled)):
            units = self._units(sampled[block])
            for some in pieces(columns, self._fit):
                others = np.arange(some.start, some.stop)
                left = some.start - columns.start
                found[block, left : left + len(others)] = (units @ self._units(others).T).numpy()
                self.advance(len(others) if block.start == 0 else 0)
        return found

    def wrong_norms(self, part: int) -> str | None:
        """Compare all norms of a part with the true ones; if one is wrong, go on without them."""
        columns = self.tiling.examples(part)
        if np.isnan(self.norms[columns]).any():
            return None
        examples = np.arange(columns.start, columns.stop)
        true = self.source.numbers(self.reference, examples, lambda: None)
        sentence = wrong_examples(self.norms[columns], true.norms, true.outputs)
        if sentence is not None:
            self.norms[columns] = np.nan
        return sentence

    @property
    def _fit(self) -> int:
        """Unit gradients that fit into a half of the memory."""
        return max(1, MEMORY // (2 * 8 * self.reference.n_parameters))

    def _blocks(self, n: int) -> Iterator[slice]:
        return pieces(slice(0, n), self._fit)

    def _groups(self, columns: slice) -> Iterator[tuple[int, np.ndarray]]:
        """Return the examples of a part by split and class."""
        groups = self.labels.groups(columns)
        for group in np.unique(groups):
            yield int(group), columns.start + np.flatnonzero(groups == group)

    def _units(self, examples: np.ndarray) -> Tensor:
        """Return unit gradients, (n, P) float64; 0 where the store says that the norm is."""
        units = self.reference.unit_gradients(*self.source.examples(examples))
        units[torch.from_numpy(self.norms[examples] == 0)] = 0.0
        return units

    def _unit_sum(self, members: np.ndarray) -> Tensor:
        if np.isnan(self.norms[members]).any():
            some = np.array_split(members, math.ceil(len(members) / self._fit))
            return torch.stack([self._units(part).sum(0) for part in some]).sum(0)
        parts = np.array_split(members, math.ceil(len(members) / self.batch))
        return torch.stack(
            [
                self.reference.unit_sum(
                    *self.source.examples(some), torch.from_numpy(self.norms[some])
                )
                for some in parts
            ]
        ).sum(0)
