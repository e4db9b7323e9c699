"""A look over a store finds whatever is wrong with it, names it, and brings back the same bits."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.torch
from damage import Damage, both, copy, cut, files, flip, invert, look, put, remove, verdict
from studies import assert_same_bits, run_options, tiny_study

from distributed_stiffness.checkpoints import weights_hash
from distributed_stiffness.cli import main
from distributed_stiffness.data import selection
from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import DataError, StoreError, StudyError
from distributed_stiffness.store import Store
from distributed_stiffness.study import Data, Gradients, Model, Training
from distributed_stiffness.verify import run
from distributed_stiffness.verify.numbers import (
    impossible_correct,
    undecided,
    wrong_numbers,
    wrong_tile,
)
from distributed_stiffness.verify.recompute import wrong_examples, wrong_pairs

# Of a checkpoint that a run takes up again; its file says what they are.
METRICS = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"}
LAST = "1/0/1"  # learning rate 0.01, iteration 30
LAST_IN_WORDS = "learning rate 0.01, seed 0, iteration 30"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was computed without disturbance."""
    store = tmp_path_factory.mktemp("verify") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with its checkpoints."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / finished.name


def transposes(*keys: str) -> set[str]:
    """Keys of tiles and of their transposes."""
    return {*keys, *("/".join((*k.split("/")[:-2], *k.split("/")[:-3:-1])) for k in keys)}


CHECK = {f"{name}/c/{LAST}" for name in ("undecided", "error_bound")}
TILE, TRANSPOSE = f"cosine/c/{LAST}/0/2", f"cosine/c/{LAST}/2/0"
PAIR = {TILE, TRANSPOSE}
DIAGONAL = f"cosine/c/{LAST}/1/1"


def of_examples(chunk: int) -> set[str]:
    """What is written of a chunk of examples, with its diagonal tile."""
    names = {f"{name}/c/{LAST}/{chunk}" for name in ("gradient_norm", "loss", "correct")}
    return {*names, f"cosine/c/{LAST}/{chunk}/{chunk}"}


