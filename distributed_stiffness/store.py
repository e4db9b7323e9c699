"""The store: one Zarr v3 group that `xarray.open_zarr(path)` opens with every label.

docs/SCHEMA.md is the contract. The driver lays the whole group out once; replicas write whole
chunks, one writer each, so that a retry or a second run needs no lock. What is done is read from
the chunks that are there, never from anybody's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib.metadata
import itertools
import json
import math
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions
import fsspec
import numpy as np
import psutil
import pydantic
import tenacity
import xarray as xr
import zarr
import zarr.abc.store
import zarr.codecs
import zarr.storage

from distributed_stiffness.analysis.pairs import (
    CLASS_SUMS,
    DISTANCE_SUMS,
    OTHER_SPLIT,
    SQUARE_SUMS,
    SUMS_DIMS,
    WEIGHTED_SUMS,
    as_text,
)
from distributed_stiffness.analysis.reduced import (
    DESCRIPTIONS,
    LONG_NAMES,
    distance_coordinates,
    sums_coordinates,
)
from distributed_stiffness.attributes import decoded, encoded
from distributed_stiffness.checkpoints import (
    METRICS,
    TrainingRun,
    write_durably,
    write_whole,
)
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.errors import StoreError
from distributed_stiffness.gradients.error_bound import MARGIN
from distributed_stiffness.paths import Location, located
from distributed_stiffness.plan import Plan, in_words
from distributed_stiffness.study import NOT_GIVEN, Study, Training, differences, fingerprint
from distributed_stiffness.tiling import Checkpoint, Tile, TileSet, Tiling

SCHEMA_VERSION = 1
# |cosine| is counted by power of two, from half a unit in the last place at 1, where no pairs are
# kept: so many signs are undecided under an error bound that is known only later.
EXPONENTS = np.arange(-24, 1)
_ITERATIONS = 1024
WHOLE_MATRIX_CHECK = "whole_matrix_check"  # attribute of the group
_NEEDED = ("fingerprint", "plan", "weights")  # attributes of the group, mappings
ADDED = "distances"  # attribute of the group: names of the distances that were added
_T = TypeVar("_T")
_RUN = ("learning_rate", "seed", "iteration")


@dataclass(frozen=True)
class _Variable:
    """One array of the schema."""

    dims: tuple[str, ...]
    dtype: str
    long_name: str
    description: str
    fill: Any = np.nan


_VARIABLES: Mapping[str, _Variable] = {
    "cosine": _Variable(
        (*_RUN, "example", "other"),
        "float32",
        "cosine of two loss gradients",
        "cos(g_i, g_j) in [-1, 1]: positive when a small gradient step on one example lowers the"
        " loss of the other. Its sign is the sign stiffness. 0 where a gradient is 0; NaN: not"
        " computed yet.",
    ),
    "gradient_norm": _Variable(
        (*_RUN, "example"),
        "float64",
        "norm of the loss gradient",
        "Euclidean norm over all parameters in play, at true scale, 0 or more. The dot product of"
        " two gradients is cosine * gradient_norm * other gradient_norm.",
    ),
    "loss": _Variable((*_RUN, "example"), "float64", "loss of the example", "0 or more, in nats."),
    "correct": _Variable(
        (*_RUN, "example"),
        "bool",
        "classified correctly",
        "True where the largest output is that of the example's label.",
        fill=False,
    ),
    "distance": _Variable(
        ("example", "other"),
        "float32",
        "cosine distance of the inputs",
        "1 - x_i.x_j/(|x_i||x_j|) in [0, 2], of the inputs as the network sees them.",
    ),
    **{
        name: _Variable(
            _RUN,
            "float64",
            name.replace("_", " "),
            "Mean over the whole split (over its examples, if checkpoints were imported), in"
            " evaluation mode; "
            + ("a share in [0, 1]." if name.endswith("accuracy") else "0 or more, in nats."),
        )
        for name in METRICS
    },
    "error_bound": _Variable(
        _RUN,
        "float64",
        "bound on the error of a cosine",
        "Largest difference from one-example float64 autograd over a sample of pairs, times a"
        f" margin of {MARGIN:g} or more; NaN: not checked yet.",
    ),
    "undecided": _Variable(
        _RUN,
        "int64",
        "pairs of undecided sign",
        "Pairs (i < j) with 0 < |cosine| < error_bound, whose sign is not certain; -1: not"
        " checked yet.",
        fill=-1,
    ),
}

# Where a study keeps sums, these are in the place of `cosine` and `distance`.
_SUMS: Mapping[str, _Variable] = {
    **{
        name: _Variable(
            (*_RUN, "other_part", "example", OTHER_SPLIT, *dims),
            "float64",
            LONG_NAMES[name],
            f"{DESCRIPTIONS[name]} By part of the others: add them up."
            + (" The outermost bins hold what lies beyond them." if name == DISTANCE_SUMS else "")
            + " NaN: not computed yet.",
        )
        for name, dims in SUMS_DIMS.items()
    },
    "near_zero": _Variable(
        (*_RUN, "part", "other_part", "exponent"),
        "int64",
        "pairs near zero",
        "Pairs (i < j) with 0 < |cosine| < 2**exponent, by part of each; 0 below the diagonal. -1:"
        " not computed yet.",
        fill=-1,
    ),
}
_PAIRS = ("cosine", "distance")


def _variables(keep: str) -> Mapping[str, _Variable]:
    """Return the arrays of a study that keeps pairs, or sums."""
    if keep == "pairs":
        return _VARIABLES
    return {**_SUMS, **{name: v for name, v in _VARIABLES.items() if name not in _PAIRS}}


# What a disk or a bucket raises: s3fs lets errors of its HTTP client through as they are.
STORAGE_ERRORS = (OSError, botocore.exceptions.BotoCoreError, aiohttp.ClientError)
# Of these, what trying again does not mend.
_LASTING_ERRORS = (
    PermissionError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.ParamValidationError,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
RETRY_SECONDS = 120.0  # a request to the store is tried for so long
_LONGEST_PAUSE = 10.0  # seconds between two tries

# Blosc lz4 with bit shuffling is nearly free; crc32c tells any reader of a flipped byte.
_COMPRESSORS = (
    zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    zarr.codecs.Crc32cCodec(),
)


@dataclass(frozen=True)
class Contents:
    """What a store holds: tiles of each checkpoint (a diagonal one only with its norms)."""

    tiles: Mapping[Checkpoint, Collection[Tile]]
    distance: Collection[Tile]
    checked: Collection[Checkpoint]


class _DurableLocalStore(zarr.storage.LocalStore):
    """A local store whose writes survive a power cut: temporary name, fsync, rename."""

    async def set(self, key: str, value: zarr.abc.buffer.Buffer) -> None:
        await self._ensure_open()
        content: Any = value.as_numpy_array()  # no copy, as to_bytes makes: it is megabytes
        await asyncio.to_thread(write_durably, self.root / key, memoryview(content))


class Store:
    """An open store; one in the driver, one in each replica."""

    def __init__(self, url: Location) -> None:
        """Open an existing store.

        Raises:
            StoreError: there is none, or its schema is not this version's.
        """
        self.url = located(url, "store", StoreError)
        try:
            # Its own zarr.json, not the consolidated copy: the driver's attributes change.
            self.group = zarr.open_group(_backend(self.url), mode="r+", use_consolidated=False)
        except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
            raise StoreError(
                f"there is no store at {self.url} as this process sees it; on a cluster of several"
                " machines the store must be on a shared path or in a bucket (s3://…)"
            ) from error
        version = self.group.attrs.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.url} is not a store of this program (schema_version is {version!r},"
                f" expected {SCHEMA_VERSION}); give another --store"
            )
        # "pairs", or "sums": what is there of each tile.
        self.keeps = str(self.group.attrs.get("keep", "pairs"))
        try:
            self._arrays = self._opened()
        except KeyError as error:
            if "laid_out" in self.group.attrs:
                if self.keeps == "sums" and not {WEIGHTED_SUMS, SQUARE_SUMS} <= set(self.group):
                    raise StoreError(
                        f"{self.url} keeps sums as an earlier version did, without {WEIGHTED_SUMS}"
                        f" and {SQUARE_SUMS}: reductions read it, but nothing can be added to it;"
                        " give another --store to compute the study anew"
                    ) from error
                raise
            raise StoreError(
                f"{self.url} was never laid out whole: the run that began it does that, when it is"
                " started again"
            ) from error
        self.retries = 0  # requests that were made again

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        """Send the URL to other processes, not the open handles."""
        return Store, (self.url,)

    # What is there

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The group's attributes; mappings as such, however they are kept.

        Raises:
            StoreError: one that nothing goes on without is damaged.
        """
        found = decoded(_read_metadata(self.url)["attributes"])
        if damaged := [name for name in _NEEDED if isinstance(found.get(name), str)]:
            raise StoreError(
                f"the attribute `{damaged[0]}` of {self.url} is damaged: expected JSON text of a"
                " mapping; copy the store's zarr.json from where it is whole"
            )
        return found

    def study(self) -> Study:
        """Return the study that the store is of.

        Raises:
            StoreError: its attribute is damaged, or of another version.
        """
        try:
            return Study.model_validate_json(self.attrs["study"])
        except (KeyError, pydantic.ValidationError) as error:
            raise StoreError(
                f"the attribute `study` of {self.url} is not a study of this version: {error}"
            ) from error

    def contents(self) -> Contents:
        """List what is there."""
        norms = self.listing("correct")  # the last of an example chunk's numbers to be written
        examples = self._arrays["correct"]
        n_chunks = math.ceil(examples.shape[-1] / examples.chunks[-1])
        tiles: defaultdict[Checkpoint, TileSet] = defaultdict(lambda: TileSet(n_chunks))
        for *lead, i, j in self._tiles_listed():
            if i != j or (*lead, i) in norms:
                tiles[Checkpoint(*lead)].add((i, j))
        distance = TileSet(n_chunks)
        for i, j in self.listing("distance") if self.keeps == "pairs" else _every_tile(n_chunks):
            distance.add((i, j))
        return Contents(
            tiles=dict(tiles),
            distance=distance,
            checked={Checkpoint(*lead) for lead in self.listing("undecided")},
        )

    def _tiles_listed(self) -> Iterator[tuple[int, ...]]:
        if self.keeps == "pairs":
            yield from self.listing("cosine")
        else:
            for *lead, j, i, _, _, _ in self.listing(CLASS_SUMS):
                yield (*lead, i, j)

    def has(self, name: str, checkpoint: Checkpoint | None, tiles: Iterable[Tile]) -> bool:
        """Whether tiles of a matrix are there, diagonal ones with their norms."""
        filesystem, root = fsspec.core.url_to_fs(self.url)
        filesystem.invalidate_cache()
        lead = _lead(checkpoint)
        tiles = list(tiles)
        if self.keeps == "pairs":
            keys = [(name, *lead, *tile) for tile in tiles]
        else:
            keys = [(CLASS_SUMS, *lead, j, i, 0, 0, 0) for i, j in tiles]
        if name == "cosine":
            keys += [("correct", *lead, i) for i, j in tiles if i == j]
        paths = (f"{root}/{array}/c/{'/'.join(map(str, chunk))}" for array, *chunk in keys)
        with _explained(self.url, "read"):
            return all(self._persistently(functools.partial(filesystem.exists, p)) for p in paths)

    def listing(self, name: str) -> set[tuple[int, ...]]:
        """List the chunks of a variable or coordinate that are there."""
        filesystem, root = fsspec.core.url_to_fs(self.url)
        filesystem.invalidate_cache()
        prefix = f"{root}/{name}/c/"
        with _explained(self.url, "read"):
            found = self._persistently(lambda: filesystem.find(prefix))
        keys = (key.removeprefix(prefix) for key in found)
        return {tuple(map(int, k.split("/"))) for k in keys if k.replace("/", "").isdigit()}

    # Writing

    def write_tile(
        self, name: str, checkpoint: Checkpoint | None, tile: Tile, tiling: Tiling, values: Any
    ) -> None:
        """Write one whole chunk of a matrix."""
        rows, columns = (tiling.examples(chunk) for chunk in tile)
        self._put(name, (*_lead(checkpoint), rows, columns), values)

    def write_sums(self, checkpoint: Checkpoint, tile: Tile, tiling: Tiling, sums: Any) -> None:
        """Write the sums of one tile (`engine.sums.TileSums`); those by class last: they count."""
        (i, j), lead = tile, _lead(checkpoint)
        rows = tiling.examples(i)
        self._put("near_zero", (*lead, i, j), sums.near_zero)
        for name in (WEIGHTED_SUMS, SQUARE_SUMS, DISTANCE_SUMS, CLASS_SUMS):
            self._put(name, (*lead, j, rows), getattr(sums, name))

    def write_examples(
        self, checkpoint: Checkpoint, examples: slice, **columns: np.ndarray
    ) -> None:
        """Write gradient_norm, loss and correct of one chunk of examples; `correct` last."""
        for name in ("gradient_norm", "loss", "correct"):
            self._put(name, (*_lead(checkpoint), examples), columns[name])

    def write_values(self, checkpoint: Checkpoint, **values: float) -> None:
        """Write numbers that a checkpoint has one of."""
        for name, value in values.items():
            self._put(name, _lead(checkpoint), value)

    def _put(self, name: str, place: tuple[int | slice, ...], values: Any) -> None:
        array = self._arrays[name]
        with _explained(self.url):
            self._persistently(lambda: array.__setitem__(place, values))

    def _persistently(self, request: Callable[[], _T]) -> _T:
        """Make a request, and again after a pause while the store fails in passing."""
        retrying = _retrying()
        try:
            return retrying(request)
        finally:
            self.retries += retrying.statistics["attempt_number"] - 1

    def read(
        self,
        name: str,
        checkpoint: Checkpoint | None,
        rows: slice | np.ndarray,
        columns: slice | np.ndarray,
    ) -> np.ndarray:
        """Read a part of a matrix; each chunk once.

        Raises:
            StoreError: a chunk is damaged; names it.
        """
        place = (*_lead(checkpoint), rows, columns)
        return self._read(name, checkpoint, lambda: self._arrays[name].oindex[place])

    def numbers(self, checkpoint: Checkpoint, *names: str) -> list[np.ndarray]:
        """Read numbers that every example, or tile, of a checkpoint has, whole.

        Raises:
            StoreError: a chunk is damaged; names it.
        """
        place = _lead(checkpoint)
        return [
            self._read(name, checkpoint, functools.partial(self._arrays[name].__getitem__, place))
            for name in names
        ]

    def _read(
        self, name: str, checkpoint: Checkpoint | None, request: Callable[[], np.ndarray]
    ) -> np.ndarray:
        try:
            with _explained(self.url, "read"):
                return self._persistently(request)
        except ValueError as error:
            raise StoreError(
                f"{self.url} is damaged ({error}): {', '.join(self._damaged(name, checkpoint))}."
                " `stiffness verify --repair` deletes what is wrong, and computes it anew"
            ) from error

    def of_checkpoints(self, name: str) -> np.ndarray:
        """Read a number that every checkpoint has one of: (learning rates, seeds, iterations)."""
        return self._read(name, None, lambda: self._arrays[name][...])

    def class_sums(self, checkpoint: Checkpoint) -> np.ndarray:
        """Return the sums of each example over all others, by class: (N, C, S)."""
        array = self._arrays[CLASS_SUMS]
        total = np.zeros((array.shape[4], *array.shape[6:]))
        for part in range(array.shape[3]):
            request = functools.partial(array.__getitem__, (*_lead(checkpoint), part))
            total += self._read(CLASS_SUMS, checkpoint, request).sum(1)
        return total

    def near_zero(self, checkpoint: Checkpoint) -> np.ndarray:
        """Return how many pairs lie below each power of two, (exponents,)."""
        (counts,) = self.numbers(checkpoint, "near_zero")
        return np.asarray(counts.sum((0, 1)))

    def edges(self) -> np.ndarray:
        """Return the edges of the distance bins of a store that keeps sums."""
        with _explained(self.url, "read"):
            lower, upper = (_array(self.group, name)[:] for name in ("lower_edge", "upper_edge"))
        return np.append(lower, upper[-1])

    def _damaged(self, name: str, checkpoint: Checkpoint | None) -> Iterator[str]:
        """Name the chunks of a matrix that cannot be read."""
        lead = _lead(checkpoint)
        for chunk in sorted(c for c in self.listing(name) if c[: len(lead)] == lead):
            try:
                self._arrays[name].blocks[chunk]
            except ValueError:
                yield f"{name}/c/{'/'.join(map(str, chunk))}"

    def set_attrs(self, **attrs: Any) -> None:
        """Change attributes in one write; only the driver may."""
        self._edit_attrs(lambda attributes: attributes.update(encoded(attrs)))

    def _edit_attrs(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Change attributes in one write."""
        self._edit_metadata(lambda metadata: edit(metadata["attributes"]))

    def _edit_metadata(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Change the group's metadata in one write.

        The consolidated copy of the arrays' metadata lies in the same file and stays as it is:
        zarr's own way to change attributes would drop it.
        """
        with _explained(self.url):
            metadata = _read_metadata(self.url)
            edit(metadata)
            filesystem, root = fsspec.core.url_to_fs(self.url)
            write_whole(filesystem, f"{root}/zarr.json", json.dumps(metadata, indent=2).encode())

    def _opened(self) -> dict[str, Any]:
        """Open every variable: those of the schema, and the distances that were added."""
        added = decoded(self.group.attrs.asdict()).get(ADDED, [])
        return {name: _array(self.group, name) for name in (*_variables(self.keeps), *added)}

    # Distances that are added (engine/distances.py)

    def add_distance(
        self, name: str, *, long_name: str, description: str, of_checkpoints: bool
    ) -> None:
        """Make room for another distance of pairs, unless there is; readers see it from then on."""
        if name in self._arrays:
            return
        lead = _RUN if of_checkpoints else ()
        variable = _Variable((*lead, "example", "other"), "float32", long_name, description)
        cosine = self._arrays["cosine"]
        sizes = dict(zip(cosine.metadata.dimension_names, cosine.shape, strict=True))
        with _explained(self.url):
            if name in self.group:  # of a run that died before it was said to be there
                del self.group[name]
            _create_variable(self.group, name, variable, sizes, cosine.chunks[-1])
            _consolidate(self.url)
        self.set_attrs(**{ADDED: [*self.attrs.get(ADDED, []), name]})
        self._arrays[name] = _array(self.group, name)

    # Growing (watching/)

    def resize_iterations(self, n: int) -> None:
        """Give every array room for n iterations; the chunks of any beyond are deleted.

        xarray sees it when it is published: until then the consolidated metadata say what they
        said.
        """
        with _explained(self.url):
            for array in (*self._arrays.values(), _array(self.group, "iteration")):
                dims = array.metadata.dimension_names
                shape = tuple(
                    n if dim == "iteration" else size
                    for dim, size in zip(dims, array.shape, strict=True)
                )
                if shape != array.shape:
                    array.resize(shape)
        self._arrays = self._opened()

    def publish_iterations(self, study: Study, identity: Mapping[str, Any], plan: Plan) -> None:
        """Say which iterations there are: to any reader, in one write.

        Args:
            study: with these iterations, for which there is room.
            identity: its fingerprint.
            plan: of so many checkpoints.
        """
        iterations = np.asarray(study.iterations, dtype=np.int64)
        with _explained(self.url):  # there may still be room for more
            _array(self.group, "iteration")[: len(iterations)] = iterations

        def edit(metadata: dict[str, Any]) -> None:
            for array in metadata["consolidated_metadata"]["metadata"].values():
                dims = array["dimension_names"]
                if "iteration" in dims:
                    array["shape"][dims.index("iteration")] = len(iterations)
            attributes = metadata["attributes"]
            attributes |= encoded(
                {
                    "study": study.model_dump_json(),
                    "fingerprint": dict(identity),
                    "plan": plan.to_json(),
                }
            )
            attributes.pop("finished", None)

        self._edit_metadata(edit)

    def sweep(self) -> None:
        """Remove what dead writers left behind; only when no writer is alive."""
        for leftover in self.leftovers():
            Path(leftover).unlink(missing_ok=True)

    # Looking over and mending (verify/)

    def leftovers(self) -> list[str]:
        """Half-written files, of local stores."""
        if "://" in self.url:
            return []
        return sorted(map(str, Path(self.url).rglob(".*.partial")))

    def chunk(self, name: str, place: tuple[int, ...]) -> np.ndarray:
        """Read one whole chunk, in all dims; where it is damaged, its codecs raise what they do."""
        array: Any = self._arrays[name] if name in self._arrays else _array(self.group, name)
        with _explained(self.url, "read"):
            return self._persistently(lambda: np.asarray(array.blocks[place]))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete chunks, in this order, by their keys; those that are not there stay so."""
        filesystem, root = fsspec.core.url_to_fs(self.url)
        with _explained(self.url):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    filesystem.rm_file(f"{root}/{key}")

    def write_coordinate(self, name: str, values: np.ndarray) -> None:
        """Write labels anew."""
        with _explained(self.url):
            _array(self.group, name)[...] = values

    def reopen(self) -> None:
        """Take back that the store is complete, and note that it is being mended."""

        def edit(attributes: dict[str, Any]) -> None:
            del attributes["finished"]
            attributes |= encoded({"mending": True})

        if "finished" in self.attrs:
            self._edit_attrs(edit)


def _every_tile(n_chunks: int) -> Iterator[Tile]:
    return itertools.product(range(n_chunks), range(n_chunks))


def create_or_continue(
    url: Location,
    study: Study,
    data: StudyData,
    plan: Plan,
    edges: Callable[[], np.ndarray] | None = None,
) -> Store:
    """Lay a store out, or open the one that is there if it belongs to the same study.

    `edges` returns those of the distance bins, for a store that keeps sums.

    Raises:
        StoreError: the store belongs to another study (names what differs), the path cannot be
            written, or the disk has too little room.
    """
    url = located(url, "store", StoreError)
    if not is_there(url):
        now = fingerprint(study, content=data.content_hash(), tile=plan.tile)
        return _retrying()(_create, url, study, data, plan, now, edges and edges())
    store = Store(url)
    _refuse_differences(store, study, data, tile=plan.tile)
    store.sweep()
    return store


def refuse_another_study(url: Location, study: Study, data: StudyData, *, tile: int | None) -> None:
    """Compare fingerprints, where there is a store; `tile` None takes the store's.

    Raises:
        StoreError: it belongs to another study; names each field that differs, was and is.
    """
    if is_there(url):
        _refuse_differences(Store(url), study, data, tile=tile)


def _refuse_differences(store: Store, study: Study, data: StudyData, *, tile: int | None) -> None:
    was = store.attrs["fingerprint"]
    edge = min(tile, data.n_examples) if tile else was["tile"]
    now = fingerprint(study, content=data.content_hash(), tile=edge)
    changes = differences(was, now)
    if changes:
        if was["data"] != now["data"]:
            changes.append(_why_other_data(store, study))
        if was["tile"] != now["tile"]:
            changes.append(
                f"its chunks are cut so: leave the tile out, and the run goes on with {was['tile']}"
            )
        raise StoreError(
            f"{store.url} belongs to another study: {'; '.join(changes)}. Give another --store, or"
            " the settings that it was made with"
        )


def _why_other_data(store: Store, study: Study) -> str:
    """Say which settings make the data other ones; a hash alone tells nobody."""
    then, now = json.loads(store.attrs["study"])["data"], study.data.model_dump(mode="json")
    changes = differences(then, {name: now[name] for name in then if name in now})
    if changes:
        return ", ".join(f"data.{change}" for change in changes)
    return (
        "the settings of the data are the same: what was read has changed (an input, a label, the"
        " order of the examples, or the training data)"
    )


def _create(
    url: str,
    study: Study,
    data: StudyData,
    plan: Plan,
    identity: Mapping[str, Any],
    edges: np.ndarray | None,
) -> Store:
    _require_room(url, plan)
    labelled, coordinates = data.labelled, list(_all_coordinates(study, data, edges))
    with _explained(url):
        group = zarr.create_group(
            _backend(url),
            overwrite=True,  # what a run that died left half laid out holds no chunk
            attributes=encoded(
                {
                    "schema_version": SCHEMA_VERSION,
                    "title": study.title,
                    "dataset": labelled.name,
                    "dataset_source": labelled.source,
                    "dataset_verified": labelled.verified,
                    "model": study.model.name,
                    "preprocessing": data.preprocessing.describe(),
                    "class_names": json.dumps(labelled.class_names),
                    **(
                        {"superclass_names": json.dumps(labelled.superclass_names)}
                        if labelled.superclass_names
                        else {}
                    ),
                    **({"keep": study.keep} if study.keep == "sums" else {}),
                    "study": study.model_dump_json(),
                    "fingerprint": dict(identity),
                    "plan": plan.to_json(),
                    "weights": {},
                    "versions": _versions(),
                    **_git_revision(),
                    "created": now(),
                    # How xarray tells labels from variables.
                    "coordinates": " ".join(c.name for c in coordinates if c.name not in c.dims),
                }
            ),
        )
        sizes = {
            "learning_rate": len(study.training.learning_rates),
            "seed": len(study.training.seeds),
            "iteration": len(study.iterations),
            "example": plan.n_examples,
            "other": plan.n_examples,
            "part": plan.tiling.n_chunks,
            "other_part": plan.tiling.n_chunks,
        } | {c.name: len(c.values) for c in coordinates if c.name in c.dims}
        for name, variable in _variables(study.keep).items():
            _create_variable(group, name, variable, sizes, plan.tile)
        for coordinate in coordinates:
            _create_coordinate(group, coordinate)
        _consolidate(url)
        store = Store(url)
        store.set_attrs(laid_out=True)
    return store


def _create_variable(
    group: zarr.Group, name: str, variable: _Variable, sizes: Mapping[str, int], tile: int
) -> None:
    group.create_array(
        name,
        shape=tuple(sizes[dim] for dim in variable.dims),
        chunks=tuple(_chunk(dim, sizes[dim], tile) for dim in variable.dims),
        dtype=variable.dtype,
        fill_value=variable.fill,
        dimension_names=variable.dims,
        compressors=_COMPRESSORS,
        attributes={
            "long_name": variable.long_name,
            "units": "1",
            "description": variable.description,
        },
    )


def _chunk(dim: str, size: int, tile: int) -> int:
    """Return how far one writer's chunk reaches along a dimension."""
    if dim in ("example", "other"):
        return tile
    return 1 if dim in (*_RUN, "part", "other_part") else size


def _create_coordinate(group: zarr.Group, coordinate: _Coordinate) -> None:
    values = coordinate.values
    attributes: dict[str, Any] = {"long_name": coordinate.long_name}
    if values.dtype.kind in "if":
        attributes["units"] = "1"
    most = _ITERATIONS if coordinate.name == "iteration" else 1  # it may grow within its chunk
    with _specified_since():
        array = group.create_array(
            coordinate.name,
            shape=values.shape,
            chunks=tuple(max(size, most) for size in values.shape),
            dtype=values.dtype,
            dimension_names=coordinate.dims,
            attributes=attributes,
            config={"write_empty_chunks": True},
        )
        array[:] = values


@dataclass(frozen=True)
class _Coordinate:
    name: str
    dims: tuple[str, ...]
    values: np.ndarray
    long_name: str


def _all_coordinates(
    study: Study, data: StudyData, edges: np.ndarray | None
) -> Iterator[_Coordinate]:
    yield from _coordinates(study, data)
    if edges is not None:
        yield from _coordinates_of_sums(data, edges)


def _coordinates(study: Study, data: StudyData) -> Iterator[_Coordinate]:
    training, steps = study.training, np.asarray(study.iterations, dtype=np.int64)
    for name, values, meaning in (
        ("learning_rate", np.asarray(training.learning_rates), _meaning_of_rate(training)),
        ("seed", np.asarray(training.seeds), "seed of the weights and of the order of examples"),
        ("iteration", steps, "step" if training.imported else "optimiser steps done"),
    ):
        yield _Coordinate(name, (name,), values, meaning)
    if not training.imported:  # else nobody knows the batches
        epoch = steps / training.steps_per_epoch(data.n_train)
        yield _Coordinate("epoch", ("iteration",), epoch, "passes over the training examples done")
    # Positions in a split name an example only where there is one split.
    names = data.index if len(set(data.split)) == 1 else np.arange(data.n_examples)
    for dim, prefix in (("example", ""), ("other", "other_")):
        yield _Coordinate(dim, (dim,), names, "example")
        for name, values, meaning in _labels(data):
            yield _Coordinate(prefix + name, (dim,), values, meaning)


def _coordinates_of_sums(data: StudyData, edges: np.ndarray) -> Iterator[_Coordinate]:
    named = sums_coordinates(data.labelled.class_names, list(dict.fromkeys(data.split)))
    named |= distance_coordinates(edges)
    for name, values in named.items():
        described = isinstance(values, xr.DataArray)
        long_name = values.attrs["long_name"] if described else name.replace("_", " ")
        dim = str(values.dims[0]) if described else name
        yield _Coordinate(name, (dim,), np.asarray(values), long_name)
    yield _Coordinate("exponent", ("exponent",), EXPONENTS, "power of two that |cosine| is below")


def _meaning_of_rate(training: Training) -> str:
    return "learning rate" + ("; 0: not given" if NOT_GIVEN in training.learning_rates else "")


def coordinate_values(
    study: Study, data: StudyData, edges: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return what every coordinate of a study's store holds, by name.

    `edges` are those of the distance bins, for a store that keeps sums.
    """
    return {c.name: c.values for c in _all_coordinates(study, data, edges)}


def _labels(data: StudyData) -> Iterator[tuple[str, np.ndarray, str]]:
    """What is known of each example: name, value for each, meaning."""
    labelled, labels = data.labelled, data.examples.labels
    yield "label", labels, "class, counted from 0"
    yield "class_name", as_text([labelled.class_names[k] for k in labels]), "name of the class"
    yield "split", as_text(data.split), "split of the data set"
    yield "index", data.index, "position in the split"
    if labelled.superclass_names and labelled.superclass_of_class:
        above = np.asarray(labelled.superclass_of_class, dtype=np.int64)[labels]
        names = as_text([labelled.superclass_names[k] for k in above])
        yield "superclass", above, "super-class, counted from 0"
        yield "superclass_name", names, "name of the super-class"


def _lead(checkpoint: Checkpoint | None) -> tuple[int, ...]:
    if checkpoint is None:
        return ()
    return (checkpoint.learning_rate, checkpoint.seed, checkpoint.iteration)


def weights_key(run: TrainingRun, iteration: int) -> str:
    """Return by what name the attribute `weights` keeps the hash of a checkpoint's weights."""
    return f"{run.learning_rate!r}/{run.seed}/{iteration}"


def training_run(study: Study, checkpoint: Checkpoint) -> tuple[TrainingRun, int]:
    """Return the run and the iteration that a place in the arrays stands for."""
    return (
        TrainingRun(
            study.training.learning_rates[checkpoint.learning_rate],
            study.training.seeds[checkpoint.seed],
        ),
        study.iterations[checkpoint.iteration],
    )


def _array(group: zarr.Group, name: str) -> Any:
    array: Any = group[name]
    return array.with_config({"write_empty_chunks": True})


def _backend(url: str) -> Any:
    return url if "://" in url else _DurableLocalStore(Path(url).absolute())


def chunk_in_memory(values: np.ndarray) -> Any:
    """Return an array of one chunk in memory, coded as a store's: to see how fast it is read."""
    return zarr.create_array(
        zarr.storage.MemoryStore(), data=values, chunks=values.shape, compressors=_COMPRESSORS
    )


def is_there(url: Location) -> bool:
    """Whether a store is laid out at a path or URL.

    Raises:
        StoreError: something else is there, or it cannot be looked into.
    """
    url = located(url, "store", StoreError)
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise StoreError(f"{url} is no place for a store: {error}") from error
    try:
        filesystem.invalidate_cache()
        if filesystem.exists(f"{root}/zarr.json"):
            attributes = _read_metadata(url)["attributes"]
            return "schema_version" not in attributes or "laid_out" in attributes
        if filesystem.exists(root) and filesystem.ls(root):
            raise StoreError(f"{url} exists and is not a store; give another --store")
    except STORAGE_ERRORS as error:
        raise StoreError(
            f"cannot look into {url}: {error}. Give a path or URL that can be written, with its"
            " credentials in the environment"
        ) from error
    return False


def _require_room(url: str, plan: Plan) -> None:
    """Refuse before the work what would fill a local disk."""
    if "://" in url:
        return
    place = Path(url).absolute()
    while not place.exists():
        place = place.parent
    free = psutil.disk_usage(str(place)).free
    needed = int(0.9 * plan.store_bytes)  # what compression leaves, at least
    if needed > free:
        raise StoreError(
            f"the store needs about {in_words(needed)}, {place} has {in_words(free)}"
            " free:"
            " give --store on a larger disk, fewer --examples, or fewer --iterations"
        )


def _read_metadata(url: str) -> dict[str, Any]:
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    metadata: dict[str, Any] = json.loads(filesystem.cat_file(f"{root}/zarr.json"))
    metadata.setdefault("attributes", {})
    return metadata


def _consolidate(url: str) -> None:
    with _specified_since():
        zarr.consolidate_metadata(_backend(url))


@contextlib.contextmanager
def _specified_since() -> Iterator[None]:
    """Leave out what zarr warns of: a part of the format that its release does not know as one.

    Text of fixed length got its specification (`fixed_length_utf32`) after zarr 3.1 was written;
    consolidated metadata have none yet, but xarray reads them, and warns where they are missing.
    """
    with warnings.catch_warnings():
        for known in ("Consolidated metadata", r"The data type \(FixedLengthUTF32"):
            warnings.filterwarnings("ignore", message=known)
        yield


@contextlib.contextmanager
def _explained(url: str, verb: str = "write to") -> Iterator[None]:
    try:
        yield
    except STORAGE_ERRORS as error:
        raise StoreError(
            f"cannot {verb} {url}: {error}. What was written is kept: make room or mend the"
            " path, and run the same command again"
        ) from error


def _retrying() -> tenacity.Retrying:
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_passing),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE),
        stop=tenacity.stop_after_delay(RETRY_SECONDS),
        reraise=True,
    )


