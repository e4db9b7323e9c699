"""A store is continued by the study that began it, wherever it runs, and by no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from damage import files
from studies import run_options, tiny_study

from distributed_stiffness import study as study_module
from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.engine import prepare, run_study
from distributed_stiffness.errors import StoreError
from distributed_stiffness.store import Store
from distributed_stiffness.study import (
    Data,
    Gradients,
    Model,
    Study,
    Training,
    differences,
    training_identity,
)

DATA = Data(name="digits", validation_examples=60)
HOLE = "cosine/c/1/0/1/0/2"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one tile missing."""
    store = tmp_path_factory.mktemp("fingerprint") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    (store / HOLE).rename(store.with_suffix(".tile"))
    return store


@pytest.fixture
def store(begun: Path, tmp_path: Path) -> Path:
    """A copy of it, with its checkpoints."""
    shutil.copytree(begun.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / begun.name


def changed_data(change: Callable[[StudyData], StudyData]) -> Callable[[pytest.MonkeyPatch], None]:
    """Load other data under the same settings."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def other(*words: Any, **options: Any) -> StudyData:
            return change(select(*words, **options))

        monkeypatch.setattr(prepare, "select", other)

    return patch


def one_pixel(data: StudyData) -> StudyData:
    """Change one pixel of one validation example by one grey level."""
    validation = data.labelled.validation
    inputs = validation.inputs.copy()
    at = (int(data.index[7]), *(k // 2 for k in inputs.shape[1:]))
    inputs[at] += 1
    labelled = replace(data.labelled, validation=replace(validation, inputs=inputs))
    return replace(data, labelled=labelled)


def another_order(data: StudyData) -> StudyData:
    """The same examples, the first two the other way round."""
    order = np.arange(data.n_examples)
    order[:2] = 1, 0
    examples = replace(
        data.examples, inputs=data.examples.inputs[order], labels=data.examples.labels[order]
    )
    return replace(data, examples=examples, index=data.index[order])


def newer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the gradient code."""
    version = study_module.GRADIENT_ENGINE_VERSION
    monkeypatch.setattr(study_module, "GRADIENT_ENGINE_VERSION", version + 1)


SAME_SETTINGS = r"the settings of the data are the same: .*\(an input, .* order of"
HASH = r'"[0-9a-f]{64}"'
ENGINE = study_module.GRADIENT_ENGINE_VERSION
# What is changed: fields of the study, or what it reads; and what the refusal says.
CHANGES: Mapping[str, tuple[dict[str, Any] | Callable[[pytest.MonkeyPatch], None], str]] = {
    "one pixel": (changed_data(one_pixel), rf"data was {HASH}, is {HASH}; {SAME_SETTINGS}"),
    "the order": (changed_data(another_order), rf"data was {HASH}, is {HASH}; {SAME_SETTINGS}"),
    "the draw of the examples": (
        {"data": DATA.model_copy(update={"sample_seed": 3})},
        rf"data was {HASH}, is {HASH}; data.sample_seed was 0, is 3",
    ),
    "how many examples": (
        {"data": DATA.model_copy(update={"validation_examples": 61})},
        "data.validation_examples was 60, is 61",
    ),
    "preprocessing": (
        {"data": DATA.model_copy(update={"unit_norm": False})},
        "preprocessing.unit_norm was true, is false",
    ),
    "labels": (
        {"data": DATA.model_copy(update={"permuted_labels": 0.5})},
        r"labels.permuted was 0.0, is 0.5",
    ),
    "the network": (
        {"model": Model(name="fully_connected", options={"widths": [16, 9]})},
        r"model.options.widths was \[16, 8\], is \[16, 9\]",
    ),
    "training": (
        {"training": Training(learning_rates=(1e-3, 1e-2), iterations=(0, 30), batch_size=31)},
        "training.batch_size was 32, is 31",
    ),
    "the loss": ({"loss": "mine:smoothed"}, 'loss was "cross_entropy", is "mine:smoothed"'),
    "precision": (
        {"gradients": Gradients(tile=20, precision="float64")},
        'precision was "float32", is "float64"',
    ),
    "parameters": (
        {"gradients": Gradients(tile=20, parameters=("1.*",))},
        r'parameters was null, is \["1\.\*"\]',
    ),
    "the gradient engine": (newer_engine, rf"gradient_engine was {ENGINE}, is {ENGINE + 1}"),
    "the tile": (
        {"gradients": Gradients(tile=25)},
        r"tile was 20, is 25; its chunks are cut so: leave the tile out, .* goes on with 20",
    ),
    "what is kept": ({"keep": "sums"}, 'keep was null, is "sums"'),
}


class TestAnotherStudy:
    @pytest.mark.parametrize("what", CHANGES)
    def test_it_is_refused_by_what_differs_before_anything_is_written(
        self, what: str, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The refusal names the field, what it was and what it is; the store is left as it was.
        """
        change, expected = CHANGES[what]
        before, metadata = files(store), (store / "zarr.json").read_bytes()
        if callable(change):
            change(monkeypatch)
        study = tiny_study(**({} if callable(change) else change))

        with pytest.raises(StoreError, match=rf"belongs to another study: .*{expected}"):
            run_study(study, run_options(store))

        assert files(store) == before
        assert (store / "zarr.json").read_bytes() == metadata

    @pytest.mark.parametrize("iteration", [0, 30], ids=["complete", "with a hole"])
    def test_other_weights_are_refused(self, iteration: int, store: Path) -> None:
        """
        One weight of a checkpoint that is the next after the old one: the refusal names the
        checkpoint and both hashes, whether or not anything of it is left to compute.
        """
        file = Checkpoints(store.with_suffix(".checkpoints")).path(TrainingRun(1e-2, 0), iteration)
        nudge(Path(file))
        before = files(store)

        with pytest.raises(
            StoreError,
            match=rf"other weights: those of learning rate 0\.01, seed 0, iteration {iteration},"
            r" had SHA-256 \w{12}…, the checkpoint in .* has \w{12}…",
        ):
            run_study(tiny_study(), run_options(store))

        assert {k for k, t in files(store).items() if before.get(k) != t} <= metrics(before)


class TestTheSameStudy:
    def test_without_a_tile_it_takes_the_stores(self, begun: Path, store: Path) -> None:
        """
        A study that says no tile goes on with that of the store.
        """
        run_study(tiny_study(gradients=Gradients()), run_options(store))

        assert (store / HOLE).read_bytes() == begun.with_suffix(".tile").read_bytes()

    @pytest.mark.parametrize(
        "machine",
        [
            {"threads": 2},
            {"memory": 900_000_000},
            {"memory": 150_000},
            {"device": "cpu", "max_replicas": 1, "address": None},
        ],
        ids=["threads", "more memory", "little memory", "device"],
    )
    def test_another_machine_goes_on(
        self, machine: dict[str, Any], begun: Path, store: Path
    ) -> None:
        """
        Threads, memory and device are none of the fingerprint; what is computed there is that of
        the first machine, to the last bit or within the error bound.
        """
        threads = torch.get_num_threads()
        try:
            run_study(tiny_study(), run_options(store, **machine))
        finally:
            torch.set_num_threads(threads)

        assert "finished" in Store(store).attrs
        found = Store(store).chunk("cosine", (1, 0, 1, 0, 2))[0, 0, 0]
        right = Store(begun).chunk("cosine", (1, 0, 1, 2, 0))[0, 0, 0].T
        assert np.abs(found - right).max() <= Store(begun).of_checkpoints("error_bound")[1, 0, 1]

    def test_a_title_and_folders_are_none_of_it(self, begun: Path, store: Path) -> None:
        """
        Another title, and checkpoints at another place.
        """
        elsewhere = store.with_suffix(".checkpoints").rename(store.parent / "elsewhere")

        run_study(tiny_study(title="other"), run_options(store, checkpoints=str(elsewhere)))

        assert (store / HOLE).read_bytes() == begun.with_suffix(".tile").read_bytes()


class TestDifferences:
    def test_each_field_is_named_with_what_it_was_and_is(self) -> None:
        """
        Nested fields by their path; fields that one side lacks as null.
        """
        was = {"a": 1, "b": {"c": [1], "d": "x"}, "gone": True}
        now = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "new": None, "newer": 0.5}

        assert differences(was, now) == [
            "b.c was [1], is [1, 2]",
            "gone was true, is null",
            "newer was null, is 0.5",
        ]
        assert differences(was, json.loads(json.dumps(was))) == []


def metrics(names: Mapping[str, int]) -> set[str]:
    """Chunks of training curves, which a checkpoint's file says anew when it is taken up."""
    return {name for name in names if name.split("/")[0].endswith(("_loss", "_accuracy"))}


def nudge(file: Path) -> None:
    """Move one weight to the next float32, and write the file as its owner would."""
    with safetensors.safe_open(str(file), framework="pt") as opened:
        metrics = json.loads(opened.metadata()["metrics"])
    tensors = safetensors.torch.load_file(file)
    first = next(iter(tensors.values())).view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(torch.inf))
    study: Study = tiny_study()
    identity = training_identity(study, content=select(study.data).training_hash)
    folder = Checkpoints(file.parents[2], identity=identity)
    folder._write(str(file), tensors, {"metrics": json.dumps(metrics)})
