"""A sample of a store's numbers, computed again from checkpoints and data.

A few examples are drawn from every chunk, so that their pairs meet every tile of every checkpoint;
each one's gradient is made by one-example float64 autograd (gradients/reference.py), which shares
no code with the rules. A tile of other weights, or two tiles that were swapped, are then found,
whatever their checksums say.

Axis letters: n sampled examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_stiffness.checkpoints import Weights
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.sums import bin_edges
from distributed_stiffness.factories import import_loss
from distributed_stiffness.gradients.batches import Nest, call, from_numpy, prepare, take
from distributed_stiffness.gradients.in_play import parameters_in_play
from distributed_stiffness.gradients.loss_head import logits_of
from distributed_stiffness.gradients.network import Network
from distributed_stiffness.gradients.reference import Reference
from distributed_stiffness.store import coordinate_values
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Tile, Tiling
from distributed_stiffness.training import build_model
from distributed_stiffness.verify.numbers import LARGEST_BOUND

MEMORY = 2**30  # bytes that float64 gradients may take
# In float32 a ReLU within rounding of 0 is open or shut by chance, and moves all cosines of an
# example (by 1.4e-3 where it was looked for: docs/design/0002-numbers.md); a small network's by
# more. So single pairs say little: of a tile's pairs, a quarter may lie beyond the error bound
# (the third smallest of nine differences decides), and one far beyond it is a fault by itself. A
# tile of other weights has nearly all of its pairs beyond.
SMALLEST_BOUND = 1e-5
SINGLE = 0.05
DISTANCE = 1e-5  # of float32 sums
# Norms and losses, relative: of a chunk's examples most, and any single one.
MOST, ANY = 1e-3, 5e-2
# What float32 outputs of size 1 may be off; a loss well below 1 is off by so much of itself.
_OUTPUT = 1e-5


def draw(tiling: Tiling, sample: int, seed: Sequence[int]) -> np.ndarray:
    """Draw `sample` examples of every chunk (all of a smaller one), ascending: (n,) int64."""
    random = np.random.default_rng(seed)
    drawn = [
        tiling.examples(chunk).start
        + random.choice(tiling.size(chunk), min(sample, tiling.size(chunk)), replace=False)
        for chunk in range(tiling.n_chunks)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


@dataclass(frozen=True)
class Numbers:
    """What each sampled example has one of at a checkpoint, in float64."""

    norms: np.ndarray  # (n,)
    losses: np.ndarray  # (n,)
    outputs: np.ndarray  # (n,), the largest |output| of each
    lead: np.ndarray  # (n,), by how much the label's output is the largest, or is not


@dataclass(frozen=True)
class Source:
    """What a store's numbers are made of, but for the weights."""

    study: Study
    data: StudyData

    def coordinates(self) -> dict[str, np.ndarray]:
        """Return what every coordinate of the store should hold, by name."""
        edges = None
        if self.study.keep == "sums":
            edges = bin_edges(self.data, self.study.distance_bins)
        return coordinate_values(self.study, self.data, edges)

    def reference(self, weights: Weights, seed: int) -> Reference:
        """Return what computes one-example float64 gradients.

        Args:
            weights: of the checkpoint.
            seed: of its training run.
        """
        model = build_model(self.study, self.data, seed)
        model.load_state_dict(dict(weights.tensors))
        network = Network(model.eval(), torch.float64)  # looks through what parts are wrapped in
        names = list(parameters_in_play(network.module, self.study.gradients.parameters))
        return Reference(network, import_loss(self.study.loss), names)

    def numbers(
        self, reference: Reference, examples: np.ndarray, advance: Callable[[], None]
    ) -> Numbers:
        """Compute again what each example has one of.

        Args:
            reference: of the checkpoint.
            examples: positions in the store, (n,), ascending.
            advance: called after each example.
        """
        inputs, targets = self.examples(examples)
        found = []
        for i in range(len(examples)):
            found.append(_one(reference, inputs, targets, i))
            advance()
        return Numbers(*np.array(found).T)

    def cosines(self, reference: Reference, examples: np.ndarray) -> np.ndarray:
        """Return the cosines of all pairs, (n, n) float64."""
        return reference.cosines(*self.examples(examples), memory=MEMORY).numpy()

    def distances(self, examples: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
        """Cosine distances of inputs, (n, m) float64; 1 from an input that is 0."""
        X = self._unit_features(examples)
        Y = X if others is None else self._unit_features(others)
        return 1 - np.asarray(X @ Y.T)

    def _unit_features(self, examples: np.ndarray) -> np.ndarray:
        X = self.data.features(examples).astype(np.float64)
        length = np.linalg.norm(X, axis=1, keepdims=True)
        X /= np.where(length > 0, length, 1.0)
        return X

    def examples(self, examples: np.ndarray) -> tuple[Nest, Tensor]:
        """Return inputs as the network sees them, and labels."""
        labels = np.array(self.data.examples.labels[examples])
        return from_numpy(self.data.inputs(examples)), torch.from_numpy(labels)


def _one(
    reference: Reference, inputs: Nest, targets: Tensor, i: int
) -> tuple[float, float, float, float]:
    """Gradient norm, loss, largest |output| and lead of the label's output, of example i."""
    row = torch.cat([g.flatten() for g in reference.gradient(inputs, targets, i).values()])
    largest = float(row.abs().max())
    norm = largest * float((row / largest).norm()) if largest > 0 else 0.0
    with torch.no_grad(), reference.network.running() as module:
        one = prepare(take(inputs, slice(i, i + 1)), torch.float64, torch.device("cpu"))
        outputs = call(module, one)
        loss = reference.loss(outputs, targets[i : i + 1])  # type: ignore[operator]
        outputs = logits_of(outputs)
    label = torch.arange(outputs.shape[1]) == targets[i]
    lead = outputs[0, label].max() - outputs[0, ~label].max() if len(label) > 1 else 1.0
    return norm, float(loss), float(outputs.abs().max()), float(lead)


def allowed_error(bound: float) -> float:
    """Return what most cosines may be off under an error bound; NaN: not known."""
    return min(max(0.0 if np.isnan(bound) else bound, SMALLEST_BOUND), LARGEST_BOUND)


def wrong_pairs(stored: np.ndarray, true: np.ndarray, bound: float) -> str | None:
    """Compare the sampled cosines of one tile.

    Args:
        stored: (pairs,).
        true: (pairs,).
        bound: the checkpoint's error bound; NaN: not known.
    """
    if not len(stored):
        return None
    difference = np.sort(np.abs(stored - true))
    typical, largest = difference[len(difference) // 4], difference[-1]
    bound = 0.0 if np.isnan(bound) else bound
    if typical <= allowed_error(bound) and largest <= max(bound, SINGLE):
        return None
    return (
        f"{len(stored)} pairs computed again in float64 differ by {np.median(difference):.1e}"
        f" (median) and up to {largest:.1e}; the store's error bound is {bound:.1e}"
    )


def wrong_distances(stored: np.ndarray, true: np.ndarray) -> str | None:
    """Compare the sampled distances of one tile, (pairs,) each."""
    difference = np.abs(stored - true)
    if not len(stored) or difference.max() <= DISTANCE:
        return None
    return f"{len(stored)} distances computed again differ by up to {difference.max():.1e}"


def wrong_examples(stored: np.ndarray, true: np.ndarray, outputs: np.ndarray) -> str | None:
    """Compare the sampled norms or losses of one chunk.

    Args:
        stored: (examples,).
        true: (examples,).
        outputs: largest |output| of each, (examples,).
    """
    size = np.maximum(np.abs(true), 1e-290)  # below, float64 loses digits
    relative = np.abs(stored - true) / size / np.maximum(1.0, _OUTPUT / MOST * outputs)
    if not len(stored) or (np.median(relative) <= MOST and relative.max() <= ANY):
        return None
    worst = int(relative.argmax())
    return (
        f"{len(stored)} numbers computed again in float64 differ, the most {stored[worst]:.6g}"
        f" from {true[worst]:.6g}"
    )


def wrong_correct(stored: np.ndarray, lead: np.ndarray, outputs: np.ndarray) -> str | None:
    """Compare which of a chunk's sampled examples are classified correctly, (examples,) each.

    Not where the two largest outputs are so near each other that float32 may tell them otherwise.
    """
    wrong = (stored != (lead > 0)) & (np.abs(lead) > _OUTPUT * np.maximum(1.0, outputs))
    return f"{wrong.sum()} of {len(wrong)} examples are not so" if wrong.any() else None


def pairs_of(places: np.ndarray, tile: Tile, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """Return which sampled pairs lie in a tile: rows and columns of an (n, n) matrix.

    Of a diagonal tile those above the diagonal.
    """
    rows, columns = (places_in(places, chunk, tiling) for chunk in tile)
    a, b = (part.ravel() for part in np.meshgrid(rows, columns, indexing="ij"))
    chosen = a < b if tile[0] == tile[1] else np.ones(len(a), dtype=bool)
    return a[chosen], b[chosen]


def places_in(places: np.ndarray, chunk: int, tiling: Tiling) -> np.ndarray:
    """Return which of the sampled examples lie in a chunk."""
    return np.flatnonzero(places // tiling.tile == chunk)
