"""Whatever befalls a store, in whatever order: it ends as one that was computed undisturbed.

Runs of a real study, in this process, that end or are killed at any of their writes; chunks that
are damaged, lost or replaced by others; looks, repairs, and settings that somebody changed. Tiles
are counted as they are computed: none is that was finished and sound.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from damage import look
from faults import environment_of_a_run
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from studies import assert_same_bits, run_options, tiny_study

from distributed_stiffness import checkpoints as checkpoints_module
from distributed_stiffness import store as store_module
from distributed_stiffness.engine import StudyFailed, run_study
from distributed_stiffness.engine.replica import Replica
from distributed_stiffness.errors import StoreError
from distributed_stiffness.store import WHOLE_MATRIX_CHECK, Store
from distributed_stiffness.study import Data, Gradients, Model, Study, Training
from distributed_stiffness.tiling import Task

CHUNKS = 3  # along each side of a matrix
CHECKPOINTS = ("0/0/0", "0/0/1")
PER_EXAMPLE = ("gradient_norm", "loss", "correct")
# Both triangles of a tile are computed together: it is named by the upper one.
Tile = tuple[str, int, int]  # "distance" or the checkpoint's place, row, column


def small_study(keep: str, **changes: object) -> Study:
    """Two checkpoints of 24 examples in tiles of 8."""
    fields: dict[str, object] = {
        "data": Data(name="digits", validation_examples=24),
        "model": Model(name="fully_connected", options={"widths": [6]}),
        "training": Training(learning_rates=(1e-2,), iterations=(0, 5)),
        "gradients": Gradients(tile=8),
        "keep": keep,
        "distance_bins": 4,
    }
    return tiny_study(**(fields | changes))


CHANGES: dict[str, dict[str, object]] = {
    "tile": {"gradients": Gradients(tile=12)},
    "precision": {"gradients": Gradients(tile=8, precision="float64")},
    "loss": {"loss": "mine:smoothed"},
    "sample_seed": {"data": Data(name="digits", validation_examples=24, sample_seed=1)},
}


@pytest.fixture(scope="module", params=["pairs", "sums"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study in one go; its store is called by what it keeps."""
    store = tmp_path_factory.mktemp("undisturbed") / f"{request.param}.zarr"
    run_study(small_study(request.param), run_options(store))
    return store


class Killed(BaseException):
    """The end of a process, at one of its writes; nothing in the package may catch it."""


