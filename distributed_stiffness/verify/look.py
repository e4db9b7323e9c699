"""A look over a whole store: every chunk is read once, checkpoint by checkpoint, tile by tile.

A tile and its transpose are in memory at a time, and of each checkpoint its numbers by example.
What is kept of a tile, pairs or sums, has a look of its own.
"""

from __future__ import annotations

import errno
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import numpy as np

from distributed_stiffness.checkpoints import METRICS, Checkpoints, TrainingRun, Weights
from distributed_stiffness.engine.bounds import Bound
from distributed_stiffness.errors import StoreError
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import WHOLE_MATRIX_CHECK, Store, training_run, weights_key
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, all_checkpoints
from distributed_stiffness.verify.faults import Fault, Kind
from distributed_stiffness.verify.numbers import (
    LIMITS,
    LIMITS_OF_ANY_LOSS,
    Wrong,
    impossible_correct,
    wrong_numbers,
    wrong_whole_matrix_check,
)
from distributed_stiffness.verify.recompute import (
    Numbers,
    Source,
    draw,
    places_in,
    wrong_correct,
    wrong_examples,
)

PER_EXAMPLE = ("gradient_norm", "loss", "correct")
OF_CHECKPOINT = ("undecided", "error_bound", *METRICS)
GROUP = "zarr.json"  # where the attributes are
# Of distance bins: on another machine a float32 product, and with it an edge, has other last bits.
EDGES = ("lower_edge", "upper_edge", "distance_bin")


