"""Further distances of a store's examples, added when it is there (docs/design/0008-distances.md).

A tile is a chunk, as those of the cosines are, and what is there is not computed again.

Legend of the arrays: i examples in rows, j examples in columns, F features.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prepare import Run
from distributed_stiffness.errors import DataError, ModelError, StoreError, StudyError
from distributed_stiffness.gradients.batches import call, from_numpy, map_tensors, tensors
from distributed_stiffness.gradients.precision import product_of_rows
from distributed_stiffness.paths import Location
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import Store, refuse_another_study, training_run, weights_key
from distributed_stiffness.study import training_identity
from distributed_stiffness.tiling import Checkpoint, Tile, Tiling, all_checkpoints, pieces
from distributed_stiffness.training import build_model

# Of the inputs (i, …) and (j, …), as the network sees them: (i, j), symmetric.
Own = Callable[[np.ndarray, np.ndarray], np.ndarray]
Vectors = Callable[[slice], Tensor]  # of a run of examples, (n, F) float64

PREFIX = "distance_"
MEMORY = 2**30  # bytes of vectors that are held; beyond, those of the columns are made again
BATCH = 256  # examples that go through the network at a time
_WORDS = "euclidean, latent:LAYER, latent:LAYER:euclidean"


@dataclass(frozen=True)
class Kind:
    """One distance: between what, and how."""

    name: str  # of the variable
    metric: str  # "cosine", "euclidean", or "own"
    layer: str | None = None  # of the network; None: the inputs
    own: Own | None = None

    @property
    def attrs(self) -> dict[str, str]:
        """What is said of it in the store."""
        if self.own is not None:
            called = self.name.removeprefix(PREFIX).replace("_", " ")
            return {"long_name": called, "description": "A distance of the user's own, of inputs."}
        of = "the inputs, as the network sees them"
        between = "the inputs"
        if self.layer is not None:
            of, between = f"the outputs of layer {self.layer}", f"layer {self.layer}"
        if self.metric == "cosine":
            formula = "1 - x_i.x_j/(|x_i||x_j|) in [0, 2], 1 where one of them is 0, of"
        else:
            formula = "|x_i - x_j|, 0 or more, of"
        name = "Euclidean" if self.metric == "euclidean" else self.metric
        return {
            "long_name": f"{name} distance of {between}",
            "description": f"{formula} {of}.",
        }


def kinds_of(wanted: Sequence[str], own: Mapping[str, Own]) -> list[Kind]:
    """Return the distances that are asked for.

    Raises:
        StudyError: one has no such form, or a name that cannot be a variable's.
    """
    found = [_kind(text) for text in wanted]
    for name, function in own.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise StudyError(
                f"a distance is called {name!r}: expected letters, digits and any of _.-"
            )
        found.append(Kind(PREFIX + name, "own", own=function))
    return found


def _kind(text: str) -> Kind:
    what, *rest = text.split(":")
    if text == "euclidean":
        return Kind(f"{PREFIX}euclidean", "euclidean")
    if what == "latent" and rest and rest[0] and rest[1:] in ([], ["cosine"], ["euclidean"]):
        metric = (rest[1:] or ["cosine"])[0]
        suffix = "_euclidean" if metric == "euclidean" else ""
        return Kind(f"{PREFIX}latent_{rest[0]}{suffix}", metric, layer=rest[0])
    raise StudyError(
        f"there is no distance {text!r}: expected one of {_WORDS}, LAYER being a module of the"
        " network by its name. The cosine distance of the inputs is in every store"
    )


def add_distances(
    run: Run | Location,
    wanted: Sequence[str] = (),
    *,
    own: Mapping[str, Own] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Add distances of pairs to a store that is there, as variables beside `distance`.

    Args:
        run: where store, checkpoints and data are (the rest of it is not looked at); or path or
            URL of the store.
        wanted: any of "euclidean", of the inputs as the network sees them; "latent:LAYER", the
            cosine distance of a layer's outputs at each checkpoint, flattened, and
            "latent:LAYER:euclidean". LAYER is the name of a module (`model.named_modules()`).
        own: distances of the user's own, by name: functions of the inputs of some examples and of
            some others, as the network sees them, (i, …) and (j, …), that return (i, j); symmetric.
        progress: where it is shown.

    Returns:
        Names of the variables, for `distance_profile(ds, distance=NAME)` and others: float32,
        (example, other), of layers (learning_rate, seed, iteration, example, other). Checkpoints
        that are not there yet are left out; another call adds them, and computes nothing again.

    Raises:
        StudyError: there is no such distance.
        StoreError: there is no store, it keeps no pairs, another run writes it, or checkpoints and
            data are not those it was made of.
        DataError: a distance is not finite, or not symmetric.
        ModelError: the network has no such layer, or it returns no tensor of the examples.
    """
    run = Run.of(run)
    if progress is None:
        with Progress(quiet=run.quiet) as progress:
            return add_distances(run, wanted, own=own, progress=progress)
    kinds = kinds_of(wanted, own or {})
    opened = _Opened(run, progress)
    opened.require_layers(kinds)
    with Lease(run.store_url).held(progress) as lease:
        for kind in kinds:
            opened.store.add_distance(
                kind.name, **kind.attrs, of_checkpoints=kind.layer is not None
            )
        todo = [task for kind in kinds for task in opened.missing(kind)]
        phase = progress.phase("distances", sum(len(tiles) for *_, tiles in todo), "tiles")
        for kind, checkpoint, tiles in todo:
            for _ in opened.fill(kind, checkpoint, tiles):
                lease.require()
                phase.advance()
        phase.close()
    return [kind.name for kind in kinds]


