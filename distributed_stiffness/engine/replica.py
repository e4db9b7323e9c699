"""A replica: holds a network and the rows of a panel, computes tiles, writes them to the store.

A plain class; Ray makes an actor of it (ray.py), the serial runner calls it (serial.py).
"""

from __future__ import annotations

import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients.error_bound import HALF, error_bound, sample_examples
from distributed_stiffness.gradients.gram import Rows, collect, cosine, folded_product
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.plan import BLOCK_SHARE, ROWS_SHARE, Plan
from distributed_stiffness.store import Store, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, Task, pieces
from distributed_stiffness.training import build_model

MakeRows = Callable[[slice, list[Rows] | None], list[Rows]]
Product = Callable[[Rows, Rows], Tensor]

_ARRAYS = {"pairs": "cosine", "distance": "distance"}


@dataclass(frozen=True)
class Receipt:
    """What a task took; the numbers themselves are in the store."""

    task: Task
    seconds: float
    write_seconds: float
    peak_memory: int  # bytes, of the process, so far


class Replica:
    """Computes the tasks of one study."""

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
        self._held = _HeldRows(int(ROWS_SHARE * plan.memory))
        self._gradients: tuple[Checkpoint, PerExampleGradients] | None = None
        self._write_seconds = 0.0

    def run(self, task: Task) -> Receipt:
        """Compute a task and write what it makes; doing it again writes the same.

        Raises:
            GradientError: the checkpoint's outputs are not finite.
            StoreError: a checkpoint cannot be read or the store cannot be written.
        """
        started, self._write_seconds = time.monotonic(), 0.0
        {"pairs": self._pairs, "distance": self._distance, "check": self._check}[task.kind](task)
        return Receipt(
            task,
            time.monotonic() - started,
            self._write_seconds,
            peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )

    # The three kinds of task

    def _pairs(self, task: Task) -> None:
        checkpoint = _required(task.checkpoint)
        gradients = self._gradients_of(checkpoint)

        def make(examples: slice, into: list[Rows] | None) -> list[Rows]:
            return gradients.rows_by_recipe(*self._examples(examples), [gradients.recipe], into)

        def product(rows: Rows, columns: Rows) -> Tensor:
            return cosine(rows, columns, gradients.precision)

        if task.column in task.rows:
            self._write_examples(checkpoint, task.column, task, make)
        self._tiles(task, make, product)

    def _distance(self, task: Task) -> None:
        def make(examples: slice, into: list[Rows] | None) -> list[Rows]:
            X = torch.from_numpy(self.data.inputs(examples)).to(self.device).flatten(1)
            length = torch.linalg.vector_norm(X, dim=1, dtype=torch.float64)
            X = X / torch.where(length > 0, length, 1.0).unsqueeze(1).to(X.dtype)
            made = Rows((), X, torch.ones(len(X), device=X.device), length, length, length > 0)
            for room in into or ():
                room.copy_(made)
            return into or [made]

        def distance(rows: Rows, columns: Rows) -> Tensor:
            return 1 - folded_product(rows.dense_NP, columns.dense_NP).clamp_(-1.0, 1.0)

        self._tiles(task, make, distance)

    def _check(self, task: Task) -> None:
        """Compare the stored cosines of a sample with float64, then count undecided signs."""
        checkpoint, tiling = _required(task.checkpoint), self.plan.tiling
        sample = sample_examples(
            self.plan.n_examples,
            lambda rows, columns: self.store.read("cosine", checkpoint, rows, columns),
            seed=(checkpoint.learning_rate, checkpoint.seed, checkpoint.iteration),
        )
        inputs, targets = self._examples(sample.examples)
        gradients = self._gradients_of(checkpoint)
        bound = error_bound(
            gradients.model,
            self.study.loss,
            inputs,
            targets,
            sample.cosines,
            names=list(gradients.parameters),
            # Four blocks of the sample at least, so that a large network's are not made too often.
            memory=min(
                int(BLOCK_SHARE * self.plan.memory), max(2**28, HALF * 8 * gradients.n_parameters)
            ),
        )
        undecided = 0
        for i, j in tiling.upper():
            tile = self.store.read("cosine", checkpoint, tiling.examples(i), tiling.examples(j))
            below = (np.abs(tile) < bound) & (tile != 0)  # exactly 0: a gradient is zero
            undecided += int(np.triu(below, 1).sum() if i == j else below.sum())
        # `undecided` last: the store counts a checkpoint as checked when it is there.
        self.store.write_values(checkpoint, error_bound=bound)
        self.store.write_values(checkpoint, undecided=undecided)

    # Tiles

    def _tiles(self, task: Task, make: MakeRows, product: Product) -> None:
        """Compute the tiles (I, column) for I in the task's rows; write them and their transposes.

        The shape of every product follows from the plan alone, not from what else is held or
        missing, so that the same plan gives the same bits whatever happened before.
        """
        plan, tiling = self.plan, self.plan.tiling
        columns = tiling.examples(task.column)
        tiles = {row: torch.empty(tiling.size(row), tiling.size(task.column)) for row in task.rows}
        strips = [
            (row, strip) for row in task.rows for strip in pieces(tiling.examples(row), plan.strip)
        ]
        for group in _groups(strips, plan.panel_rows // plan.strip):
            held = [self._rows(task, strip, make) for _, strip in group]
            for block, block_rows in self._column_blocks(task, columns, make):
                place = slice(block.start - columns.start, block.stop - columns.start)
                for (row, strip), strip_rows in zip(group, held, strict=True):
                    if block.stop <= strip.start:
                        continue  # below the diagonal
                    top = strip.start - tiling.examples(row).start
                    part = tiles[row][top : top + len(strip_rows), place]
                    part.copy_(product(strip_rows, block_rows))
        for row, values in tiles.items():
            self._write_tile(task, row, values.numpy())

    def _rows(self, task: Task, strip: slice, make: MakeRows) -> Rows:
        """Return the rows of a strip, from memory if they are held."""
        return self._held.get(
            (task.kind, task.checkpoint, strip.start),
            lambda: collect(make, strip, self.plan.batch)[0],
        )

    def _column_blocks(
        self, task: Task, columns: slice, make: MakeRows
    ) -> Iterator[tuple[slice, Rows]]:
        """Stream the rows of the task's column, block by block; nothing is made that is held."""
        plan = self.plan
        for strip in pieces(columns, plan.strip):
            key = (task.kind, task.checkpoint, strip.start)
            if plan.holds_all or key in self._held:
                # The strip as it is held: a product with itself is then known to be symmetric.
                yield strip, self._rows(task, strip, make)
                continue
            for block in pieces(strip, plan.block):
                yield block, collect(make, block, plan.batch)[0]

    def _write_tile(self, task: Task, row: int, tile: np.ndarray) -> None:
        started = time.monotonic()
        if not np.isfinite(tile).all():
            raise GradientError(f"{task}: a product is not finite")
        name: str = _ARRAYS[task.kind]
        if row == task.column:
            # A product of rows with themselves need not be symmetric to the last bit.
            tile = np.triu(tile) + np.triu(tile, 1).T
            if task.kind == "distance":
                np.fill_diagonal(tile, 0)
        else:
            self.store.write_tile(
                name, task.checkpoint, (task.column, row), self.plan.tiling, tile.T
            )
        self.store.write_tile(name, task.checkpoint, (row, task.column), self.plan.tiling, tile)
        self._write_seconds += time.monotonic() - started

    # What a checkpoint needs

    def _write_examples(
        self, checkpoint: Checkpoint, chunk: int, task: Task, make: MakeRows
    ) -> None:
        """Write norm, loss and correct of a chunk, before the tile that says it is done."""
        examples = self.plan.tiling.examples(chunk)
        parts = [self._rows(task, strip, make) for strip in pieces(examples, self.plan.strip)]
        self.store.write_examples(
            checkpoint,
            examples,
            gradient_norm=_joined(part.norm for part in parts),
            loss=_joined(part.loss for part in parts),
            correct=_joined(part.correct for part in parts),
        )

    def _examples(self, examples: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = torch.from_numpy(self.data.inputs(examples))
        labels = torch.from_numpy(np.array(self.data.examples.labels[examples]))
        return inputs.to(self.device), labels.to(self.device)

    def _model(self, checkpoint: Checkpoint) -> nn.Module:
        run, iteration = training_run(self.study, checkpoint)
        model = build_model(self.study, self.data, run.seed)
        model.load_state_dict(dict(self.checkpoints.load_weights(run, iteration).tensors))
        return model.to(self.device).eval()

    def _gradients_of(self, checkpoint: Checkpoint) -> PerExampleGradients:
        """Return the gradients of a checkpoint's network; the last one is kept loaded."""
        if self._gradients is None or self._gradients[0] != checkpoint:
            chosen = self.study.gradients
            gradients = PerExampleGradients(
                self._model(checkpoint),
                self.study.loss,
                self._examples(slice(0, 3)),
                parameters=chosen.parameters,
                precision=chosen.precision,
                factored=self.plan.factored,
            )
            self._gradients = checkpoint, gradients
        return self._gradients[1]


class _HeldRows:
    """Rows that were made, up to a number of bytes; the longest unused go first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: OrderedDict[Hashable, Rows] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def get(self, key: Hashable, make: Callable[[], Rows]) -> Rows:
        if key not in self._rows:
            # Room for one more of the last size is made first, so that the peak keeps the budget.
            size = next(reversed(self._rows.values())).nbytes() if self._rows else 0
            while self._rows and self._total() + size > self._capacity:
                self._rows.popitem(last=False)
            self._rows[key] = make()
        self._rows.move_to_end(key)
        return self._rows[key]

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
