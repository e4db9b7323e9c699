"""Taking out of a store exactly what is wrong, so that a run computes it anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import Store, coordinate_values, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.verify.faults import Fault
from distributed_stiffness.verify.look import PER_EXAMPLE, VARIABLES
from distributed_stiffness.verify.recompute import Source

# What a run takes for a sign that something else is there goes first: a repair that is cut off
# leaves no hole that nobody fills.
_FIRST = ("undecided", "error_bound", "correct")


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
    labels = coordinate_values(study, source.data) if source else {}
    for name in {fault.array for fault in faults} & set(labels):
        store.write_coordinate(name, labels[name])
    for fault in faults:
        if fault.kind == "weights" and fault.place is not None:
            aside = folder.set_aside(*training_run(study, fault.place))
            progress.say(f"{fault.chunk} is put aside as {aside}; training makes it again")


def chunks_of(fault: Fault) -> Iterator[str]:
    """Name the chunks to delete, so that a run computes again what is wrong.

    Of a tile both transposes; of a checkpoint with a bad tile the error bound too, which was
    measured on it; `correct` with what lies beside it, for its absence brings all three.
    """
    lead = () if fault.place is None else _lead_of(fault)
    if fault.array == "cosine":
        yield from _transposes(fault.chunk)
        yield from (_key(name, lead) for name in ("undecided", "error_bound"))
        i, j = fault.chunk.split("/")[-2:]
        if fault.kind == "zero gradient":  # the norms may be what is wrong
            yield from (_key("correct", (*lead, chunk)) for chunk in (i, j))
    elif fault.array == "distance":
        yield from _transposes(fault.chunk)
    elif fault.array in PER_EXAMPLE:
        yield from (fault.chunk, fault.chunk.replace(fault.array, "correct", 1))
    elif fault.array in VARIABLES:  # what a checkpoint has one of
        yield from (fault.chunk, _key("undecided", lead))
    elif fault.kind == "weights":
        yield _key("undecided", lead)


def _transposes(key: str) -> tuple[str, str]:
    *rest, i, j = key.split("/")
    return key, "/".join((*rest, j, i))


def _lead_of(fault: Fault) -> tuple[object, ...]:
    assert fault.place is not None
    return (fault.place.learning_rate, fault.place.seed, fault.place.iteration)


def _key(name: str, place: Iterable[object]) -> str:
    return "/".join(map(str, (name, "c", *place)))


def _order(key: str) -> tuple[int, str]:
    name = key.partition("/")[0]
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST)), key
