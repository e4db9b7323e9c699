"""A look over a store that keeps every pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distributed_stiffness.checkpoints import METRICS
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.tiling import Checkpoint, Tile
from distributed_stiffness.verify.look import Look, Tiles
from distributed_stiffness.verify.numbers import (
    asymmetry,
    tolerance,
    undecided,
    wrong_tile,
)
from distributed_stiffness.verify.recompute import pairs_of, wrong_distances, wrong_pairs


@dataclass(kw_only=True)
class _Matrix(Tiles):
    sampled: np.ndarray  # (n,) positions of the sampled examples, ascending
    cosines: np.ndarray  # (n, n) of their pairs in tiles I ≤ J, or distances; NaN: not known


class LookAtPairs(Look[_Matrix]):
    """A look over a store that keeps a matrix of cosines for each checkpoint."""

    variables = (
        "undecided",
        "correct",
        "cosine",
        "distance",
        "gradient_norm",
        "loss",
        "error_bound",
        *METRICS,
    )
    tile_array = "cosine"

    def _n_again(self) -> int:
        return len(self._sampled(None))

    def _read_tiles(
        self, checkpoint: Checkpoint, columns: Mapping[str, np.ndarray], bound: float
    ) -> _Matrix:
        return self._matrix("cosine", checkpoint, columns["gradient_norm"], bound)

    def _compare_tiles(
        self,
        checkpoint: Checkpoint,
        reference: Reference,
        tiles: _Matrix,
        columns: Mapping[str, np.ndarray],  # noqa: ARG002
        bound: float,
    ) -> None:
        assert self.source is not None
        truth = self.source.cosines(reference, tiles.sampled)
        for tile, pairs in self._known_pairs(tiles):
            sentence = wrong_pairs(tiles.cosines[pairs], truth[pairs], bound)
            self._differs(sentence, "cosine", checkpoint, tile)

    def _look_at_distances(self) -> None:
        matrix = self._matrix("distance", None, np.ones(self.tiling.n_examples), np.nan)
        self._say_holes(None)
        if self.source is None:
            return
        true = self.source.distances(matrix.sampled)
        for tile, pairs in self._known_pairs(matrix):
            sentence = wrong_distances(matrix.cosines[pairs], true[pairs])
            self._differs(sentence, "distance", None, tile)

    def _matrix(
        self,
        name: str,
        checkpoint: Checkpoint | None,
        norms: np.ndarray,
        bound: float,
    ) -> _Matrix:
        """Read every tile; keep the pairs of the sampled examples."""
        sampled = self._sampled(checkpoint)
        matrix = _Matrix(sampled=sampled, cosines=np.full((len(sampled),) * 2, np.nan))
        for i, j in self.tiling.upper():
            upper = self._tile(name, checkpoint, (i, j), norms, bound)
            lower = upper if i == j else self._tile(name, checkpoint, (j, i), norms, bound)
            self._tiles.advance(1 if i == j else 2)
            if upper is None or lower is None:
                matrix.is_sound = False
                continue
            first = (self.tiling.examples(i).start, self.tiling.examples(j).start)
            if not self._is_right(asymmetry(upper, lower, first), name, checkpoint, (i, j)):
                matrix.is_sound = False
                continue
            rows, columns = pairs_of(sampled, (i, j), self.tiling)
            places = sampled[rows] - first[0], sampled[columns] - first[1]
            matrix.cosines[rows, columns] = upper[places]
            if not np.isnan(bound):
                matrix.undecided += undecided(upper, bound, is_diagonal=i == j)
        return matrix

    def _tile(
        self,
        name: str,
        checkpoint: Checkpoint | None,
        tile: Tile,
        norms: np.ndarray,
        bound: float,
    ) -> np.ndarray | None:
        """Read a tile; None: it is not there, or something is wrong with it."""
        values = self._chunk(name, checkpoint, tile)
        if values is None:
            return None
        rows, columns = (self.tiling.examples(chunk) for chunk in tile)
        wrong = wrong_tile(
            name,
            values,
            (rows.start, columns.start),
            norms=(norms[rows], norms[columns]),
            tolerance=tolerance(bound),
        )
        return values if self._is_right(wrong, name, checkpoint, tile) else None

    def _known_pairs(self, matrix: _Matrix) -> list[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        """Return the sampled pairs of each tile I ≤ J that was read."""
        found = [
            (tile, pairs_of(matrix.sampled, tile, self.tiling)) for tile in self.tiling.upper()
        ]
        known = [(t, pairs) for t, pairs in found if np.isfinite(matrix.cosines[pairs]).all()]
        self.found.checked["pairs computed again"] += sum(len(pairs[0]) for _, pairs in known)
        return known
