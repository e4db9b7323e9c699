"""A look over a store that keeps sums over each example's pairs (docs/design/0007-sums.md).

No pair is stored, so none can be compared. With the unit gradient u of a sampled example and the
sum U of those of a class in a part of the others, the sum of its cosines with them is u·U, which is
one backward pass (`Reference.unit_sum`). Signs, distances, squares and sums weighted with norms are
looked at pair by pair, those of the sampled examples with one part that is drawn for each
checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distributed_stiffness.analysis.pairs import (
    CLASS_SUMS,
    DISTANCE_SUMS,
    OTHER_SPLIT,
    SQUARE_SUMS,
    SUMS_DIMS,
    WEIGHTED_SUMS,
)
from distributed_stiffness.checkpoints import METRICS
from distributed_stiffness.engine.sums import bin_edges, splits_of
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.store import EXPONENTS, training_run
from distributed_stiffness.tiling import Checkpoint, Tile
from distributed_stiffness.verify.look import Look, Tiles, lead
from distributed_stiffness.verify.numbers import Wrong, tolerance
from distributed_stiffness.verify.recompute import places_in
from distributed_stiffness.verify.recompute_sums import SumsAgain
from distributed_stiffness.verify.tile_sums import (
    Labels,
    Rows,
    Sums,
    asymmetry_of_squares,
    asymmetry_of_sums,
    asymmetry_of_weighted,
    disagreement,
    not_finite,
    wrong_cosine_sums,
    wrong_counts,
    wrong_distance_counts,
    wrong_near_zero,
    wrong_rows,
    wrong_rows_of_kernels,
    wrong_squares,
    wrong_sums,
)

NEAR_ZERO = "near_zero"
# Dims of a chunk that lie whole in it: the split of the other example, and those of the sums.
_WHOLE = {name: (0,) * (1 + len(dims)) for name, dims in SUMS_DIMS.items()} | {NEAR_ZERO: (0,)}


@dataclass(kw_only=True)
class _Rows(Tiles):
    """What is kept of the sampled examples, by part of the others; NaN: not known."""

    sampled: np.ndarray  # (n,) positions, ascending
    by_class: np.ndarray  # (n, parts, S, C, 4)
    by_distance: np.ndarray  # (n, parts, S, R, K, 4)
    weighted: np.ndarray  # (n, parts, S, C)
    squares: np.ndarray  # (n, parts, S, 2)
    # Of tiles with norms, which may be what is wrong: they are looked at first.
    disagreements: list[tuple[str, Tile, Wrong]] = field(default_factory=list)


class LookAtSums(Look[_Rows]):
    """A look over a store that keeps sums of each checkpoint."""

    variables = (
        "undecided",
        "correct",
        *SUMS_DIMS,
        NEAR_ZERO,
        "gradient_norm",
        "loss",
        "error_bound",
        *METRICS,
    )
    tile_array = CLASS_SUMS

    def _n_again(self) -> int:
        return len(self._sampled(None)) + self.tiling.n_examples + self.tiling.tile

    def _look_at_distances(self) -> None:
        """There is no matrix of them."""

    def _is_filled(self, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]) -> bool:
        if name not in _WHOLE or name == CLASS_SUMS:
            return super()._is_filled(name, checkpoint, tail)
        i, j = tail[:2] if name == NEAR_ZERO else tail[1::-1]
        return (*lead(checkpoint), *chunk_of_tile(CLASS_SUMS, (i, j))) not in self._there[
            CLASS_SUMS
        ]

    @cached_property
    def _labels(self) -> Labels | None:
        """Classes and splits of the data, or of the store; None where neither can be had."""
        if self.source is not None:
            data = self.source.data
            names, splits, classes = splits_of(data), data.split, data.examples.labels
        else:
            there = [self._known(name) for name in (OTHER_SPLIT, "split", "label")]
            if not all(map(len, there)):
                return None
            names, splits, classes = there[0].tolist(), tuple(there[1].tolist()), there[2]
        at = {name: k for k, name in enumerate(names)}
        return Labels(
            np.array(classes, dtype=np.int64),
            np.array([at.get(split, 0) for split in splits]),
            self._n_classes,
            len(names),
        )

    def _known(self, name: str) -> np.ndarray:
        """Return a coordinate, empty if it cannot be read: its fault was named before."""
        faults = len(self.found.faults)
        values = self._read(name, None, (0,))
        del self.found.faults[faults:]
        return np.array([]) if values is None else values

    # Reading

    def _read_tiles(
        self, checkpoint: Checkpoint, columns: Mapping[str, np.ndarray], bound: float
    ) -> _Rows:
        sampled, n = self._sampled(checkpoint), self.tiling.n_chunks
        unknown = {
            name: np.full((len(sampled), n, *shape), np.nan) for name, shape in self._shapes.items()
        }
        rows = _Rows(
            sampled=sampled,
            by_class=unknown[CLASS_SUMS],
            by_distance=unknown[DISTANCE_SUMS],
            weighted=unknown[WEIGHTED_SUMS],
            squares=unknown[SQUARE_SUMS],
        )
        norms = columns["gradient_norm"]
        near_zero = np.zeros(len(EXPONENTS), dtype=np.int64)
        for i, j in self.tiling.upper():
            tiles = {(i, j), (j, i)}
            read = {t: self._tile(checkpoint, t, norms, bound) for t in tiles}
            self._tiles.advance(len(tiles))
            sound = {tile: sums for tile, sums in read.items() if sums is not None}
            if len(sound) < len(tiles) or not self._is_symmetric(checkpoint, (i, j), sound):
                rows.is_sound = False
                continue
            rows.disagreements += self._disagreements_with_norms((i, j), sound, norms)
            for (a, b), sums in sound.items():
                here = places_in(sampled, a, self.tiling)
                at = sampled[here] - self.tiling.examples(a).start
                for part in ("by_class", "by_distance", "weighted", "squares"):
                    getattr(rows, part)[here, b] = getattr(sums, part)[at]
                near_zero += sums.near_zero
        if not self._is_made_again(checkpoint):
            self._say_disagreements(checkpoint, rows, norms)
        if not np.isnan(bound):
            rows.undecided += self._below(bound, near_zero)
        return rows

    def _is_made_again(self, checkpoint: Checkpoint) -> bool:
        """Whether tiles will be compared with what data and checkpoint give."""
        there = self.folder.exists(*training_run(self.study, checkpoint))
        return self.source is not None and there and self._is_begun(checkpoint)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what an example has in one part."""
        arrays = self.store.group
        return {name: arrays[name].shape[5:] for name in SUMS_DIMS}  # type: ignore[union-attr]

    def _below(self, bound: float, near_zero: np.ndarray) -> np.ndarray:
        """Return the pairs below a bound, which is a power of two: at least and at most."""
        k = int(np.searchsorted(2.0**EXPONENTS, bound))
        if k < len(EXPONENTS) and bound == 2.0 ** EXPONENTS[k]:
            return np.array([near_zero[k], near_zero[k]])
        return np.array([0, near_zero[-1]])  # the bound is named by itself

    def _value(self, name: str, checkpoint: Checkpoint) -> float:
        value = super()._value(name, checkpoint)
        if name == "error_bound" and not np.isnan(value) and value not in 2.0**EXPONENTS:
            sentence = f"{value:.6g} is none of the powers of two that pairs were counted by"
            self._fault("out of range", sentence, name, checkpoint)
            return np.nan
        return value

    def _tile(
        self, checkpoint: Checkpoint, tile: Tile, norms: np.ndarray, bound: float
    ) -> Sums | None:
        """Read what is kept of (I, J); None: it is not there, or something is wrong with it."""
        (i, j), allowed = tile, tolerance(bound)
        rows = self.tiling.examples(i)
        by_class, by_distance, weighted, squares, near_zero = (
            self._sums(name, checkpoint, tile) for name in (*SUMS_DIMS, NEAR_ZERO)
        )

        def is_right(name: str, wrong: Wrong | None) -> bool:
            return self._is_right(wrong, *self._place(name, checkpoint, tile))

        if by_class is not None and not (
            is_right(CLASS_SUMS, wrong_sums(by_class, rows.start, tolerance=allowed))
            and is_right(CLASS_SUMS, self._wrong_counts(tile, by_class, norms))
        ):
            by_class = None
        if by_distance is not None and not (
            is_right(DISTANCE_SUMS, wrong_sums(by_distance, rows.start, tolerance=allowed))
            and is_right(DISTANCE_SUMS, self._disagreement(tile, by_class, by_distance))
        ):
            by_distance = None
        for name, sums in ((WEIGHTED_SUMS, weighted), (SQUARE_SUMS, squares)):
            if sums is not None and not is_right(name, not_finite(sums, rows.start)):
                return None
        if near_zero is not None and not is_right(
            NEAR_ZERO,
            wrong_near_zero(near_zero, by_class, diagonal=i == j, below=i > j, tolerance=allowed),
        ):
            near_zero = None
        if by_class is None or by_distance is None or near_zero is None:
            return None
        if weighted is None or squares is None:
            return None
        wrong = wrong_squares(squares, by_class, weighted, rows.start, tolerance=allowed)
        if not is_right(SQUARE_SUMS, wrong):
            return None
        return Sums(by_class, by_distance, weighted, squares, near_zero)

    def _sums(self, name: str, checkpoint: Checkpoint, tile: Tile) -> np.ndarray | None:
        values = self._chunk(*self._place(name, checkpoint, tile))
        if values is None:
            return None
        # In front, its part of the others; of near_zero, both parts.
        return values.reshape(values.shape[2 if name == NEAR_ZERO else 1 :])

    def _disagreement(
        self, tile: Tile, by_class: np.ndarray | None, by_distance: np.ndarray
    ) -> Wrong | None:
        if self._labels is None or by_class is None:
            return None
        rows = self.tiling.examples(tile[0])
        return disagreement(by_class, by_distance, self._labels.classes[rows], rows.start)

    def _wrong_counts(self, tile: Tile, by_class: np.ndarray, norms: np.ndarray) -> Wrong | None:
        if self._labels is None:
            return None
        rows, columns = map(self.tiling.examples, tile)
        everyone = np.ones(len(norms), dtype=bool)
        pairs = self._labels.counts(rows, columns, counted=everyone)
        cosine_pairs = self._labels.counts(rows, columns, counted=norms != 0).astype(float)
        if np.isnan(norms[columns]).any():
            cosine_pairs[:] = np.nan
        cosine_pairs[np.isnan(norms[rows])] = np.nan
        return wrong_counts(by_class, rows.start, pairs, cosine_pairs)

    def _is_symmetric(self, checkpoint: Checkpoint, tile: Tile, sums: Mapping[Tile, Sums]) -> bool:
        if self._labels is None:
            return True
        rows, columns = map(self.tiling.examples, tile)
        wrong = asymmetry_of_sums(sums[tile], sums[tile[::-1]], rows, columns, self._labels)
        return self._is_right(wrong, *self._place(CLASS_SUMS, checkpoint, tile))

    def _disagreements_with_norms(
        self, tile: Tile, sums: Mapping[Tile, Sums], norms: np.ndarray
    ) -> Iterator[tuple[str, Tile, Wrong]]:
        """Compare both sides of a tile in what norms are the weights of."""
        if self._labels is None:
            return
        here, there = sums[tile], sums[tile[::-1]]
        rows, columns = map(self.tiling.examples, tile)
        for name, asymmetry in (
            (WEIGHTED_SUMS, asymmetry_of_weighted),
            (SQUARE_SUMS, asymmetry_of_squares),
        ):
            wrong = asymmetry(here, there, rows, columns, self._labels, norms)
            if wrong is not None:
                yield name, tile, wrong

    def _say_disagreements(
        self, checkpoint: Checkpoint, tiles: _Rows, norms: np.ndarray, but: Collection[Tile] = ()
    ) -> None:
        """Report what disagrees with norms that are right, of all tiles but some."""
        for name, tile, (kind, sentence) in tiles.disagreements:
            known = all(not np.isnan(norms[self.tiling.examples(part)]).any() for part in tile)
            if known and not {tile, tile[::-1]} & set(but):
                self._fault(kind, sentence, *self._place(name, checkpoint, tile))

    # Computing again

    def _compare_tiles(
        self,
        checkpoint: Checkpoint,
        reference: Reference,
        tiles: _Rows,
        columns: Mapping[str, np.ndarray],
        bound: float,
    ) -> None:
        assert self.source is not None
        assert self._again is not None
        assert self._labels is not None
        again = SumsAgain(
            self.source,
            reference,
            self._labels,
            self.tiling,
            columns["gradient_norm"].copy(),
            batch=self.plan.batch,
            advance=self._again.advance,
        )
        true = again.sums(tiles.sampled, range(self.tiling.n_chunks))
        wrong = {
            (i, j)
            for j in range(self.tiling.n_chunks)
            for i in self._wrong_in_part(checkpoint, again, tiles, true[:, j], j, bound)
        }
        random = np.random.default_rng((self.seed, *lead(checkpoint)))
        drawn = int(random.integers(self.tiling.n_chunks))
        cosines = again.cosines(tiles.sampled, self.tiling.examples(drawn))
        for j in range(self.tiling.n_chunks):
            self._compare_rows(checkpoint, tiles, j, cosines if j == drawn else None, wrong, bound)
        self._compare_kernels(checkpoint, tiles, drawn, cosines, again.norms, wrong, bound)
        self._say_disagreements(checkpoint, tiles, again.norms, but=wrong)
        known = ~np.isnan(tiles.by_class[..., 0])
        self.found.checked["sums computed again"] += int(known.sum())

    def _wrong_in_part(
        self,
        checkpoint: Checkpoint,
        again: SumsAgain,
        tiles: _Rows,
        true: np.ndarray,
        part: int,
        bound: float,
    ) -> list[int]:
        """Compare the sums of sampled rows over one part of the others; return what is wrong.

        Sums of unit gradients are made with stored norms. Where a norm is wrong all rows are, so
        that norms are looked at first.
        """
        found = self._wrong_rows_of(tiles, true, part, bound)
        if found:
            sentence = again.wrong_norms(part)
            if sentence is not None:
                self._fault("differs", sentence, "gradient_norm", checkpoint, (part,))
                true = again.sums(tiles.sampled, [part])[:, part]
                found = self._wrong_rows_of(tiles, true, part, bound)
        for i, sentence in found.items():
            self._fault("differs", sentence, *self._place(CLASS_SUMS, checkpoint, (i, part)))
        return list(found)

    def _wrong_rows_of(
        self, tiles: _Rows, true: np.ndarray, part: int, bound: float
    ) -> dict[int, str]:
        found = {}
        for i, here in self._known_rows(tiles, part):
            sentence = wrong_cosine_sums(tiles.by_class[here, part], true[here], bound)
            if sentence is not None:
                found[i] = sentence
        return found

    def _compare_rows(
        self,
        checkpoint: Checkpoint,
        tiles: _Rows,
        part: int,
        cosines: np.ndarray | None,
        wrong: set[Tile],
        bound: float,
    ) -> None:
        """Compare distances, and signs where the cosines of the part were made pair by pair."""
        assert self.source is not None
        assert self._labels is not None
        columns = self.tiling.examples(part)
        others = np.arange(columns.start, columns.stop)
        distances = self.source.distances(tiles.sampled, others)
        for i, here in self._known_rows(tiles, part):
            if (i, part) in wrong:
                continue
            own = tiles.sampled[here]
            rows = Rows(self._labels, columns, own)
            by_distance, D = tiles.by_distance[here, part], distances[here]
            of_class = None
            of_distance = wrong_distance_counts(by_distance, rows, D, self._edges)
            if of_distance is None and cosines is not None:
                of_class, of_distance = wrong_rows(
                    tiles.by_class[here, part],
                    by_distance,
                    rows,
                    cosines=cosines[here],
                    distances=D,
                    edges=self._edges,
                    bound=bound,
                )
            for name, sentence in ((CLASS_SUMS, of_class), (DISTANCE_SUMS, of_distance)):
                if sentence is not None:
                    self._fault("differs", sentence, *self._place(name, checkpoint, (i, part)))

    def _compare_kernels(
        self,
        checkpoint: Checkpoint,
        tiles: _Rows,
        part: int,
        cosines: np.ndarray,
        norms: np.ndarray,
        wrong: set[Tile],
        bound: float,
    ) -> None:
        """Compare sums weighted with norms, and sums of squares, of the part made pair by pair."""
        assert self._labels is not None
        columns = self.tiling.examples(part)
        for i, here in self._known_rows(tiles, part):
            if (i, part) in wrong:
                continue
            found = wrong_rows_of_kernels(
                tiles.weighted[here, part],
                tiles.squares[here, part],
                Rows(self._labels, columns, tiles.sampled[here]),
                cosines=cosines[here],
                norms=norms[columns],
                bound=bound,
            )
            for name, sentence in zip((WEIGHTED_SUMS, SQUARE_SUMS), found, strict=True):
                if sentence is not None:
                    self._fault("differs", sentence, *self._place(name, checkpoint, (i, part)))

    def _known_rows(self, tiles: _Rows, part: int) -> Iterator[tuple[int, np.ndarray]]:
        """Return the sampled examples of each chunk whose sums over a part were read."""
        for i in range(self.tiling.n_chunks):
            here = places_in(tiles.sampled, i, self.tiling)
            if not np.isnan(tiles.by_class[here, part]).any():
                yield i, here

    @cached_property
    def _edges(self) -> np.ndarray:
        assert self.source is not None
        return bin_edges(self.source.data, self.study.distance_bins)

    @staticmethod
    def _place(
        name: str, checkpoint: Checkpoint, tile: Tile
    ) -> tuple[str, Checkpoint, tuple[int, ...]]:
        """Return where the chunk of a tile (I, J) is."""
        return name, checkpoint, chunk_of_tile(name, tile)


def chunk_of_tile(name: str, tile: Tile) -> tuple[int, ...]:
    """Return the place of the chunk of a tile (I, J) within its checkpoint."""
    i, j = tile
    return (*((i, j) if name == NEAR_ZERO else (j, i)), *_WHOLE[name])


def tile_of_chunk(name: str, key: str) -> Tile:
    """Return the tile (I, J) that a chunk is of, by its key in the store."""
    first, second = map(int, key.split("/")[5:7])
    return (first, second) if name == NEAR_ZERO else (second, first)
