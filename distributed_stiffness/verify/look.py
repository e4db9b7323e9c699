"""A look over a whole store: every chunk is read once, checkpoint by checkpoint, tile by tile.

A tile and its transpose are in memory at a time, and of each checkpoint its numbers by example.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from distributed_stiffness.checkpoints import METRICS, Checkpoints, TrainingRun, Weights
from distributed_stiffness.errors import StoreError
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import Store, coordinate_values, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, Tile, all_checkpoints
from distributed_stiffness.verify.faults import Fault, Kind
from distributed_stiffness.verify.numbers import (
    DIAGONAL,
    LIMITS,
    LIMITS_OF_ANY_LOSS,
    Wrong,
    asymmetry,
    impossible_correct,
    undecided,
    wrong_numbers,
    wrong_tile,
)
from distributed_stiffness.verify.recompute import (
    LARGEST_BOUND,
    Source,
    draw,
    pairs_of,
    places_in,
    wrong_correct,
    wrong_distances,
    wrong_examples,
    wrong_pairs,
)

PER_EXAMPLE = ("gradient_norm", "loss", "correct")
# What a run writes last is listed first: one that is at work meanwhile then leaves no false holes.
VARIABLES = (
    "undecided",
    "correct",
    "cosine",
    "distance",
    "gradient_norm",
    "loss",
    "error_bound",
    *METRICS,
)


@dataclass
class Found:
    """What a look has found so far."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)


@dataclass
class _Matrix:
    """What is kept of the tiles of one matrix."""

    sampled: np.ndarray  # (n,) positions of the sampled examples, ascending
    cosines: np.ndarray  # (n, n) of their pairs in tiles I ≤ J, or distances; NaN: not known
    undecided: np.ndarray  # (2,), at least and at most
    is_sound: bool = True  # every tile was read and nothing is wrong with it


