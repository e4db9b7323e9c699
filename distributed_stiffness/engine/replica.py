"""A replica: holds a network and the rows of a panel, computes tiles, writes them to the store.

A plain class; Ray makes an actor of it (ray.py), the serial runner calls it (serial.py).
"""

from __future__ import annotations

import math
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.checks import classes_of_whole_matrix, n_undecided
from distributed_stiffness.engine.prediction import Speed
from distributed_stiffness.engine.speed import measure, measure_checks
from distributed_stiffness.engine.sums import Folding, pair_reader, rounded_up
from distributed_stiffness.engine.whole_matrix import (
    ClassMeans,
    ClassSums,
    is_checked_whole,
    norm_error,
)
from distributed_stiffness.errors import GradientError
from distributed_stiffness.factories import import_loss
from distributed_stiffness.gradients.batches import Nest, from_numpy, map_tensors
from distributed_stiffness.gradients.error_bound import bound_of, refuse_bound, sample_examples
from distributed_stiffness.gradients.from_evidence import gradients_of_evidence
from distributed_stiffness.gradients.gram import Rows, collect, cosine, folded_product
from distributed_stiffness.gradients.passes import slow_gradients
from distributed_stiffness.gradients.per_example import (
    Known,
    PerExampleGradients,
    RecipeChanged,
)
from distributed_stiffness.gradients.surroundings import is_out_of_memory
from distributed_stiffness.plan import BLOCK_SHARE, ROWS_SHARE, Plan
from distributed_stiffness.store import Store, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, Task, Tile, pieces
from distributed_stiffness.training import build_model

MakeRows = Callable[[slice, Sequence[Rows] | None], list[Rows]]
Product = Callable[[Rows, Rows], Tensor]

_ARRAYS = {"pairs": "cosine", "distance": "distance"}
_Key = tuple[str, Checkpoint | None, int]  # kind of task, checkpoint, first example
_MODELS = 2  # networks kept loaded: of the task that computes, and of the next


@dataclass(frozen=True)
class Receipt:
    """What a task took; the numbers themselves are in the store."""

    task: Task
    seconds: float  # computing, then writing
    making_seconds: float  # of gradients
    write_seconds: float
    gradients: int  # made
    pairs: int  # multiplied
    bytes_written: int  # of numbers, before compression
    peak_memory: int  # bytes, of the process, so far
    memory: int  # bytes of the budget: less than the plan's after running out of memory
    retries: int  # of requests to the store
    class_means: ClassMeans | None = None  # of the checkpoint that is checked as a whole
    notes: tuple[str, ...] = ()  # what was found on the way

    def operations(self, plan: Plan) -> float:
        """Return the floating-point operations of gradients, two for a multiply-add."""
        if self.task.kind != "pairs":
            return 0.0
        return 2.0 * (self.gradients * plan.making_work + self.pairs * plan.pair_work)


@dataclass
class _Work:
    """What a task has made, and what it took so far."""

    tiles: dict[int, np.ndarray]  # by row
    examples: dict[str, np.ndarray] = field(default_factory=dict)
    making_seconds: float = 0.0
    gradients: int = 0
    pairs: int = 0
    bytes_written: int = 0
    norms: np.ndarray | None = None  # of the gradients at hand, (N,); NaN: of others
    class_means: ClassMeans | None = None


