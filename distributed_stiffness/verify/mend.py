"""Taking out of a store exactly what is wrong, so that a run computes it anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from distributed_stiffness.analysis.pairs import CLASS_SUMS, SQUARE_SUMS, SUMS_DIMS, WEIGHTED_SUMS
from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import WHOLE_MATRIX_CHECK, Store, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.verify.faults import Fault
from distributed_stiffness.verify.look import OF_CHECKPOINT, PER_EXAMPLE, lead
from distributed_stiffness.verify.look_at_sums import NEAR_ZERO, chunk_of_tile, tile_of_chunk
from distributed_stiffness.verify.recompute import Source

# What a run takes for a sign that something else is there goes first: a repair that is cut off
# leaves no hole that nobody fills.
_FIRST = ("undecided", "error_bound", "correct", CLASS_SUMS)
_SUMS = (*SUMS_DIMS, NEAR_ZERO)
_OF_NORMS = (WEIGHTED_SUMS, SQUARE_SUMS)


def take_out(
    faults: Iterable[Fault],
    store: Store,
    study: Study,
    source: Source | None,
    folder: Checkpoints,
    progress: Progress,
) -> None:
    """Delete bad chunks and leftovers, write labels anew, put files of other weights aside.

    Raises:
        StoreError: the storage does not let it.
    """
    faults = list(faults)
    store.reopen()
    keys = sorted({key for fault in faults for key in chunks_of(fault)}, key=_order)
    store.delete(keys)
    store.sweep()
    labels = source.coordinates() if source else {}
    for name in {fault.array for fault in faults} & set(labels):
        store.write_coordinate(name, labels[name])
    for fault in faults:
        if fault.kind == "weights" and fault.place is not None:
            aside = folder.set_aside(*training_run(study, fault.place))
            progress.say(f"{fault.chunk} is put aside as {aside}; training makes it again")


def chunks_of(fault: Fault) -> Iterator[str]:
    """Name the chunks to delete, so that a run computes again what is wrong.

    Of a tile both transposes; of a checkpoint with a bad tile the error bound too, which was
    measured on it; `correct` with what lies beside it, for its absence brings all three. Of sums
    all that is kept of the tile and its transpose.
    """
    at = lead(fault.place)
    if fault.array == "cosine" or fault.array in _SUMS:
        if fault.array == "cosine":
            i, j = map(int, fault.chunk.split("/")[-2:])
            yield from (_key("cosine", (*at, *tile)) for tile in ((i, j), (j, i)))
        else:
            i, j = tile_of_chunk(fault.array, fault.chunk)
            for name, tile in itertools.product(_SUMS, ((i, j), (j, i))):
                yield _key(name, (*at, *chunk_of_tile(name, tile)))
        yield from (_key(name, at) for name in ("undecided", "error_bound"))
        compared = fault.array in _OF_NORMS and fault.kind == "inconsistent"
        if compared or fault.kind == "zero gradient":  # the norms may be what is wrong
            yield from (_key("correct", (*at, chunk)) for chunk in (i, j))
    elif fault.array == "distance":
        i, j = map(int, fault.chunk.split("/")[-2:])
        yield from (_key("distance", tile) for tile in ((i, j), (j, i)))
    elif fault.array in PER_EXAMPLE:
        yield from (fault.chunk, fault.chunk.replace(fault.array, "correct", 1))
    elif fault.array in OF_CHECKPOINT:
        yield from (fault.chunk, _key("undecided", at))
    elif fault.kind == "weights" or fault.array == WHOLE_MATRIX_CHECK:
        yield _key("undecided", at)


def _key(name: str, place: Iterable[object]) -> str:
    return "/".join(map(str, (name, "c", *place)))


def _order(key: str) -> tuple[int, str]:
    name = key.partition("/")[0]
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST)), key
