"""How far a study is, read from its store and from what its run says of itself.

Reads only: a run that is at work is not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distributed_stiffness.engine.lease import is_alive, read_lease
from distributed_stiffness.paths import Location, located
from distributed_stiffness.plan import Plan
from distributed_stiffness.store import Store, training_run
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import all_checkpoints

_LISTED = 12  # checkpoints that are listed one by one


@dataclass(frozen=True)
class CheckpointStatus:
    """How far the matrix of one checkpoint is."""

    name: str
    learning_rate: float
    seed: int
    iteration: int
    tiles: int
    of: int
    checked: bool  # its error bound is there

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.checked and self.tiles == self.of

    def __str__(self) -> str:
        if self.complete:
            return f"{self.name}: complete"
        rest = "" if self.tiles < self.of else ", error bound missing"
        return f"{self.name}: {self.tiles}/{self.of} tiles{rest}"


@dataclass(frozen=True)
class Status:
    """How far a study is."""

    store: str
    title: str
    finished: str | None  # when
    distance_tiles: int
    checkpoints: tuple[CheckpointStatus, ...]
    run: Mapping[str, Any] | None  # what the run that computes it says; None: nobody does

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles that are there, and that there will be."""
        of = self.checkpoints[0].of
        there = self.distance_tiles + sum(c.tiles for c in self.checkpoints)
        return there, of * (len(self.checkpoints) + 1)

    def lines(self) -> Iterator[str]:
        """Say it to people."""
        there, of = self.tiles
        yield f"{self.store}: {self.title}, {self._state()}"
        done = sum(c.complete for c in self.checkpoints)
        yield (
            f"tiles: {there:,}/{of:,} ({there / of:.0%}); checkpoints complete:"
            f" {done}/{len(self.checkpoints)}"
        )
        for name, phase in (self.run or {}).get("phases", {}).items():
            yield _phase(name, phase)
        missing = [c for c in self.checkpoints if not c.complete]
        for checkpoint in missing[:_LISTED]:
            yield f"  {checkpoint}"
        if len(missing) > _LISTED:
            yield f"  and {len(missing) - _LISTED} more that are not complete"
        for name, tasks in (self.run or {}).get("replicas", {}).items():
            yield f"  {name}: {'; then '.join(tasks) or 'idle'}"

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        there, of = self.tiles
        return {**asdict(self), "tiles": there, "of": of, "state": self._state()}

    def _state(self) -> str:
        if self.run is not None:
            who = f"process {self.run.get('pid', '?')} on {self.run.get('host', '?')}"
            since = f"since {self.run.get('began', '?')}, last heard of {self.run.get('at', '?')}"
            if is_alive(self.run) is False:
                return f"interrupted: {who} died; run the same command again to go on"
            return f"computed by {who} {since}"
        if self.finished:
            return f"finished {self.finished}"
        return "not complete, and nobody computes it: run the same command again to go on"


def status(url: Location) -> Status:
    """Return how far the study of a store is.

    Raises:
        StoreError: there is no store.
    """
    store = Store(located(url, "store"))
    attrs, contents = store.attrs, store.contents()
    study = Study.model_validate_json(attrs["study"])
    tiles = Plan.from_json(attrs["plan"]).tiling.n_chunks ** 2
    checkpoints = []
    for checkpoint in all_checkpoints(*study.shape):
        name = study.name_of(checkpoint)
        run, iteration = training_run(study, checkpoint)
        there = len(contents.tiles.get(checkpoint, ()))
        checked = checkpoint in contents.checked
        checkpoints.append(
            CheckpointStatus(name, run.learning_rate, run.seed, iteration, there, tiles, checked)
        )
    return Status(
        store=store.url,
        title=attrs["title"],
        finished=attrs.get("finished"),
        distance_tiles=len(contents.distance),
        checkpoints=tuple(checkpoints),
        run=read_lease(store.url),
    )


def _phase(name: str, phase: Mapping[str, Any]) -> str:
    done, total, rate = phase["done"], phase["total"], phase["rate"]
    line = f"{name}: {done:,.0f}/{total:,.0f} {phase['unit']}"
    if rate > 0 and done < total:
        line += f", {rate:,.1f} {phase['unit']}/s, about {(total - done) / rate / 60:,.1f} min left"
    return line