@dataclass
class Found:
    """What a look has found so far."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    bounds: dict[Checkpoint, Bound] = field(default_factory=dict)


@dataclass(kw_only=True)
class Tiles:
    """What is kept of the tiles of one matrix that were read."""

    # Pairs below the error bound, (2,): at least and at most.
    undecided: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    is_sound: bool = True  # every tile was read and nothing is wrong with it


_Read = TypeVar("_Read", bound=Tiles)


class Look(ABC, Generic[_Read]):
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

    # What a run writes last is listed first: one that is at work meanwhile leaves no false holes.
    variables: ClassVar[tuple[str, ...]]
    tile_array: ClassVar[str]  # its chunk says that a tile is there

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
        self.attrs = store.attrs
        self.plan = Plan.from_json(self.attrs["plan"])
        self.tiling = self.plan.tiling
        self.is_finished = "finished" in self.attrs
        # A study of others' checkpoints has the curves of the splits that its examples are of.
        self._is_imported = study.training.imported
        split = "train_" if study.data.train_examples == 0 else "no split"
        self._curves = [n for n in METRICS if not (self._is_imported and n.startswith(split))]
        self._limits = LIMITS if study.loss == "cross_entropy" else LIMITS_OF_ANY_LOSS
        self._hashes: dict[str, str] = self.attrs["weights"]
        self._n_classes = len(json.loads(self.attrs["class_names"]))
        self._there = {name: store.listing(name) for name in self.variables}
        self._holes: Counter[str] = Counter()  # chunks not computed yet, of one checkpoint
        self.found = Found()

    def over_everything(self) -> Found:
        """Read the whole store, and compute the sample again.

        Raises:
            StoreError: the storage does not answer.
        """
        self._coordinates()
        n = self._n_again() * self.plan.n_checkpoints
        self._tiles = self.progress.phase("reading", self.plan.n_tiles, "tiles")
        self._again = self.progress.phase("computing again", n, "examples") if self.source else None
        self._look_at_distances()
        for checkpoint in all_checkpoints(*self.study.shape):
            self._checkpoint(checkpoint)
        for phase in (self._tiles, self._again):
            if phase is not None:
                phase.close()
        self._whole_matrix_check()
        self._leftovers()
        return self.found

    # What depends on what is kept

    @abstractmethod
    def _n_again(self) -> int:
        """Return how many examples of a checkpoint are computed again."""

    @abstractmethod
    def _look_at_distances(self) -> None:
        """Read the matrix of input distances, where there is one."""

    @abstractmethod
    def _read_tiles(
        self, checkpoint: Checkpoint, columns: Mapping[str, np.ndarray], bound: float
    ) -> _Read:
        """Read every tile of a checkpoint."""

    @abstractmethod
    def _compare_tiles(
        self,
        checkpoint: Checkpoint,
        reference: Reference,
        tiles: _Read,
        columns: Mapping[str, np.ndarray],
        bound: float,
    ) -> None:
        """Compare tiles with numbers that are computed again."""

    # Parts of a store

    def _coordinates(self) -> None:
        """Read the labels; where the data are at hand, compare."""
        expected = self.source.coordinates() if self.source else {}
        for name in expected or self._coordinates_there():
            if not self.store.listing(name):
                self._fault("missing", "is not there", name, None, (0,))
                continue
            values = self._read(name, None, (0,))
            right = expected.get(name)
            if values is not None and right is not None and not _agree(name, values, right):
                self._fault("differs", "is not that of study and data", name, None, (0,))

    def _coordinates_there(self) -> list[str]:
        """Return the arrays that are labels of a dimension, and no distances that were added."""
        arrays = dict(self.store.group.arrays())
        return sorted(n for n, a in arrays.items() if a.ndim == 1 and n not in self.variables)

    def _checkpoint(self, checkpoint: Checkpoint) -> None:
        columns = self._examples(checkpoint)
        bound = self._value("error_bound", checkpoint)
        tiles = self._read_tiles(checkpoint, columns, bound)
        self._undecided(checkpoint, tiles, bound)
        weights = self._load_weights(checkpoint)
        self._metrics(checkpoint, weights)
        self._say_holes(checkpoint)
        if self.source is not None and self._again is not None:
            before = self._again.done
            if weights is not None and self._is_begun(checkpoint):
                self._compute_again(checkpoint, weights, tiles, columns, bound)
            self._again.update(before + self._n_again())
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

    def _undecided(self, checkpoint: Checkpoint, tiles: Tiles, bound: float) -> None:
        """Compare the number of undecided pairs with the tiles, if all of them are sound."""
        count = self._value("undecided", checkpoint)
        if not np.isnan(bound) and not np.isnan(count):
            self.found.bounds[checkpoint] = Bound(self._words(checkpoint), bound, int(count))
        if not tiles.is_sound or np.isnan(bound) or np.isnan(count):
            return
        least, most = tiles.undecided
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

    def _whole_matrix_check(self) -> None:
        """Look at what the check of all pairs of the last checkpoint said."""
        last = all_checkpoints(*self.study.shape)[-1]
        if not self.is_finished:
            return
        run, iteration = training_run(self.study, last)
        place = {"learning_rate": run.learning_rate, "seed": run.seed, "iteration": iteration}
        wrong = wrong_whole_matrix_check(
            self.attrs.get(WHOLE_MATRIX_CHECK),
            place,
            bound=self.found.bounds[last].error if last in self.found.bounds else np.nan,
            n_classes=self._n_classes,
        )
        if wrong is not None:
            kind, sentence = wrong
            self.found.faults.append(
                Fault(
                    kind=kind,
                    sentence=sentence,
                    array=WHOLE_MATRIX_CHECK,
                    chunk=GROUP,
                    place=last,
                    checkpoint=self._words(last),
                )
            )

    # Weights, and the sample

    def _sampled(self, checkpoint: Checkpoint | None) -> np.ndarray:
        """Return the examples that are computed again, (n,), ascending."""
        return draw(self.tiling, self.sample, (self.seed, *lead(checkpoint)))

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
        known = self._hashes.get(weights_key(run, iteration))
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
        tiles: _Read,
        columns: Mapping[str, np.ndarray],
        bound: float,
    ) -> None:
        assert self.source is not None
        assert self._again is not None
        run, _ = training_run(self.study, checkpoint)
        sampled = self._sampled(checkpoint)
        reference = self.source.reference(weights, run.seed)
        numbers = self.source.numbers(reference, sampled, self._again.advance)
        self._compare_examples(checkpoint, sampled, numbers, columns)
        self._compare_tiles(checkpoint, reference, tiles, columns, bound)
        self.found.checked["examples computed again"] += len(sampled)

    def _compare_examples(
        self,
        checkpoint: Checkpoint,
        sampled: np.ndarray,
        true: Numbers,
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """Compare what examples have one of; what differs counts as not known from here on."""
        for chunk in range(self.tiling.n_chunks):
            here = places_in(sampled, chunk, self.tiling)
            for name, compare, right in (
                ("gradient_norm", wrong_examples, true.norms),
                ("loss", wrong_examples, true.losses),
                ("correct", wrong_correct, true.lead),
            ):
                stored = columns[name][sampled[here]]
                if not np.isnan(stored).any():
                    sentence = compare(stored, right[here], true.outputs[here])
                    self._differs(sentence, name, checkpoint, (chunk,))
                    if sentence is not None:
                        columns[name][self.tiling.examples(chunk)] = np.nan

    # Chunks

    def _chunk(
        self,
        name: str,
        checkpoint: Checkpoint | None,
        tail: tuple[int, ...],
    ) -> np.ndarray | None:
        """Read a chunk, without the dims of the checkpoint; None: not there, or unreadable."""
        if (*lead(checkpoint), *tail) in self._there[name]:
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
        at = lead(checkpoint)
        if name in ("gradient_norm", "loss"):
            return (*at, *tail) not in self._there["correct"]
        if name == "error_bound":
            return at not in self._there["undecided"]
        return name not in METRICS or not self._is_complete(checkpoint)

    def _is_complete(self, checkpoint: Checkpoint | None) -> bool:
        at, n = lead(checkpoint), self.tiling.n_chunks
        counts = {
            name: sum(place[:3] == at for place in self._there[name])
            for name in (self.tile_array, "correct", "undecided")
        }
        return counts == {self.tile_array: n**2, "correct": n, "undecided": 1}

    def _is_begun(self, checkpoint: Checkpoint) -> bool:
        at = lead(checkpoint)
        return any(place[:3] == at for place in self._there[self.tile_array])

    def _read(
        self, name: str, checkpoint: Checkpoint | None, tail: tuple[int, ...]
    ) -> np.ndarray | None:
        at = lead(checkpoint)
        self.found.checked["chunks"] += 1
        try:
            values = self.store.chunk(name, (*at, *tail))
        except Exception as error:  # each codec has its own
            # A storage that does not answer says nothing of a chunk; a bad block of a disk does.
            if isinstance(error, StoreError) and not _is_bad_block(error.__cause__):
                raise
            self._fault("unreadable", f"cannot be read: {error}", name, checkpoint, tail)
            return None
        return values.reshape(values.shape[len(at) :])

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
        key = "/".join(map(str, (name, "c", *lead(checkpoint), *tail)))
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
        return "" if checkpoint is None else self.study.name_of(checkpoint)


def _agree(name: str, values: np.ndarray, right: np.ndarray) -> bool:
    if name in EDGES:
        return values.shape == right.shape and np.allclose(values, right, rtol=1e-5)
    return np.array_equal(values, right)


def _is_bad_block(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EIO


def lead(checkpoint: Checkpoint | None) -> tuple[int, ...]:
    """Return where the chunks of a checkpoint begin; of a matrix without one, nowhere."""
    if checkpoint is None:
        return ()
    return (checkpoint.learning_rate, checkpoint.seed, checkpoint.iteration)