# What is done, the faults found, and the chunks that a repair writes besides metrics.
FAULTS: dict[str, tuple[Damage, set[tuple[str, str]], set[str]]] = {
    "a flipped bit": (flip(TILE), {("unreadable", TILE)}, PAIR | CHECK),
    "a truncated chunk": (cut(TRANSPOSE, 700), {("unreadable", TRANSPOSE)}, PAIR | CHECK),
    "an empty file": (cut(DIAGONAL, 0), {("unreadable", DIAGONAL)}, of_examples(1) | CHECK),
    "a missing tile": (remove(TILE), {("missing", TILE)}, PAIR | CHECK),
    "a tile of other weights": (
        copy(("cosine/c/0/0/1/0/2", TILE), ("cosine/c/0/0/1/2/0", TRANSPOSE)),
        {("differs", TILE)},
        PAIR | CHECK,
    ),
    "a diagonal tile of other weights": (
        copy(("cosine/c/1/0/0/1/1", DIAGONAL)),
        {("differs", DIAGONAL)},
        of_examples(1) | CHECK,
    ),
    "two tiles swapped": (
        copy(
            (TILE, f"cosine/c/{LAST}/0/1"),
            (f"cosine/c/{LAST}/0/1", TILE),
            (TRANSPOSE, f"cosine/c/{LAST}/1/0"),
            (f"cosine/c/{LAST}/1/0", TRANSPOSE),
        ),
        {("differs", TILE), ("differs", f"cosine/c/{LAST}/0/1")},
        transposes(TILE, f"cosine/c/{LAST}/0/1") | CHECK,
    ),
    "two diagonal tiles swapped": (
        copy((DIAGONAL, f"cosine/c/{LAST}/2/2"), (f"cosine/c/{LAST}/2/2", DIAGONAL)),
        {("differs", DIAGONAL), ("differs", f"cosine/c/{LAST}/2/2")},
        of_examples(1) | of_examples(2) | CHECK,
    ),
    "a NaN": (put("cosine", (1, 0, 1, 3, 41), np.nan), {("not finite", TILE)}, PAIR | CHECK),
    "a value of 1.5": (
        put("cosine", (1, 0, 1, 3, 41), 1.5),
        {("out of range", TILE)},
        PAIR | CHECK,
    ),
    "an asymmetric tile": (
        put("cosine", (1, 0, 1, 3, 41), 0.25),
        {("asymmetric", TILE)},
        PAIR | CHECK,
    ),
    "an asymmetric diagonal tile": (
        put("cosine", (1, 0, 1, 21, 22), 0.25),
        {("asymmetric", DIAGONAL)},
        of_examples(1) | CHECK,
    ),
    "a diagonal that is off": (
        put("cosine", (1, 0, 1, 21, 21), 0.9),
        {("diagonal", DIAGONAL)},
        of_examples(1) | CHECK,
    ),
    "a damaged norm": (
        flip(f"gradient_norm/c/{LAST}/1"),
        {("unreadable", f"gradient_norm/c/{LAST}/1")},
        of_examples(1),
    ),
    "a negative norm": (
        put("gradient_norm", (1, 0, 1, 21), -1.0),
        {("out of range", f"gradient_norm/c/{LAST}/1")},
        of_examples(1),
    ),
    "norms of other weights": (
        copy(("gradient_norm/c/1/0/0/1", f"gradient_norm/c/{LAST}/1")),
        {("differs", f"gradient_norm/c/{LAST}/1")},
        of_examples(1),
    ),
    "losses of other weights": (
        copy(("loss/c/1/0/0/1", f"loss/c/{LAST}/1"), ("correct/c/1/0/0/1", f"correct/c/{LAST}/1")),
        {("differs", f"loss/c/{LAST}/1"), ("differs", f"correct/c/{LAST}/1")},
        of_examples(1),
    ),
    "the wrong examples correct": (
        invert((1, 0, 1, slice(20, 40))),
        {("inconsistent", f"correct/c/{LAST}/1")},
        of_examples(1),
    ),
    "those correct that other weights classify so": (
        copy(("correct/c/1/0/0/1", f"correct/c/{LAST}/1")),
        {("differs", f"correct/c/{LAST}/1")},
        of_examples(1),
    ),
    "a missing chunk of correct": (
        remove(f"correct/c/{LAST}/1"),
        {("missing", f"correct/c/{LAST}/1")},
        of_examples(1),
    ),
    "a missing chunk of losses": (
        remove(f"loss/c/{LAST}/1"),
        {("missing", f"loss/c/{LAST}/1")},
        of_examples(1),
    ),
    "a norm of 0": (
        put("gradient_norm", (1, 0, 1, 21), 0.0),
        {
            ("zero gradient", f"cosine/c/{LAST}/{i}/{j}")
            for i, j in ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1))
        }
,
        of_examples(0) | of_examples(1) | of_examples(2) | CHECK
        | transposes(f"cosine/c/{LAST}/0/1", f"cosine/c/{LAST}/1/2"),
    ),
    "a missing error bound": (
        remove(f"error_bound/c/{LAST}"),
        {("missing", f"error_bound/c/{LAST}")},
        CHECK,
    ),
    "a missing check": (
        remove(f"undecided/c/{LAST}"),
        {("missing", f"undecided/c/{LAST}")},
        CHECK,
    ),
    "a wrong count of undecided pairs": (
        put("undecided", (1, 0, 1), 7),
        {("inconsistent", f"undecided/c/{LAST}")},
        CHECK,
    ),
    "a training loss that is not the checkpoint's": (
        put("train_loss", (1, 0, 1), 0.5),
        {("inconsistent", f"train_loss/c/{LAST}")},
        CHECK,
    ),
    "a damaged accuracy": (
        flip(f"validation_accuracy/c/{LAST}"),
        {("unreadable", f"validation_accuracy/c/{LAST}")},
        CHECK,
    ),
    "a damaged distance": (
        flip("distance/c/2/0"),
        {("unreadable", "distance/c/2/0")},
        transposes("distance/c/2/0"),
    ),
    "a distance to oneself": (
        put("distance", (21, 21), 1e-3),
        {("diagonal", "distance/c/1/1")},
        {"distance/c/1/1"},
    ),
    "distances swapped": (
        copy(("distance/c/1/1", "distance/c/2/2"), ("distance/c/2/2", "distance/c/1/1")),
        {("differs", "distance/c/1/1"), ("differs", "distance/c/2/2")},
        {"distance/c/1/1", "distance/c/2/2"},
    ),
    "a wrong label": (put("label", (7,), 11), {("differs", "label/c/0")}, {"label/c/0"}),
    "missing class names": (
        remove("other_class_name/c/0"),
        {("missing", "other_class_name/c/0")},
        {"other_class_name/c/0"},
    ),
    "several at once": (
        both(flip(TILE), remove("distance/c/0/0"), flip(f"loss/c/{LAST}/0")),
        {
            ("unreadable", TILE),
            ("missing", "distance/c/0/0"),
            ("unreadable", f"loss/c/{LAST}/0"),
        },
        PAIR | CHECK | of_examples(0) | {"distance/c/0/0"},
    ),
}  # fmt: skip