def _is_passing(error: BaseException | None) -> bool:
    """Whether a request may succeed when it is made again."""
    if isinstance(error, StoreError):
        error = error.__cause__
    lasting = isinstance(error, _LASTING_ERRORS) or getattr(error, "errno", None) in _FULL
    return isinstance(error, STORAGE_ERRORS) and not lasting


def _versions() -> dict[str, str]:
    names = ("distributed_stiffness", "torch", "numpy", "ray", "zarr", "xarray")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git_revision() -> dict[str, str]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        ).stdout.split()
        # Installed within somebody's repository, the package is not what that revision says.
        if Path(revision[0]) == Path(__file__).parents[1]:
            return {"git_revision": revision[1]}
    return {}


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def stored_tile(url: str) -> int | None:
    """Return the edge of a tile of an existing store; None: there is none."""
    return int(Store(url).attrs["fingerprint"]["tile"]) if is_there(url) else None


def stored_plan(url: str, plan: Plan) -> Plan:
    """Return `plan`, or the one that an existing store was begun with if it fits the budget.

    The same blocks and strips give the same last bits, so a continued run keeps them.
    """
    if not is_there(url):
        return plan
    was = Plan.from_json({**Store(url).attrs["plan"], "memory": plan.memory})
    same_matrix = (was.n_examples, was.tile) == (plan.n_examples, plan.tile)
    fits = all(
        getattr(was, name) <= getattr(plan, name) for name in ("panel_rows", "row_bytes", "batch")
    )
    if not (same_matrix and fits):
        return plan
    checks = {name: getattr(plan, name) for name in ("checked_share", "checked_work", "sample")}
    return replace(was, allow_error=plan.allow_error, **checks)