class Replica:
    """Computes the tasks of one study.

    Two threads may run tasks: one computes, the other reads a checkpoint or writes tiles.
    """

    def __init__(
        self,
        study: Study,
        data: StudyData,
        plan: Plan,
        *,
        store: str,
        checkpoints: str,
        device: str = "cpu",
    ) -> None:
        self.study, self.data, self.plan, self.device = study, data, plan, device
        self.store, self.checkpoints = Store(store), Checkpoints(checkpoints)
        self.loss = import_loss(study.loss)
        self._held = _HeldRows(int(ROWS_SHARE * plan.memory))
        self._models: OrderedDict[Checkpoint, nn.Module] = OrderedDict()
        self._gradients: tuple[Checkpoint, PerExampleGradients] | None = None
        self._known: Known = set()  # batches of these that were compared with plain autograd
        self._work = _Work({})
        self._folding = Folding(data, self.store.edges()) if study.keep == "sums" else None
        self._loading, self._computing = threading.Lock(), threading.Lock()

    def run(self, task: Task) -> Receipt:
        """Compute a task and write what it makes; doing it again writes the same.

        A task that another replica has finished meanwhile is not computed again. Out of memory, the
        blocks are halved, and the task is tried again.

        Raises:
            GradientError: the checkpoint's outputs are not finite.
            StoreError: a checkpoint cannot be read or the store cannot be written.
            StudyError: the smallest blocks do not fit into the memory.
        """
        retries = self.store.retries
        if task.checkpoint is not None:
            self._load(task.checkpoint)  # while another thread computes
        with self._computing:
            began = time.monotonic()
            with slow_gradients() as notes:
                work = self._computed(task)
            computing = time.monotonic() - began
        began = time.monotonic()
        self._write(task, work)
        writing = time.monotonic() - began
        return Receipt(
            task,
            seconds=computing + writing,
            making_seconds=work.making_seconds,
            write_seconds=writing,
            gradients=work.gradients,
            pairs=work.pairs,
            bytes_written=work.bytes_written,
            peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            memory=self.plan.memory,
            retries=self.store.retries - retries,
            class_means=work.class_means,
            notes=tuple(notes),
        )

    def measure(self) -> Speed | None:
        """Measure what tiles and checks take, on a network before training.

        None where memory runs out: the first task finds the blocks that fit.
        """
        try:
            model = build_model(self.study, self.data, self.study.training.seeds[0])
            few = slice(0, min(self.plan.batch, self.plan.n_examples))
            with slow_gradients():  # which was said before any replica
                gradients = self._per_example(model.to(self.device))
            speed = measure(gradients, self._examples(few), self.plan, self._folding)
            labels = np.array(self.data.examples.labels)
            checks = measure_checks(gradients, self._examples(few), self.plan, labels, speed)
            return replace(speed, checks=checks)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _computed(self, task: Task) -> _Work:
        """Compute a task that nobody has finished, with smaller blocks if it must be."""
        if task.tiles and self.store.has(_ARRAYS[task.kind], task.checkpoint, task.tiles):
            return _Work({})
        while True:
            self._work = _Work({})
            try:
                _KINDS[task.kind](self, task)
                return self._work
            except RecipeChanged:
                self._held.clear()  # rows of the form that they had
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the handler: its traceback holds tensors.
            self._shrink()

    def _shrink(self) -> None:
        self._held.clear()
        self._work = _Work({})
        self.plan = self.plan.halved()
        self._held = _HeldRows(int(ROWS_SHARE * self.plan.memory))
        if self.device == "cuda":
            torch.cuda.empty_cache()

    # The three kinds of task

    def _pairs(self, task: Task) -> None:
        checkpoint = _required(task.checkpoint)
        gradients = self._gradients_of(checkpoint)

        def make(examples: slice, into: Sequence[Rows] | None) -> list[Rows]:
            started = time.monotonic()
            made = gradients.rows_of(
                self._examples,
                examples,
                batch=self.plan.batch,
                mended_together=self.plan.block,
                into=into,
                known=self._known,
            )
            self._work.making_seconds += time.monotonic() - started
            self._work.gradients += examples.stop - examples.start
            return made

        def product(rows: Rows, columns: Rows) -> Tensor:
            return cosine(rows, columns, gradients.precision)

        if self._folding is not None:
            self._work.norms = np.full(self.plan.n_examples, np.nan)
        if task.column in task.rows:
            self._work.examples = self._numbers_of_examples(task, make)
        self._tiles(task, make, product)

    def _distance(self, task: Task) -> None:
        def make(examples: slice, into: Sequence[Rows] | None) -> list[Rows]:
            X = torch.from_numpy(self.data.features(examples)).to(self.device)
            length = torch.linalg.vector_norm(X, dim=1, dtype=torch.float64)
            X = X / torch.where(length > 0, length, 1.0).unsqueeze(1).to(X.dtype)
            made = Rows((), X, torch.ones(len(X), device=X.device), length, length, length > 0)
            for room in into or ():
                room.put(slice(None), made)
            return list(into or [made])

        def make_all(examples: slice, into: Sequence[Rows] | None) -> list[Rows]:
            return collect(make, examples, self.plan.batch, into)

        def distance(rows: Rows, columns: Rows) -> Tensor:
            return 1 - folded_product(rows.dense_NP, columns.dense_NP).clamp_(-1.0, 1.0)

        self._tiles(task, make_all, distance)

    def _check(self, task: Task) -> None:
        """Compare the stored cosines of a sample with float64, then count undecided signs."""
        checkpoint = _required(task.checkpoint)
        sample = sample_examples(
            self.plan.n_examples,
            self._cosine_reader(checkpoint),
            seed=(checkpoint.learning_rate, checkpoint.seed, checkpoint.iteration),
            size=self.plan.sample,
        )
        examples = self._examples(sample.examples)
        gradients = self._gradients_of(checkpoint)
        if 8 * gradients.n_parameters * len(sample.examples) > BLOCK_SHARE * self.plan.memory:
            self._held.clear()  # their room: rows of other checkpoints may be made again
        memory = self.plan.sample_memory
        true = gradients.in_float64.plain.products(examples, None, memory=memory)
        found = bound_of(sample.cosines, true.cosines()[0].numpy(), symmetric=True)
        if not self.plan.allow_error:
            n_sample = len(sample.examples)
            refuse_bound(found, gradients, (sample.examples, examples), n_sample=n_sample)
        sums = self._class_sums(checkpoint, gradients.n_parameters)
        bound, undecided = self._undecided(checkpoint, found.bound, sums)
        if sums is not None:
            self._work.class_means = self._compared(
                sums, checkpoint, bound, (sample.examples, true.row_norms.numpy())
            )
        if self.study.training.imported:
            self.store.write_values(checkpoint, **self._curves(checkpoint))
        # `undecided` last: the store counts a checkpoint as checked when it is there.
        self.store.write_values(checkpoint, error_bound=bound)
        self.store.write_values(checkpoint, undecided=undecided)

    def _cosine_reader(
        self, checkpoint: Checkpoint
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Return what reads stored cosines, or makes them again where none are stored."""
        if self._folding is None:
            return lambda rows, columns: self.store.read("cosine", checkpoint, rows, columns)
        gradients = self._gradients_of(checkpoint)

        def product(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            left, right = gradients.settled(
                lambda: [gradients.rows(*self._examples(some)) for some in (rows, columns)]
            )
            return cosine(left, right, gradients.precision).cpu().numpy()

        return pair_reader(product, self.plan.batch)

    def _undecided(
        self, checkpoint: Checkpoint, bound: float, sums: ClassSums | None
    ) -> tuple[float, int]:
        """Return the bound and how many pairs lie below it; add the pairs up by class.

        Where no pairs are stored they were counted by power of two: the bound is the next one.
        """
        if self._folding is not None:
            bound, place = rounded_up(bound)
            if sums is not None:
                sums.add_examples(self.store.class_sums(checkpoint)[..., 0])
            return bound, int(self.store.near_zero(checkpoint)[place])
        tiling, undecided = self.plan.tiling, 0
        for i, j in tiling.upper():
            tile = self.store.read("cosine", checkpoint, tiling.examples(i), tiling.examples(j))
            undecided += n_undecided(tile, bound, diagonal=i == j)
            if sums is not None:
                sums.add(tiling.examples(i), tiling.examples(j), tile)
        return bound, undecided

    def _class_sums(self, checkpoint: Checkpoint, n_parameters: int) -> ClassSums | None:
        """Return room for sums by class, if this checkpoint is checked as a whole."""
        if not is_checked_whole(self.study, checkpoint):
            return None
        labels = np.array(self.data.examples.labels)
        return ClassSums(labels, classes_of_whole_matrix(self.plan, labels, n_parameters))

    def _compared(
        self,
        sums: ClassSums,
        checkpoint: Checkpoint,
        bound: float,
        true_norms: tuple[np.ndarray, np.ndarray],
    ) -> ClassMeans:
        """Compare means over all pairs of a checkpoint's classes with those that need no pairs.

        Args:
            sums: of the stored pairs.
            checkpoint: whose they are.
            bound: on the error of a cosine.
            true_norms: examples, and their norms in float64.

        Raises:
            GradientError: they differ by more than the error bound explains.
        """
        gradients = self._gradients_of(checkpoint)
        reference = gradients.in_float64.plain
        (norm,) = self.store.numbers(checkpoint, "gradient_norm")
        totals = torch.zeros(len(sums.classes), reference.n_parameters, dtype=torch.float64)
        for total, label in zip(totals, sums.classes, strict=True):
            examples = np.flatnonzero(sums.labels == label)
            for part in np.array_split(examples, math.ceil(len(examples) / self.plan.batch)):
                norms = torch.from_numpy(norm[part])
                total += reference.unit_sum(*self._examples(part), norms).cpu()
        products = (totals @ totals.T).numpy()
        examples, true = true_norms
        error = norm_error(norm[examples], true)
        return sums.compare(products, is_zero=norm == 0, bound=bound, norm_error=error)

    def _curves(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Return mean loss and accuracy of the examples, by split: no training measured them."""
        split = np.array(self.data.split)
        loss, correct = self.store.numbers(checkpoint, "loss", "correct")
        curves = {}
        for name in dict.fromkeys(self.data.split):
            curves[f"{name}_loss"] = float(loss[split == name].mean())
            curves[f"{name}_accuracy"] = float(correct[split == name].mean())
        return curves

    # Tiles

    def _tiles(self, task: Task, make: MakeRows, product: Product) -> None:
        """Compute the tiles (I, column) for I in the task's rows.

        The shape of every product follows from the plan alone, not from what else is held or
        missing, so that the same plan gives the same bits whatever happened before.
        """
        plan, tiling = self.plan, self.plan.tiling
        columns = tiling.examples(task.column)
        tiles = {row: torch.empty(tiling.size(row), tiling.size(task.column)) for row in task.rows}
        strips = [
            (row, strip) for row in task.rows for strip in pieces(tiling.examples(row), plan.strip)
        ]

        def fill(row: int, strip: slice, block: slice, values: Tensor) -> None:
            top, left = strip.start - tiling.examples(row).start, block.start - columns.start
            tiles[row][top : top + len(values), left : left + values.shape[1]].copy_(values)
            self._work.pairs += values.numel() // (2 if block is strip else 1)

        for group in _groups(strips, plan.panel_rows // plan.strip):
            held = [(row, strip, self._rows(task, strip, make)) for row, strip in group]
            for row, strip, rows in held:
                self._note_norms(strip, rows)
                if row == task.column:  # a product with itself is known to be symmetric
                    fill(row, strip, strip, product(rows, rows))
            for across in pieces(columns, plan.strip):
                # Neither what lies below the diagonal nor what is on it.
                wanting = [h for h in held if h[0] != task.column or across.start >= h[1].stop]
                for block, block_rows in self._blocks(task, across, make) if wanting else ():
                    self._note_norms(block, block_rows)
                    for row, strip, rows in wanting:
                        fill(row, strip, block, product(rows, block_rows))
        self._work.tiles = {row: values.numpy() for row, values in tiles.items()}

    def _note_norms(self, examples: slice, rows: Rows) -> None:
        if self._work.norms is not None:
            self._work.norms[examples] = rows.norm.cpu().numpy()

    def _rows(self, task: Task, strip: slice, make: MakeRows) -> Rows:
        """Return the rows of a strip, from memory if they are held."""
        return self._held.get(
            (task.kind, task.checkpoint, strip.start),
            lambda room: make(strip, None if room is None else [room])[0],
            length=strip.stop - strip.start,
        )

    def _blocks(self, task: Task, strip: slice, make: MakeRows) -> Iterator[tuple[slice, Rows]]:
        """Stream the rows of a strip of columns, block by block; nothing is made that is held."""
        plan, whole = self.plan, None
        if plan.holds_all or (task.kind, task.checkpoint, strip.start) in self._held:
            whole = self._rows(task, strip, make)
        for block in pieces(strip, plan.block):
            if whole is not None:
                yield block, whole[block.start - strip.start : block.stop - strip.start]
            else:
                yield block, make(block, None)[0]

    def _write(self, task: Task, work: _Work) -> None:
        """Write what a task has made: numbers of examples before the tile that says so."""
        tiling, checkpoint = self.plan.tiling, task.checkpoint
        if work.examples and checkpoint is not None:
            self.store.write_examples(checkpoint, tiling.examples(task.column), **work.examples)
        for row, tile in work.tiles.items():
            name = _ARRAYS[task.kind]
            if row == task.column:
                # A product of rows with themselves need not be symmetric to the last bit; and what
                # lies below its strips was not computed.
                tile = np.triu(tile) + np.triu(tile, 1).T
                if task.kind == "distance":
                    np.fill_diagonal(tile, 0)
            if not np.isfinite(tile).all():
                raise GradientError(f"{task}: a product is not finite")
            if self._folding is not None:
                self._write_sums(_required(checkpoint), (row, task.column), tile, work)
                continue
            if row != task.column:
                self.store.write_tile(name, checkpoint, (task.column, row), tiling, tile.T)
                work.bytes_written += tile.nbytes
            self.store.write_tile(name, checkpoint, (row, task.column), tiling, tile)
            work.bytes_written += tile.nbytes

    def _write_sums(
        self, checkpoint: Checkpoint, tile: Tile, cosine: np.ndarray, work: _Work
    ) -> None:
        assert self._folding is not None
        assert work.norms is not None
        tiling = self.plan.tiling
        rows, columns = map(tiling.examples, tile)
        for place, sums in zip(
            (tile, tile[::-1]), self._folding.tile(rows, columns, cosine, work.norms), strict=True
        ):
            if sums is not None:
                self.store.write_sums(checkpoint, place, tiling, sums)
                work.bytes_written += sums.nbytes

    # What a checkpoint needs

    def _numbers_of_examples(self, task: Task, make: MakeRows) -> dict[str, np.ndarray]:
        """Return norm, loss and correct of the examples of the task's column."""
        strips = pieces(self.plan.tiling.examples(task.column), self.plan.strip)
        parts = [self._rows(task, strip, make) for strip in strips]
        return {
            "gradient_norm": _joined(part.norm for part in parts),
            "loss": _joined(part.loss for part in parts),
            "correct": _joined(part.correct for part in parts),
        }

    def _examples(self, examples: slice | np.ndarray) -> tuple[Nest, Tensor]:
        inputs = from_numpy(self.data.inputs(examples))
        labels = torch.from_numpy(np.array(self.data.examples.labels[examples]))
        return map_tensors(lambda t: t.to(self.device), inputs), labels.to(self.device)

    def _model(self, checkpoint: Checkpoint) -> nn.Module:
        """Return the network of a checkpoint; those of the last few are kept loaded."""
        with self._loading:
            if checkpoint not in self._models:
                run, iteration = training_run(self.study, checkpoint)
                weights = self.checkpoints.load_weights(run, iteration)
                model = build_model(self.study, self.data, run.seed)
                model.load_state_dict(dict(weights.tensors))
                self._models[checkpoint] = model.to(self.device).eval()
                while len(self._models) > _MODELS:
                    self._models.popitem(last=False)
            self._models.move_to_end(checkpoint)
            return self._models[checkpoint]

    def _load(self, checkpoint: Checkpoint) -> None:
        """Read a checkpoint before its turn; where there is no memory for it now, then."""
        try:
            self._model(checkpoint)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise

    def _gradients_of(self, checkpoint: Checkpoint) -> PerExampleGradients:
        """Return the gradients of a checkpoint's network; the last one is kept."""
        if self._gradients is None or self._gradients[0] != checkpoint:
            self._gradients = checkpoint, self._per_example(self._model(checkpoint))
            self._known = set()
        return self._gradients[1]

    def _per_example(self, model: nn.Module) -> PerExampleGradients:
        chosen = self.study.gradients
        gradients, _ = gradients_of_evidence(
            model.eval(),
            self.loss,
            self._examples,
            self.plan.n_examples,
            parameters=chosen.parameters,
            precision=chosen.precision,
            factored=self.plan.factored,
        )
        gradients.checked_share = self.plan.checked_share
        return gradients


_KINDS: Mapping[str, Callable[[Replica, Task], None]] = {
    "pairs": Replica._pairs,
    "distance": Replica._distance,
    "check": Replica._check,
}


class _HeldRows:
    """Rows that were made, up to a number of bytes; the longest unused go first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: OrderedDict[_Key, Rows] = OrderedDict()

    def __contains__(self, key: _Key) -> bool:
        return key in self._rows

    def get(self, key: _Key, make: Callable[[Rows | None], Rows], *, length: int) -> Rows:
        """Return rows that are held, or make them.

        `make` is given the room of rows which had to go, where they were as many of the same kind
        (new memory costs a page fault every 4 KiB), but never that of the same checkpoint: a task
        may still be at work on them.
        """
        if key not in self._rows:
            # Room for one more of the last size is made first, so that the peak keeps the budget.
            size = next(reversed(self._rows.values())).nbytes() if self._rows else 0
            room = None
            while self._rows and self._total() + size > self._capacity:
                (kind, checkpoint, _), rows = self._rows.popitem(last=False)
                other = kind == key[0] and checkpoint != key[1]
                room = rows if other and len(rows) == length else None
                del rows
            self._rows[key] = make(room)
        self._rows.move_to_end(key)
        return self._rows[key]

    def clear(self) -> None:
        """Let everything go."""
        self._rows.clear()

    def _total(self) -> int:
        return sum(rows.nbytes() for rows in self._rows.values())


def _groups(
    strips: Sequence[tuple[int, slice]], size: int
) -> Iterator[Sequence[tuple[int, slice]]]:
    for start in range(0, len(strips), max(1, size)):
        yield strips[start : start + max(1, size)]


def _joined(parts: Iterable[Tensor]) -> np.ndarray:
    joined: np.ndarray = torch.cat(list(parts)).cpu().numpy()
    return joined


def _required(checkpoint: Checkpoint | None) -> Checkpoint:
    assert checkpoint is not None
    return checkpoint