class TestSoundStores:
    def test_nothing_is_wrong_with_a_store_as_it_was_computed(self, finished: Path) -> None:
        """
        Every chunk is read, every tile is sampled, no fault is found and nothing is written.
        """
        before = files(finished)

        found = look(finished, repair=True)

        assert found.is_well
        assert found.complete
        assert not found.faults
        assert not found.notes
        assert found.checked["chunks"] == len(before)
        assert found.checked["pairs computed again"] == 5 * (3 * 3 + 3 * 9)
        assert files(finished) == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"gradients": Gradients(tile=25, precision="bf16")},
            {"gradients": Gradients(tile=60, precision="float64")},
            {"model": Model(name="cnn", options={"channels": [4, 8]})},
            {
                "training": Training(learning_rates=(3e-2,), iterations=(0, 1, 1500)),
                "model": Model(name="fully_connected", options={"widths": [64, 32]}),
            },
            {"data": Data(name="digits", validation_examples=41, train_examples=20)},
            {"gradients": Gradients(tile=20, parameters=("1.*", "3.*"))},
        ],
        ids=["bf16", "float64", "cnn", "over-fitted", "two splits", "some parameters"],
    )
    def test_no_false_alarm(self, changes: dict[str, object], tmp_path: Path) -> None:
        """
        Coarse products, convolutions, over-fitted networks, ragged tiles: no fault is found,
        whatever is drawn.
        """
        run_study(tiny_study(**changes), run_options(tmp_path / "x.zarr"))

        for seed in range(3):
            found = look(tmp_path / "x.zarr", sample=6, seed=seed)

            assert [str(fault) for fault in found.faults] == []
            assert found.complete

    def test_gradients_of_zero(self, tmp_path: Path) -> None:
        """
        Examples whose gradient is 0 have norm 0 and rows of 0, diagonal included: that is right.
        """
        study = tiny_study(model=Model(name="networks:few_units"))
        run_study(study, run_options(tmp_path / "x.zarr"))
        norms = Store(tmp_path / "x.zarr").group["gradient_norm"][:]  # type: ignore[index]

        found = look(tmp_path / "x.zarr")

        assert 0 < (norms == 0).mean() < 1  # type: ignore[operator]
        assert not found.faults


