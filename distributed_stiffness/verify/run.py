"""From a store to what is wrong with it, and back to a sound one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fsspec

from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.data.selection import select
from distributed_stiffness.engine import Run, run_study
from distributed_stiffness.engine.lease import Lease, read_lease
from distributed_stiffness.errors import StiffnessError, StoreError, StudyError
from distributed_stiffness.paths import Location
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import STORAGE_ERRORS, Store
from distributed_stiffness.study import training_identity
from distributed_stiffness.training import build_model
from distributed_stiffness.verify.faults import Fault, Verification
from distributed_stiffness.verify.look import Look
from distributed_stiffness.verify.look_at_pairs import LookAtPairs
from distributed_stiffness.verify.look_at_sums import LookAtSums
from distributed_stiffness.verify.mend import take_out
from distributed_stiffness.verify.recompute import Source

_ATTRIBUTES = {"study", "plan", "weights", "class_names", "fingerprint"}
SAMPLE = 3  # examples of each chunk: nine pairs of every tile


def verify_store(
    run: Run | Location,
    *,
    repair: bool = False,
    sample: int = SAMPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Read every chunk of a store, check its numbers, and compute a sample of them again.

    Args:
        run: where the store, its checkpoints and its data are, and how a repair computes; or path
            or URL of the store.
        repair: delete what is wrong, compute it again, and look once more. A store that is not
            finished is left without what was wrong, for the run that completes it.
        sample: examples of each chunk that are computed again, 2 or more.
        seed: of their draw.
        progress: where it is shown.

    Returns:
        The faults found, before any repair, and whether one is left.

    Raises:
        StoreError: there is no store, its metadata are damaged, or the storage does not answer.
        StiffnessError: a repair cannot be made; what is missing then is computed by the next run.
    """
    if sample < 2:
        raise StudyError(f"sample is {sample}: expected 2 or more examples of each chunk")
    run = Run.of(run)
    if progress is None:
        with Progress(quiet=run.quiet) as progress:
            return verify_store(run, repair=repair, sample=sample, seed=seed, progress=progress)
    opened = _Opened(run, progress)
    found = opened.look(sample, seed)
    if not repair or not (found.faults or opened.is_being_mended()):
        return found
    was_finished = opened.is_finished() or opened.is_being_mended()
    opened.mend(found.faults)
    after = opened.look(sample, seed)
    return replace(
        after,
        faults=found.faults,
        notes=(*after.notes, *(f"not repaired: {fault}" for fault in after.faults)),
        repaired=not after.faults and (after.complete or not was_finished),
    )


class _Opened:
    """A store with its study, its data and its checkpoints."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.store = _open(run.store_url)
        self.study = self.store.study()
        self.source, self._without = self._find_source()
        self.folder = Checkpoints(run.checkpoint_folder, identity=self._identity())

    def is_finished(self) -> bool:
        """Whether a run has said that it is complete."""
        return "finished" in self.store.attrs

    def is_being_mended(self) -> bool:
        """Whether it was finished before a repair, which has not come to its end."""
        return "mending" in self.store.attrs and not self.is_finished()

    def look(self, sample: int, seed: int) -> Verification:
        """Look it over."""
        try:
            kind: type[Look[Any]] = LookAtPairs if self.store.keeps == "pairs" else LookAtSums
            look = kind(
                self.store,
                self.study,
                self.source,
                self.folder,
                sample=sample,
                seed=seed,
                progress=self.progress,
            )
            found = look.over_everything()
        except STORAGE_ERRORS as error:
            raise StoreError(f"cannot read {self.store.url}: {error}") from error
        notes = [self._without] if self._without else []
        if self.is_being_mended():
            notes.append("a repair was interrupted: give --repair, or run the study, to go on")
        if read_lease(self.store.url) is not None:
            notes.append("a run is computing this store, or died while it did")
        return Verification(
            store=self.store.url,
            complete=look.is_finished and not any(f.kind == "missing" for f in found.faults),
            checked=dict(found.checked),
            faults=tuple(found.faults),
            notes=(*notes, *found.notes),
            bounds=tuple(found.bounds.values()),
            n_examples=look.tiling.n_examples,
        )

    def mend(self, faults: tuple[Fault, ...]) -> None:
        """Delete what is wrong; compute it, if the store was finished."""
        was_finished = self.is_finished() or self.is_being_mended()
        if was_finished and self.source is None:
            raise StoreError(f"cannot repair {self.store.url}: {self._without}")
        with Lease(self.store.url).held(self.progress):
            take_out(faults, self.store, self.study, self.source, self.folder, self.progress)
        if was_finished:
            self.progress.say("what was wrong is deleted and computed again")
            run_study(self.study, self.run, self.progress)
        else:
            self.progress.say(
                "what was wrong is deleted; the run that completes the store computes it"
            )

    def _identity(self) -> str | None:
        if self.source is None:
            return None
        return training_identity(self.study, content=self.source.data.training_hash)

    def _find_source(self) -> tuple[Source | None, str]:
        """Load data and try the network; or say why nothing can be computed again."""
        try:
            data = select(
                self.study.data,
                directory=self.run.data_directory,
                download=self.run.download,
                every_class=not self.study.training.imported,
                progress=self.progress,
            )
            build_model(self.study, data, self.study.training.seeds[0])
        except StiffnessError as error:
            return None, f"nothing was computed again: {error}"
        if data.content_hash() != self.store.attrs["fingerprint"]["data"]:
            return None, "nothing was computed again: the data found are not those of the store"
        return Source(self.study, data), ""


def _open(url: str) -> Store:
    try:
        fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise StoreError(f"{url} is no place for a store: {error}") from error
    try:
        store = Store(url)
        if "laid_out" not in store.attrs:
            raise StoreError(f"{url} was never laid out whole: the run that began it does that")
        lacking = _ATTRIBUTES - store.attrs.keys()
        if lacking:
            raise StoreError(f"{url} lacks the attributes {', '.join(sorted(lacking))}")
    except STORAGE_ERRORS as error:
        raise StoreError(f"cannot look into {url}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the metadata of {url} (zarr.json, of the group or of an array) are damaged:"
            f" {error!r}. Run the study again with another --store"
        ) from error
    return store