class Look:
    """One look over a store.

    Args:
        store: as it is.
        study: of the store.
        source: data and network; None: nothing is computed again.
        folder: of checkpoints.
        sample: examples of each chunk that are computed again.
        seed: of their draw.
        progress: where it is shown.
    """

    def __init__(
        self,
        store: Store,
        study: Study,
        source: Source | None,
        folder: Checkpoints,
        *,
        sample: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.store, self.study, self.source, self.folder = store, study, source, folder
        self.sample, self.seed, self.progress = sample, seed, progress
        attrs = store.attrs
        self.plan = Plan.from_json(attrs["plan"])
        self.tiling = self.plan.tiling
        self.is_finished = "finished" in attrs
        # A study of others' checkpoints has the curves of the splits that its examples are of.
        self._is_imported = study.training.imported
        split = "train_" if study.data.train_examples == 0 else "no split"
        self._curves = [n for n in METRICS if not (self._is_imported and n.startswith(split))]
        self._limits = LIMITS if study.loss == "cross_entropy" else LIMITS_OF_ANY_LOSS
        self._hashes: dict[str, str] = attrs["weights"]
        self._n_classes = len(json.loads(attrs["class_names"]))
        self._there = {name: store.listing(name) for name in VARIABLES}
        self._holes: Counter[str] = Counter()  # chunks not computed yet, of one checkpoint
        self.found = Found()

    def over_everything(self) -> Found:
        """Read the whole store, and compute the sample again.

        Raises:
            StoreError: the storage does not answer.
        """
        self._coordinates()
        n = len(draw(self.tiling, self.sample, (self.seed,))) * self.plan.n_checkpoints
        self._tiles = self.progress.phase("reading", self.plan.n_tiles, "tiles")
        self._again = self.progress.phase("computing again", n, "examples") if self.source else None
        self._distance()
        for checkpoint in all_checkpoints(*self.study.shape):
            self._checkpoint(checkpoint)
        for phase in (self._tiles, self._again):
            if phase is not None:
                phase.close()
        self._leftovers()
        return self.found

    # Parts of a store

    def _coordinates(self) -> None:
        """Read the labels; where the data are at hand, compare."""
        expected = coordinate_values(self.study, self.source.data) if self.source else {}
        for name in expected or sorted(set(self.store.group.array_keys()) - set(VARIABLES)):
            there = self.store.listing(name)
            if not there:
                self._fault("missing", "is not there", name, None, (0,))
                continue
            values = self._read(name, None, (0,))
            right = expected.get(name)
            if values is not None and right is not None and not np.array_equal(values, right):
                self._fault("differs", "is not that of study and data", name, None, (0,))

    def _distance(self) -> None:
        sampled = draw(self.tiling, self.sample, (self.seed,))
        matrix = self._matrix("distance", None, sampled, np.ones(self.tiling.n_examples), np.nan)
        self._say_holes(None)
        if self.source is None:
            return
        true = self.source.distances(sampled)
        for tile, pairs in self._known_pairs(matrix):
            sentence = wrong_distances(matrix.cosines[pairs], true[pairs])
            self._differs(sentence, "distance", None, tile)

    def _checkpoint(self, checkpoint: Checkpoint) -> None:
        sampled = draw(self.tiling, self.sample, (self.seed, *_lead(checkpoint)))
        columns = self._examples(checkpoint)
        bound = self._value("error_bound", checkpoint)
        matrix = self._matrix("cosine", checkpoint, sampled, columns["gradient_norm"], bound)
        self._undecided(checkpoint, matrix, bound)
        weights = self._load_weights(checkpoint)
        self._metrics(checkpoint, weights)
        self._say_holes(checkpoint)
        if self._again is not None:
            before = self._again.done
            if weights is not None and np.isfinite(matrix.cosines).any():
                self._compute_again(checkpoint, weights, matrix, columns, bound)
            self._again.update(before + len(sampled))
        self.found.checked["checkpoints"] += 1

    def _examples(self, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """Read what examples have one of, each (N,) float64; NaN: not known."""
        columns = {name: np.full(self.tiling.n_examples, np.nan) for name in PER_EXAMPLE}
        for chunk in range(self.tiling.n_chunks):
            examples = self.tiling.examples(chunk)
            for name, column in columns.items():
                values = self._chunk(name, checkpoint, (chunk,))
                if values is None:
                    continue
                if name == "correct":
                    # Only cross-entropy, with this number of outputs, says what is possible.
                    known = self.study.loss == "cross_entropy" and not self._is_imported
                    loss = columns["loss"][examples] if known else np.full(len(values), np.nan)
                    wrong = impossible_correct(loss, values, self._n_classes)
                else:
                    wrong = wrong_numbers(name, values, (examples.start,), limits=self._limits)
                if self._is_right(wrong, name, checkpoint, (chunk,)):
                    column[examples] = values
        return columns

    def _value(self, name: str, checkpoint: Checkpoint) -> float:
        """Read a number that a checkpoint has one of; NaN: not known."""
        values = self._chunk(name, checkpoint, ())
        if values is None:
            return np.nan
        wrong = wrong_numbers(name, values, (), limits=self._limits)
        return float(values) if self._is_right(wrong, name, checkpoint, ()) else np.nan

    def _undecided(self, checkpoint: Checkpoint, matrix: _Matrix, bound: float) -> None:
        """Compare the number of undecided pairs with the tiles, if all of them are sound."""
        count = self._value("undecided", checkpoint)
        if not matrix.is_sound or np.isnan(bound) or np.isnan(count):
            return
        least, most = matrix.undecided
        if not least <= count <= most:
            sentence = f"{count:,.0f}, but the tiles hold {least:,} pairs below the error bound"
            self._fault("inconsistent", sentence, "undecided", checkpoint)

    def _metrics(self, checkpoint: Checkpoint, weights: Weights | None) -> None:
        for name in self._curves:
            value = self._value(name, checkpoint)
            said = weights.metrics.get(name) if weights else None
            if said is not None and not np.isnan(value) and said != value:
                sentence = f"{value:.6g}, but the file of the checkpoint says {said:.6g}"
                self._fault("inconsistent", sentence, name, checkpoint)

    def _leftovers(self) -> None:
        """Half-written files; in a store that is being computed they may be its writers'."""
        leftovers = self.store.leftovers()
        if leftovers and not self.is_finished:
            self.found.notes.append(
                f"{len(leftovers)} half-written files (*.partial), of a run that is at work or"
                " died; the next run removes them"
            )
        elif leftovers:
            for path in leftovers:
                sentence = "half-written, of a run that died"
                self.found.faults.append(Fault(kind="leftover", sentence=sentence, chunk=path))

    # Matrices

    def _matrix(
        self,
        name: str,
        checkpoint: Checkpoint | None,
        sampled: np.ndarray,
        norms: np.ndarray,
        bound: float,
    ) -> _Matrix:
        """Read every tile; keep the pairs of the sampled examples."""
        n = len(sampled)
        matrix = _Matrix(sampled, np.full((n, n), np.nan), np.zeros(2, dtype=np.int64))
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
            tolerance=DIAGONAL if np.isnan(bound) else max(DIAGONAL, min(bound, LARGEST_BOUND)),
        )
        return values if self._is_right(wrong, name, checkpoint, tile) else None

    # Weights, and the sample

    def _load_weights(self, checkpoint: Checkpoint) -> Weights | None:
        """Read the weights of a checkpoint; None: there are none, or others than the store's."""
        run, iteration = training_run(self.study, checkpoint)
        if not self.folder.exists(run, iteration):
            if self._is_begun(checkpoint):
                self.found.notes.append(
                    f"no checkpoint of {self._words(checkpoint)} in {self.folder.url}: nothing of"
                    " it was computed again"
                )
            return None
        try:
            weights = self.folder.load_weights(run, iteration)
        except StoreError as error:
            self._bad_weights(str(error), checkpoint, run, iteration)
            return None
        known = self._hashes.get(f"{run.learning_rate!r}/{run.seed}/{iteration}")
        if known not in (None, weights.sha256):
            self._bad_weights(
                f"has weights of SHA-256 {weights.sha256[:12]}…; those that the store was made of"
                f" had {known[:12] if known else ''}…",
                checkpoint,
                run,
                iteration,
            )
            return None
        return weights

    def _bad_weights(
        self, sentence: str, checkpoint: Checkpoint, run: TrainingRun, iteration: int
    ) -> None:
        self.found.faults.append(
            Fault(
                kind="weights",
                sentence=sentence,
                chunk=self.folder.path(run, iteration),
                place=checkpoint,
                checkpoint=self._words(checkpoint),
            )
        )

    def _compute_again(
        self,
        checkpoint: Checkpoint,
        weights: Weights,
        matrix: _Matrix,
        columns: Mapping[str, np.ndarray],
        bound: float,
    ) -> None:
        assert self.source is not None
        assert self._again is not None
        run, _ = training_run(self.study, checkpoint)
        sampled = matrix.sampled
        truth = self.source.truth(weights, run.seed, sampled, self._again.advance)
        for tile, pairs in self._known_pairs(matrix):
            sentence = wrong_pairs(matrix.cosines[pairs], truth.cosines[pairs], bound)
            self._differs(sentence, "cosine", checkpoint, tile)
        for chunk in range(self.tiling.n_chunks):
            here = places_in(sampled, chunk, self.tiling)
            for name, compare, true in (
                ("gradient_norm", wrong_examples, truth.norms),
                ("loss", wrong_examples, truth.losses),
                ("correct", wrong_correct, truth.lead),
            ):
                stored = columns[name][sampled[here]]
                if not np.isnan(stored).any():
                    sentence = compare(stored, true[here], truth.outputs[here])
                    self._differs(sentence, name, checkpoint, (chunk,))
        self.found.checked["examples computed again"] += len(sampled)

    def _known_pairs(self, matrix: _Matrix) -> list[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        """Return the sampled pairs of each tile I ≤ J that was read."""
        found = [
            (tile, pairs_of(matrix.sampled, tile, self.tiling)) for tile in self.tiling.upper()
        ]
        known = [(t, pairs) for t, pairs in found if np.isfinite(matrix.cosines[pairs]).all()]
        self.found.checked["pairs computed again"] += sum(len(pairs[0]) for _, pairs in known)
        return known

    # Chunks

    def _chunk(
        self, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]
    ) -> np.ndarray | None:
        """Read a chunk, without the dims of the checkpoint; None: not there, or unreadable."""
        if (*_lead(checkpoint), *tail) in self._there[name]:
            return self._read(name, checkpoint, tail)
        if self.is_finished:
            self._fault("missing", "is not there in a finished store", name, checkpoint, tail)
        elif not self._is_filled(name, checkpoint, tail):
            sentence = "is not there, and no run would compute it, for what comes after it is"
            self._fault("missing", sentence, name, checkpoint, tail)
        else:
            self._holes[name] += 1
        return None

    def _is_filled(self, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]) -> bool:
        """Whether a run that goes on computes a chunk that is not there (see Store.contents)."""
        lead = _lead(checkpoint)
        if name in ("gradient_norm", "loss"):
            return (*lead, *tail) not in self._there["correct"]
        if name == "error_bound":
            return lead not in self._there["undecided"]
        return name not in METRICS or not self._is_complete(checkpoint)

    def _is_complete(self, checkpoint: Checkpoint | None) -> bool:
        lead, n = _lead(checkpoint), self.tiling.n_chunks
        counts = {
            name: sum(place[:3] == lead for place in self._there[name])
            for name in ("cosine", "correct", "undecided")
        }
        return counts == {"cosine": n**2, "correct": n, "undecided": 1}

    def _is_begun(self, checkpoint: Checkpoint) -> bool:
        lead = _lead(checkpoint)
        return any(place[:3] == lead for place in self._there["cosine"])

    def _read(
        self, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]
    ) -> np.ndarray | None:
        lead = _lead(checkpoint)
        self.found.checked["chunks"] += 1
        try:
            values = self.store.chunk(name, (*lead, *tail))
        except Exception as error:  # each codec has its own
            # A storage that does not answer says nothing of a chunk; a bad block of a disk does.
            if isinstance(error, StoreError) and not _is_bad_block(error.__cause__):
                raise
            self._fault("unreadable", f"cannot be read: {error}", name, checkpoint, tail)
            return None
        return values.reshape(values.shape[len(lead) :])

    # What was found

    def _is_right(
        self, wrong: Wrong | None, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]
    ) -> bool:
        if wrong is not None:
            self._fault(*wrong, name, checkpoint, tail)
        return wrong is None

    def _differs(
        self, sentence: str | None, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]
    ) -> None:
        if sentence is not None:
            self._fault("differs", sentence, name, checkpoint, tail)

    def _fault(
        self,
        kind: Kind,
        sentence: str,
        name: str,
        checkpoint: Checkpoint | None,
        tail: tuple[int, ...] = (),
    ) -> None:
        key = "/".join(map(str, (name, "c", *_lead(checkpoint), *tail)))
        self.found.faults.append(
            Fault(
                kind=kind,
                sentence=sentence,
                array=name,
                chunk=key,
                place=checkpoint,
                checkpoint=self._words(checkpoint),
            )
        )

    def _say_holes(self, checkpoint: Checkpoint | None) -> None:
        if self._holes:
            what = self._words(checkpoint) or "input distances"
            counts = ", ".join(f"{n:,} of {name}" for name, n in self._holes.items())
            self.found.notes.append(f"{what}: chunks not computed yet: {counts}")
        self._holes.clear()

    def _words(self, checkpoint: Checkpoint | None) -> str:
        if checkpoint is None:
            return ""
        run, iteration = training_run(self.study, checkpoint)
        return f"{run}, iteration {iteration}"


def _is_bad_block(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EIO


def _lead(checkpoint: Checkpoint | None) -> tuple[int, ...]:
    if checkpoint is None:
        return ()
    return (checkpoint.learning_rate, checkpoint.seed, checkpoint.iteration)