class TestFaults:
    @pytest.mark.parametrize("what", FAULTS)
    def test_it_is_named_and_repaired_and_nothing_else_is_written(
        self, what: str, finished: Path, store: Path
    ) -> None:
        """
        Each fault is found by kind and chunk; a repair brings the same bits back, and writes only
        what hangs together with the fault.
        """
        damage, expected, rewritten = FAULTS[what]
        before = files(store)
        damage(store)

        found = look(store, repair=True)

        assert verdict(found) == expected
        assert all(fault.checkpoint == LAST_IN_WORDS for fault in found.faults if fault.place)
        assert found.repaired
        assert found.complete
        assert_same_bits(finished, store)
        after = files(store)
        changed = {key for key in after if after[key] != before[key]}
        assert {key for key in changed if key.split("/")[0] not in METRICS} == rewritten
        assert all(key.endswith(f"/c/{LAST}") for key in changed - rewritten)

    def test_a_store_with_a_hole_is_not_complete(self, store: Path) -> None:
        """
        What a finished store lacks is a fault; a look alone writes nothing.
        """
        remove(TILE)(store)
        before = files(store)

        found = look(store)

        assert not found.is_well
        assert not found.complete
        assert files(store) == before

    def test_a_bad_block_of_a_disk(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A chunk that the disk cannot read is named; a storage that does not answer ends the look.
        """
        read = Store.chunk

        def fails_with(number: int) -> None:
            def chunk(self: Store, name: str, place: tuple[int, ...]) -> np.ndarray:
                if (name, place) == ("cosine", (1, 0, 1, 0, 2)):
                    raise StoreError("cannot read") from OSError(number, "no")
                return read(self, name, place)

            monkeypatch.setattr(Store, "chunk", chunk)

        fails_with(errno.EIO)
        assert verdict(look(store)) == {("unreadable", TILE)}
        fails_with(errno.ETIMEDOUT)
        with pytest.raises(StoreError, match="cannot read"):
            look(store)

    def test_leftovers_of_a_dead_writer(self, finished: Path, store: Path) -> None:
        """
        A half-written file in a finished store is named and removed; no chunk is touched.
        """
        leftover = store / f"cosine/c/{LAST}/0/.1.0123.partial"
        leftover.write_bytes(b"half")
        before = files(finished)

        found = look(store, repair=True)

        assert verdict(found) == {("leftover", str(leftover))}
        assert found.repaired
        assert not leftover.exists()
        assert {k: t for k, t in files(store).items() if before[k] != t} == {}

    @pytest.mark.parametrize("damage", ["replaced", "damaged"])
    def test_a_checkpoint_of_other_weights(self, damage: str, finished: Path, store: Path) -> None:
        """
        A checkpoint that was replaced, or damaged, is named; a repair puts the file aside, trains
        the run again to the same weights, and leaves every tile as it is.
        """
        folder = store.with_suffix(".checkpoints")
        right = folder / "learning_rate=0.01/seed=0/iteration=00000030.model.safetensors"
        good, sha256 = right.read_bytes(), weights_in(right)
        if damage == "replaced":
            shutil.copy(str(right).replace("=0.01", "=0.001"), right)
        else:
            right.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        before = files(store)

        found = look(store, repair=True)

        assert verdict(found) == {("weights", str(right))}
        assert found.faults[0].checkpoint == LAST_IN_WORDS
        assert found.repaired
        assert weights_in(right) == sha256
        assert right.with_name(f"{right.name}.aside").exists()
        assert_same_bits(finished, store)
        changed = {key for key, time in files(store).items() if before[key] != time}
        assert {key for key in changed if key.split("/")[0] not in METRICS} == CHECK

    def test_a_repair_that_stays_without_success_says_what_is_left(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        If the run computes nothing, the faults that are left are named, and all is not well.
        """
        flip(TILE)(store)
        monkeypatch.setattr(run, "run_study", lambda *_: None)

        found = look(store, repair=True)

        assert not found.repaired
        assert not found.is_well
        assert not found.complete

    def test_a_repair_that_was_interrupted_goes_on(
        self, finished: Path, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        After Ctrl-C in a repair the store is not complete, which is said; another repair, or the
        study's own command, ends it.
        """

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        flip(TILE)(store)
        with monkeypatch.context() as patched:
            patched.setattr(run, "run_study", interrupted)
            with pytest.raises(KeyboardInterrupt):
                look(store, repair=True)

        between = look(store)
        assert not between.faults
        assert not between.complete
        assert any("a repair was interrupted" in note for note in between.notes)

        found = look(store, repair=True)
        assert found.repaired
        assert found.complete
        assert not found.notes
        assert_same_bits(finished, store)


class TestUnfinished:
    def test_what_no_run_has_come_to_is_no_fault(self, store: Path) -> None:
        """
        Holes of a store that is not finished are counted by checkpoint; it is not complete.
        """
        unfinish(store)

        found = look(store)

        assert found.is_well
        assert not found.faults
        assert not found.complete
        counts = "1 of correct, 2 of cosine, 1 of undecided"
        assert found.notes == (f"{LAST_IN_WORDS}: chunks not computed yet: {counts}",)

    def test_a_hole_that_no_run_fills_is_a_fault(self, finished: Path, store: Path) -> None:
        """
        Norms without their chunk, though `correct`, which is written last, is there: no run would
        look at them again.
        """
        unfinish(store)
        remove(f"gradient_norm/c/{LAST}/0")(store)

        found = look(store, repair=True)

        assert verdict(found) == {("missing", f"gradient_norm/c/{LAST}/0")}
        assert found.repaired
        assert not found.complete
        run_study(tiny_study(), run_options(store))
        assert_same_bits(finished, store)

    def test_a_repair_leaves_the_work_to_the_run_that_completes_it(
        self, finished: Path, store: Path
    ) -> None:
        """
        Of a store that is not finished a repair deletes what is wrong and computes nothing.
        """
        unfinish(store)
        flip(DIAGONAL)(store)
        before = files(store)

        found = look(store, repair=True)

        assert verdict(found) == {("unreadable", DIAGONAL)}
        assert found.repaired
        assert not found.complete
        assert files(store).items() < before.items()
        assert before.keys() - files(store).keys() == {DIAGONAL, f"error_bound/c/{LAST}"}
        run_study(tiny_study(), run_options(store))
        assert_same_bits(finished, store)

    def test_half_written_files_may_be_those_of_a_run_at_work(self, store: Path) -> None:
        """
        In a store that is not finished a half-written file is no fault.
        """
        unfinish(store)
        (store / f"cosine/c/{LAST}/0/.1.0123.partial").write_bytes(b"half")

        found = look(store)

        assert found.is_well
        assert any("half-written" in note for note in found.notes)


class TestWithoutSources:
    def test_without_checkpoints_all_else_is_done(self, store: Path) -> None:
        """
        Checkpoints that are gone are no fault of the store: it is said that nothing of them was
        computed again, and damage is found all the same.
        """
        shutil.rmtree(store.with_suffix(".checkpoints"))
        flip(TILE)(store)

        found = look(store)

        assert verdict(found) == {("unreadable", TILE)}
        assert sum("nothing of it was computed again" in note for note in found.notes) == 4

    def test_without_data_all_else_is_done(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Without the data nothing is computed again, which is said; a repair is refused before
        anything is deleted.
        """

        def nowhere(*_: object, **__: object) -> None:
            raise DataError("digits are not to be had")

        monkeypatch.setattr(run, "select", nowhere)
        assert not look(store).faults
        flip(TILE)(store)
        before = files(store)

        found = look(store)

        assert verdict(found) == {("unreadable", TILE)}
        assert found.notes == ("nothing was computed again: digits are not to be had",)
        with pytest.raises(StoreError, match=r"cannot repair .* not to be had"):
            look(store, repair=True)
        assert files(store) == before

    def test_other_data_are_not_compared_with(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Data that are not those of the store say nothing about it.
        """
        others = selection.select(Data(name="digits", validation_examples=60, sample_seed=1))
        monkeypatch.setattr(run, "select", lambda *_, **__: others)

        found = look(store)

        assert not found.faults
        assert "not those of the store" in found.notes[0]


class TestCommand:
    @pytest.fixture
    def stiffness(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Callable[..., tuple[int, str, str]]:
        """Run `stiffness verify WORDS` in this process; exit code, stdout, stderr."""

        def run_here(*words: str) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["stiffness", "verify", *words])
            code = 0
            try:
                main()
            except SystemExit as ending:
                code = int(ending.code or 0)
            return code, *capsys.readouterr()

        return run_here

    def test_a_sound_store(
        self, finished: Path, stiffness: Callable[..., tuple[int, str, str]]
    ) -> None:
        """
        Exit code 0 and one line; with --json one object on stdout and nothing else.
        """
        code, stdout, _ = stiffness(str(finished))
        assert code == 0
        bound, verdict = stdout.splitlines()
        assert bound.startswith("error bound of a cosine: at most ")
        assert verdict.startswith(f"{finished}: no fault; complete. Checked: 119 chunks")

        code, stdout, _ = stiffness(str(finished), "--json")
        assert code == 0
        said = json.loads(stdout)
        assert said.keys() == {
            "store", "complete", "checked", "faults", "notes", "bounds", "repaired"
        }  # fmt: skip
        assert said["bounds"][-1].keys() == {"checkpoint", "error", "undecided"}
        assert said["bounds"][-1]["checkpoint"] == LAST_IN_WORDS
        assert said["complete"]
        assert said["faults"] == []

    def test_a_damaged_store(
        self, store: Path, stiffness: Callable[..., tuple[int, str, str]]
    ) -> None:
        """
        Exit code 1 with each fault by name; after a repair 0, and the same faults as repaired.
        """
        flip(TILE)(store)

        code, stdout, _ = stiffness(str(store))
        assert code == 1
        assert stdout.startswith(f"unreadable: {TILE} ({LAST_IN_WORDS}): cannot be read")
        assert "1 fault; complete" in stdout

        code, stdout, _ = stiffness(str(store), "--repair", "--engine=serial", "--json")
        assert code == 0
        said = json.loads(stdout)
        assert said["repaired"]
        assert said["faults"] == [
            {
                "kind": "unreadable",
                "array": "cosine",
                "checkpoint": LAST_IN_WORDS,
                "chunk": TILE,
                "sentence": said["faults"][0]["sentence"],
            }
        ]
        assert stiffness(str(store))[0] == 0

    def test_checkpoints_elsewhere(
        self, store: Path, stiffness: Callable[..., tuple[int, str, str]]
    ) -> None:
        """
        --checkpoints says where they are.
        """
        moved = store.with_suffix(".checkpoints").rename(store.parent / "elsewhere")

        assert "no checkpoint of" in stiffness(str(store))[1]
        assert "no checkpoint of" not in stiffness(str(store), f"--checkpoints={moved}")[1]

    @pytest.mark.parametrize(
        ("spoil", "expected"),
        [
            (lambda store: shutil.rmtree(store), "there is no store at"),
            (lambda store: (store / "zarr.json").write_text("{"), "zarr.json, of the group"),
            (lambda store: (store / "cosine/zarr.json").write_text("{}"), "zarr.json"),
            (lambda store: (store / "loss/zarr.json").unlink(), "zarr.json"),
            (lambda store: Store(store).set_attrs(study="{}x"), "attribute `study`"),
            (lambda store: Store(store).set_attrs(schema_version=9), "schema_version"),
            (lambda store: forget(store, "plan", "weights"), "lacks the attributes plan, weights"),
            (lambda store: forget(store, "laid_out"), "never laid out"),
        ],
    )
    def test_what_is_no_store(
        self,
        spoil: Damage,
        expected: str,
        store: Path,
        stiffness: Callable[..., tuple[int, str, str]],
    ) -> None:
        """
        A path without a store, or with one whose metadata are damaged: a sentence, no traceback.
        """
        spoil(store)

        code, stdout, stderr = stiffness(str(store))

        assert code == 1
        assert stdout == ""
        assert stderr.startswith("error: ")
        assert expected in stderr

    def test_too_small_a_sample(self, finished: Path) -> None:
        """
        One example of a chunk has no pair with another.
        """
        with pytest.raises(StudyError, match="sample is 1: expected 2 or more"):
            look(finished, sample=1)


class TestBucket:
    def test_a_store_in_a_bucket_is_repaired(self, finished: Path, bucket: str) -> None:
        """
        Damage, a hole and a replaced checkpoint in a bucket are found and made good.
        """
        filesystem = fsspec.filesystem("s3")
        for suffix in (".zarr", ".checkpoints"):
            folder = finished.with_suffix(suffix)
            for path in folder.rglob("*"):
                if path.is_file():
                    key = f"{bucket}/tiny{suffix}/{path.relative_to(folder)}"
                    filesystem.pipe_file(key, path.read_bytes())
        url, weights = f"{bucket}/tiny.zarr", f"{bucket.removeprefix('s3://')}/tiny.checkpoints"
        names = [
            f"{weights}/learning_rate={rate}/seed=0/iteration=00000030.model.safetensors"
            for rate in (0.001, 0.01)
        ]
        filesystem.pipe_file(f"{url}/{TILE}", b"")
        filesystem.rm_file(f"{url}/correct/c/0/0/0/1")
        filesystem.pipe_file(names[0], filesystem.cat_file(names[1]))

        found = look(url, repair=True)

        assert verdict(found) == {
            ("unreadable", TILE),
            ("missing", "correct/c/0/0/0/1"),
            ("weights", names[0]),
        }
        assert found.repaired
        assert_same_bits(finished, url)


class TestNumbers:
    """What no store of these tests holds."""

    def test_a_quarter_of_the_pairs_may_be_off_a_little(self) -> None:
        """
        A ReLU that float32 opened moves an example's pairs, two of nine: no fault. Seven of nine,
        or one by far, is.
        """
        true = np.linspace(-0.5, 0.5, 9)
        moved = np.where(np.arange(9) < 2, true + 1.4e-3, true)

        assert wrong_pairs(moved, true, 3e-6) is None
        assert wrong_pairs(np.where(np.arange(9) < 7, true + 1.4e-3, true), true, 3e-6)
        assert wrong_pairs(np.where(np.arange(9) < 1, true + 0.2, true), true, 3e-6)

    def test_a_bound_that_was_measured_on_wrong_tiles_excuses_nothing(self) -> None:
        """
        An error bound of 3 does not make a tile of other weights right.
        """
        true = np.linspace(-0.5, 0.5, 9)

        assert wrong_pairs(true + 0.1, true, 3.0)

    def test_tiny_norms_are_compared_by_their_size(self) -> None:
        """
        Norms and losses of an over-fitted network, 1e-200, are right to three digits or wrong.
        """
        true, outputs = np.array([1e-200, 3e-150, 2e-9]), np.full(3, 30.0)

        assert wrong_examples(true * (1 + 1e-5), true, outputs) is None
        assert wrong_examples(true * 1.1, true, outputs)

    def test_a_count_within_rounding_of_the_bound(self) -> None:
        """
        Pairs whose cosine is the bound itself may be counted or not; those on and below the
        diagonal, and those of zero gradients, are not.
        """
        tile = np.array([[1, 0.1, 0], [0.1, 1, 0.05], [0, 0.05, 1]], dtype=np.float32)

        assert list(undecided(tile, float(np.float32(0.1)), is_diagonal=True)) == [1, 2]
        assert list(undecided(tile, 0.2, is_diagonal=False)) == [4, 4]

    def test_an_unknown_norm_allows_a_diagonal_of_0_or_1(self) -> None:
        """
        Where a norm cannot be read, 0 and 1 may both be right, 0.5 is not.
        """
        norms = np.full(3, np.nan)

        def look_at(diagonal: list[float]) -> object:
            return wrong_tile(
                "cosine", np.diag(diagonal).astype(np.float32), (0, 0), norms=(norms, norms)
            )

        assert look_at([0, 1, 1]) is None
        assert look_at([0, 1, 0.5])

    def test_where_the_first_bad_number_is(self) -> None:
        """
        The sentence counts from the start of the matrix, and says how many there are.
        """
        values = np.zeros((3, 4), dtype=np.float32)
        values[1, 2:] = 3

        assert wrong_numbers("distance", values, (20, 40)) == (
            "out of range",
            "2 of 12 numbers are outside [0, 2], the first, 3, at example 21, other 42",
        )

    def test_a_loss_says_whether_an_example_can_be_correct(self) -> None:
        """
        The largest of C probabilities is 1/C or more, any other 1/2 or less.
        """
        loss = np.array([0.1, np.log(10), 2.0])

        assert impossible_correct(loss, np.array([True, True, False]), 10) is None
        assert impossible_correct(loss, np.array([False, True, False]), 10)
        assert impossible_correct(loss + 1, np.array([False, True, False]), 10)


def weights_in(file: Path) -> str:
    """Hash of the weights of a checkpoint's file."""
    return weights_hash(safetensors.torch.load_file(file))


def forget(store: Path, *attributes: str) -> None:
    """Take attributes out of a store."""
    metadata = json.loads((store / "zarr.json").read_text())
    for name in attributes:
        del metadata["attributes"][name]
    (store / "zarr.json").write_text(json.dumps(metadata))


def unfinish(store: Path) -> None:
    """Leave a store as a run that was stopped leaves it."""
    forget(store, "finished")
    for key in (TILE, f"cosine/c/{LAST}/1/2", f"correct/c/{LAST}/2", f"undecided/c/{LAST}"):
        remove(key)(store)