class Writes:
    """Stands in for `write_durably`: the same without fsync, and it kills at one of the writes."""

    def __init__(self, *, left: int, how: str) -> None:
        self.left, self.how = left, how

    def __call__(self, path: Path, content: bytes | memoryview) -> None:
        """Write, unless the process is killed before, in the middle of it, or after."""
        if path.name.endswith(".run.json"):  # the lease, which is another thread's
            return _write(path, content)
        self.left -= 1
        if self.left < 0:
            raise Killed  # a thread that was at work on another write
        if self.left == 0 and self.how != "after":
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.how == "within":
                half = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
                half.write_bytes(content[: len(content) // 2])
            raise Killed
        _write(path, content)
        if self.left == 0:
            raise Killed
        return None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(content)
    partial.replace(path)


class Disturbed(RuleBasedStateMachine):
    """A store, and all that can befall it."""

    def __init__(self, undisturbed: Path) -> None:
        super().__init__()
        self.keep = undisturbed.stem
        self.right = {key: path.read_bytes() for key, path in chunks(undisturbed).items()}
        self.undisturbed = undisturbed
        self.folder = Path(tempfile.mkdtemp(dir=undisturbed.parent))
        self.store = self.folder / "x.zarr"
        self.computed, self.lost = Counter[Tile](), Counter[Tile]()
        self.tiles = tile_keys(self.keep)

    def teardown(self) -> None:
        """Bring the store to its end, whatever it went through, and compare."""
        try:
            if self.is_laid_out():
                self.run(lambda: look(self.store, repair=True))
            self.run(self.compute_all)

            found = look(self.store)
            assert [str(fault) for fault in found.faults] == []
            assert found.complete
            assert_same_bits(self.undisturbed, self.store)
            there = {key: path.read_bytes() for key, path in chunks(self.store).items()}
            assert there == self.right
            attribute = Store(self.undisturbed).attrs[WHOLE_MATRIX_CHECK]
            assert Store(self.store).attrs[WHOLE_MATRIX_CHECK] == attribute
            assert not list(self.store.rglob("*.partial"))
            assert self.computed == Counter({tile: 1 + self.lost[tile] for tile in self.tiles})
        finally:
            shutil.rmtree(self.folder)

    # What befalls it

    @initialize(begun=st.sampled_from(["nothing", "checkpoints", "everything"]))
    def begin(self, begun: str) -> None:
        """With nothing, with the checkpoints alone, or with all that an undisturbed run leaves."""
        if begun != "nothing":
            of = self.undisturbed.with_suffix(".checkpoints")
            shutil.copytree(of, self.store.with_suffix(".checkpoints"))
        if begun == "everything":
            shutil.copytree(self.undisturbed, self.store)
            self.computed.update(list(self.tiles))

    @rule()
    def compute(self) -> None:
        """A run to the end. Where chunks are damaged it may stop at one of them, and says so."""
        damaged, said = bool(self.damaged()), ""
        try:
            self.run(self.compute_all)
        except (StoreError, StudyFailed) as error:
            said = str(error)
        assert not said or (damaged and "verify --repair" in said), said

    @rule(at=st.integers(1, 100), how=st.sampled_from(["before", "within", "after"]))
    def kill(self, at: int, how: str) -> None:
        """A run that is killed at one of its writes, and ends if it has fewer."""
        with contextlib.suppress(StoreError, StudyFailed):
            self.run(self.compute_all, killed_at=at, how=how)

    @precondition(lambda self: self.is_laid_out())
    @rule(at=st.none() | st.integers(1, 30), how=st.sampled_from(["before", "within", "after"]))
    def repair(self, at: int | None, how: str) -> None:
        """Nothing that is wrong is left by a repair that comes to its end."""
        self.run(lambda: look(self.store, repair=True), killed_at=at, how=how)
        if at is None:
            assert not self.damaged()

    @precondition(lambda self: self.is_laid_out())
    @rule()
    def verify(self) -> None:
        """A look finds something exactly where something is wrong, and writes nothing."""
        before = self.contents()

        found = look(self.store)

        note(f"found: {[str(fault) for fault in found.faults]}")
        assert self.contents() == before
        if "finished" in Store(self.store).attrs:
            assert bool(found.faults) == (before != self.right)
        elif self.damaged():
            assert found.faults
        else:  # holes that no run would fill
            assert all(fault.kind == "missing" for fault in found.faults)

    @precondition(lambda self: self.damageable())
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "empty", "remove", "other weights"]))
    def corrupt(self, data: st.DataObject, how: str) -> None:
        """A bit flips, a file is cut short or gone, a tile is that of other weights."""
        key = data.draw(st.sampled_from(self.damageable()), label="chunk")
        whole = self.whole_tiles()
        path, content = self.store / key, (self.store / key).read_bytes()
        if how == "other weights":
            self.replace_tile(key)
        elif how == "remove" or not content:
            path.unlink()
        elif how == "flip":
            at = data.draw(st.integers(0, 8 * len(content) - 1), label="bit")
            flipped = bytearray(content)
            flipped[at // 8] ^= 1 << at % 8
            path.write_bytes(flipped)
        else:
            path.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
        self.lost.update(whole - self.whole_tiles())

    @precondition(lambda self: self.is_laid_out())
    @rule(what=st.sampled_from(sorted(CHANGES)))
    def change_a_setting(self, what: str) -> None:
        """Another study is refused; the store stays as it was."""
        before = self.contents()

        with pytest.raises(StoreError, match="belongs to another study"):
            run_study(small_study(self.keep, **CHANGES[what]), run_options(self.store))

        assert self.contents() == before

    @invariant()
    def finished_is_said_of_whole_stores_only(self) -> None:
        """A store that says so has all its chunks, but for those that were taken away since."""
        if self.is_laid_out() and "finished" in Store(self.store).attrs:
            assert not set(self.tiles) - self.whole_tiles() - set(self.lost)

    # How

    def compute_all(self) -> None:
        """Run the study."""
        run_study(small_study(self.keep), run_options(self.store))

    def run(
        self, what: Callable[[], Any], *, killed_at: int | None = None, how: str = "after"
    ) -> None:
        """Do what computes tiles; count them, and hold them against what was there before."""
        sound, whole, made = self.sound_tiles(), self.whole_tiles(), Counter[Tile]()
        compute = Replica._tiles

        def counted(replica: Replica, task: Task, *words: Any) -> None:
            of = "/".join(map(str, vars(task.checkpoint).values())) if task.checkpoint else ""
            made.update((of or "distance", row, task.column) for row in task.rows)
            compute(replica, task, *words)

        writes = Writes(left=killed_at or sys.maxsize, how=how)
        try:
            with (
                mock.patch.object(Replica, "_tiles", counted),
                mock.patch.object(store_module, "write_durably", writes),
                mock.patch.object(checkpoints_module, "write_durably", writes),
                contextlib.suppress(Killed),
            ):
                what()
        finally:
            self.computed += made
            note(f"computed: {sorted(made)}")
            assert not made.keys() & sound, "a tile was computed that was finished and sound"
            assert all(times == 1 for times in made.values())
            # Taken out by a repair; made, but not written whole before the end.
            now = self.whole_tiles()
            self.lost.update(whole & (made.keys() | whole - now))
            self.lost.update(made.keys() - now)

    def is_laid_out(self) -> bool:
        """Whether there is a store at all."""
        with contextlib.suppress(StoreError):
            return "laid_out" in Store(self.store).attrs
        return False

    def contents(self) -> dict[str, bytes]:
        """Every chunk."""
        return {key: path.read_bytes() for key, path in chunks(self.store).items()}

    def damageable(self) -> list[str]:
        """Chunks that are there, of arrays whose readers are told of a flipped bit."""
        if not self.is_laid_out():
            return []
        return sorted(key for key in chunks(self.store) if "/c/0/0" in key or "distance/" in key)

    def damaged(self) -> set[str]:
        """Chunks with other bytes than those of an undisturbed run."""
        return {key for key, content in self.contents().items() if content != self.right[key]}

    def replace_tile(self, key: str) -> None:
        """Put the tile of the other checkpoint in the place of the one that a chunk is of."""
        for (of, _, _), keys in self.tiles.items():
            if key in keys and of != "distance":
                other = CHECKPOINTS[CHECKPOINTS.index(of) - 1]
                for at in keys:
                    if not at.startswith(PER_EXAMPLE) and (self.store / at).exists():
                        (self.store / at).write_bytes(self.right[at.replace(of, other, 1)])

    def whole_tiles(self) -> set[Tile]:
        """Tiles whose chunks are all there, right or wrong."""
        there = chunks(self.store)
        return {tile for tile, keys in self.tiles.items() if keys <= there.keys()}

    def sound_tiles(self) -> set[Tile]:
        """Tiles whose chunks are all there and right."""
        there = self.contents()
        return {
            tile
            for tile, keys in self.tiles.items()
            if all(there.get(key) == self.right[key] for key in keys)
        }


def tile_keys(keep: str) -> dict[Tile, set[str]]:
    """Chunks that each tile of the study and its transpose are written to."""
    matrices = (*CHECKPOINTS, "distance") if keep == "pairs" else CHECKPOINTS
    every = itertools.product(matrices, range(CHUNKS), range(CHUNKS))
    return {(of, i, j): _keys(keep, of, {(i, j), (j, i)}) for of, i, j in every if i <= j}


def _keys(keep: str, of: str, tiles: set[tuple[int, int]]) -> set[str]:
    if of == "distance":
        return {f"distance/c/{i}/{j}" for i, j in tiles}
    examples = {f"{name}/c/{of}/{i}" for name in PER_EXAMPLE for i, j in tiles if i == j}
    if keep == "pairs":
        return examples | {f"cosine/c/{of}/{i}/{j}" for i, j in tiles}
    return examples.union(
        *(
            {
                f"class_sums/c/{of}/{j}/{i}/0/0/0",
                f"distance_sums/c/{of}/{j}/{i}/0/0/0/0",
                f"weighted_sums/c/{of}/{j}/{i}/0/0",
                f"square_sums/c/{of}/{j}/{i}/0/0",
                f"near_zero/c/{of}/{i}/{j}/0",
            }
            for i, j in tiles
        )
    )


def chunks(store: Path) -> dict[str, Path]:
    """Chunks by their keys; of a store, too, whose folders somebody is deleting."""
    found = [Path(folder, name) for folder, _, names in os.walk(store) for name in names]
    keys = {path.relative_to(store).as_posix(): path for path in found}
    return {k: p for k, p in keys.items() if "/c/" in k and not k.endswith(".partial")}


QUICK = settings(
    max_examples=6,
    stateful_step_count=6,
    phases=[Phase.generate],  # a smaller example takes minutes to find: every step is a real run
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_events_ends_as_an_undisturbed_run(undisturbed: Path) -> None:
    """
    Bit for bit, with every tile computed once and once more for each time that it was lost.
    """
    run_state_machine_as_test(lambda: Disturbed(undisturbed), settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_processes_that_are_killed(undisturbed: Path, tmp_path: Path) -> None:
    """
    Runs in processes of their own, each killed (SIGKILL) when it has written some more chunks: the
    last one ends as an undisturbed run, and what was whole at a kill is not written again.
    """
    store, study = tmp_path / "x.zarr", small_study(undisturbed.stem)
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from distributed_stiffness.engine import run_study\n"
        "from distributed_stiffness.study import Study\n"
        "from studies import run_options\n"
        f"run_study(Study.model_validate_json({study.model_dump_json()!r}),"
        f" run_options({str(store)!r}))\n"
    )
    written: dict[str, int] = {}
    for more in (12, 40, 25, 16):
        enough = len(chunks(store)) + more
        process = subprocess.Popen([sys.executable, "-c", script], env=environment_of_a_run())
        while len(chunks(store)) < enough and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = [
            keys for keys in tile_keys(undisturbed.stem).values() if keys <= chunks(store).keys()
        ]
        now = {key: chunks(store)[key].stat().st_mtime_ns for keys in whole for key in keys}
        assert written.items() <= now.items()
        written = now

    run_study(study, run_options(store))

    assert_same_bits(undisturbed, store)
    assert not list(store.rglob("*.partial"))
    assert written.items() <= {k: p.stat().st_mtime_ns for k, p in chunks(store).items()}.items()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_of_many_orders(undisturbed: Path) -> None:
    """
    The same, for longer.
    """
    many = settings(QUICK, max_examples=60, stateful_step_count=15)
    run_state_machine_as_test(lambda: Disturbed(undisturbed), settings=many)