class _Opened:
    """A store with its study, its data and its checkpoints."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.store = Store(run.store_url)
        if self.store.keeps != "pairs":
            raise StoreError(
                f"{run.store_url} keeps sums by the cosine distance of the inputs, not pairs: other"
                " distances cannot be added"
            )
        self.study = self.store.study()
        self.data = select(
            self.study.data,
            directory=run.data_directory,
            download=run.download,
            every_class=not self.study.training.imported,
            progress=progress,
        )
        refuse_another_study(run.store_url, self.study, self.data, tile=None)
        identity = training_identity(self.study, content=self.data.training_hash)
        self.folder = Checkpoints(run.checkpoint_folder, identity=identity)
        self.tiling = Tiling(
            n_examples=self.data.n_examples, tile=int(self.store.attrs["fingerprint"]["tile"])
        )

    def require_layers(self, kinds: Sequence[Kind]) -> None:
        """Refuse a layer that the network does not have, before the work."""
        layers = [kind.layer for kind in kinds if kind.layer is not None]
        if layers:
            model = build_model(self.study, self.data, self.study.training.seeds[0])
            for layer in layers:
                latents(model, layer, self.data, slice(0, min(2, self.data.n_examples)))

    def missing(self, kind: Kind) -> Iterator[tuple[Kind, Checkpoint | None, list[Tile]]]:
        """Yield the tiles (I, J), I ≤ J, that lack themselves or their mirror, by checkpoint."""
        there = self.store.listing(kind.name)
        everything: list[Checkpoint | None] = [None]
        if kind.layer is not None:
            everything = [at for at in all_checkpoints(*self.study.shape) if self._exists(at)]
        for checkpoint in everything:
            lead = () if checkpoint is None else tuple(vars(checkpoint).values())
            tiles = [
                (i, j)
                for i, j in sorted(self.tiling.upper())
                if not {(*lead, i, j), (*lead, j, i)} <= there
            ]
            if tiles:
                yield kind, checkpoint, tiles

    def _exists(self, checkpoint: Checkpoint) -> bool:
        return self.folder.exists(*training_run(self.study, checkpoint))

    def fill(
        self, kind: Kind, checkpoint: Checkpoint | None, tiles: Sequence[Tile]
    ) -> Iterator[Tile]:
        """Compute and write tiles and their mirrors; yield each when it is there."""
        make = self._maker(kind, checkpoint)
        for i, of_row in itertools.groupby(tiles, key=lambda tile: tile[0]):
            for _, j in of_row:
                shape = self.tiling.size(i), self.tiling.size(j)
                values = _checked(make((i, j)), kind.name, shape, diagonal=i == j)
                if i != j:
                    self.store.write_tile(kind.name, checkpoint, (j, i), self.tiling, values.T)
                self.store.write_tile(kind.name, checkpoint, (i, j), self.tiling, values)
                yield i, j

    def _maker(self, kind: Kind, checkpoint: Checkpoint | None) -> Callable[[Tile], np.ndarray]:
        """Return what makes a tile (i, j), float64."""
        examples = self.tiling.examples
        if kind.own is not None:
            own, inputs = kind.own, self.data.inputs
            return lambda tile: np.asarray(own(*(inputs(examples(chunk)) for chunk in tile)))
        vectors = _held(self._vectors(kind, checkpoint), self.tiling)
        between = _cosine if kind.metric == "cosine" else _euclidean
        return lambda tile: between(vectors(tile[0]), vectors(tile[1]))

    def _vectors(self, kind: Kind, checkpoint: Checkpoint | None) -> Vectors:
        """Return what makes the vectors of a run of examples; of unit length for the cosine."""
        if checkpoint is None or kind.layer is None:
            make: Vectors = lambda some: torch.from_numpy(self.data.features(some))  # noqa: E731
        else:
            make = functools.partial(latents, self._model(checkpoint), kind.layer, self.data)

        def vectors(some: slice) -> Tensor:
            X = make(some).double()
            if kind.metric != "cosine":
                return X
            length = torch.linalg.vector_norm(X, dim=1, keepdim=True)
            return X / torch.where(length > 0, length, 1.0)

        return vectors

    def _model(self, checkpoint: Checkpoint) -> nn.Module:
        run, iteration = training_run(self.study, checkpoint)
        weights = self.folder.load_weights(run, iteration)
        known = self.store.attrs["weights"].get(weights_key(run, iteration))
        if known not in (None, weights.sha256):
            raise StoreError(
                f"{self.store.url} belongs to other weights than those of {run}, iteration"
                f" {iteration}, in {self.folder.url}: give the checkpoints it was made of"
            )
        model = build_model(self.study, self.data, run.seed)
        model.load_state_dict(dict(weights.tensors))
        return model


def latents(model: nn.Module, layer: str, data: StudyData, examples: slice) -> Tensor:
    """Return what a layer makes of examples, flattened, (n, F): in evaluation mode.

    Where the layer is used several times, its last output; where it returns several tensors, the
    first.

    Raises:
        ModelError: there is no such layer, it is not used, or returns no tensor of the examples.
    """
    module = dict(model.named_modules()).get(layer)
    if module is None or not layer:
        names = ", ".join(name for name, _ in model.named_modules() if name)
        raise ModelError(f"the network has no layer {layer!r}: it has {names}")
    caught: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        caught[:] = [t.detach() for t in tensors(output)[:1]]

    handle = module.register_forward_hook(keep)
    parts = []
    try:
        for some in pieces(examples, BATCH):
            caught.clear()
            with torch.no_grad():
                call(model.eval(), map_tensors(torch.clone, from_numpy(data.inputs(some))))
            if not caught or caught[0].shape[:1] != (some.stop - some.start,):
                found = tuple(caught[0].shape) if caught else "nothing"
                raise ModelError(
                    f"layer {layer!r} returns {found} for {some.stop - some.start} examples:"
                    " expected a tensor with the examples first"
                )
            parts.append(caught[0].flatten(1))
    finally:
        handle.remove()
    return torch.cat(parts)


def _held(vectors: Vectors, tiling: Tiling) -> Callable[[int], Tensor]:
    """Return the vectors of a chunk, held where there is room: of all, else of the last few."""
    first = vectors(tiling.examples(0))
    n_bytes = first[0].nelement() * first.element_size() * tiling.n_examples
    size = tiling.n_chunks if n_bytes <= MEMORY else 2
    return functools.lru_cache(maxsize=size)(lambda chunk: vectors(tiling.examples(chunk)))


def _cosine(X: Tensor, Y: Tensor) -> np.ndarray:
    """Return 1 - x_i.y_j of vectors of unit length, (i, j)."""
    return np.asarray(1 - product_of_rows(X, Y).clamp_(-1.0, 1.0))


def _euclidean(X: Tensor, Y: Tensor) -> np.ndarray:
    """Return |x_i - y_j|, (i, j); float64 leaves 1e-8 of |x| where two are the same."""
    return np.asarray(torch.cdist(X, Y))


def _checked(
    values: np.ndarray, name: str, shape: tuple[int, int], *, diagonal: bool
) -> np.ndarray:
    """Return a tile as float32; if it is on the diagonal symmetric to the bit, and 0 there."""
    if values.shape != shape:
        raise DataError(f"{name} has shape {values.shape}: expected {shape}")
    if not np.isfinite(values).all():
        raise DataError(f"{name}: a distance is not finite")
    if not diagonal:
        return values.astype(np.float32)
    if not np.allclose(
        values, values.T, rtol=1e-5, atol=1e-6 * float(np.abs(values).max(initial=0))
    ):
        raise DataError(f"{name} of (i, j) is not that of (j, i): expected a symmetric distance")
    upper = np.triu(values, 1)
    return np.asarray(upper + upper.T, dtype=np.float32)
