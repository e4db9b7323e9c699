"""Checkpoints: whole or not there, the same bits when they are read, and never code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun, weights_hash
from distributed_stiffness.errors import StoreError

RUN = TrainingRun(1e-3, 0)
METRICS = {"train_loss": 0.25, "validation_accuracy": 1 / 3}


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    """Return a folder that is not there yet: a path, or a URL."""
    where = {
        "path": tmp_path / "some run" / "checkpoints",
        "file": f"file://{tmp_path}/checkpoints",
        "memory": f"memory://{tmp_path.name}/checkpoints",
    }
    yield where[request.param]
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        for path in memory.find(f"/{tmp_path.name}"):
            memory.rm(path)


def training(optimizer: str = "adam") -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network with buffers and dropout, and its optimiser."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    if optimizer == "adam":
        return model, torch.optim.Adam(model.parameters(), 1e-2)
    return model, torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Take steps on random data."""
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.rglob("*") if p.is_file())


class TestRoundTrip:
    @pytest.mark.parametrize("optimizer", ["adam", "sgd"])
    def test_training_goes_on_as_if_nothing_had_happened(self, folder, optimizer):
        """Weights, buffers, optimiser and random state come back: the same bits ten steps later."""
        checkpoints = Checkpoints(folder)
        model, optimiser = training(optimizer)
        step(model, optimiser, 5)
        checkpoints.save(RUN, 5, model, optimiser, METRICS)
        step(model, optimiser, 10)

        torch.manual_seed(99)
        again, its_optimiser = training(optimizer)
        Checkpoints(folder).restore(RUN, 5, again, its_optimiser)
        step(again, its_optimiser, 10)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name

    def test_before_the_first_step(self, folder):
        """An optimiser that has no state yet is saved and restored as such."""
        model, optimiser = training()
        Checkpoints(folder).save(RUN, 0, model, optimiser, METRICS)
        again, its_optimiser = training()
        Checkpoints(folder).restore(RUN, 0, again, its_optimiser)

        assert torch.equal(again[0].weight, model[0].weight)
        assert its_optimiser.state_dict()["state"] == {}

    def test_weights(self, folder):
        """Weights come back with their hash and what was measured when they were written."""
        model, optimiser = training()
        Checkpoints(folder).save(RUN, 5, model, optimiser, METRICS)
        weights = Checkpoints(folder).load_weights(RUN, 5)

        assert weights.metrics == METRICS
        assert weights.sha256 == weights_hash(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(weights.tensors[name], tensor)
            assert weights.tensors[name].dtype == tensor.dtype

    def test_saving_changes_nothing(self, folder):
        """Neither the random state nor the network."""
        model, optimiser = training()
        state, before = torch.get_rng_state(), weights_hash(model.state_dict())
        Checkpoints(folder).save(RUN, 5, model, optimiser, METRICS)

        assert torch.equal(torch.get_rng_state(), state)
        assert weights_hash(model.state_dict()) == before

    def test_any_layout_in_memory(self, folder):
        """Tied, transposed and channels-last weights are saved as they are seen."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        model[1].bias = nn.Parameter(torch.randn(4, 4).t()[0])
        model = model.to(memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        model[0](torch.randn(2, 3, 5, 5)).sum().backward()
        optimiser.step()
        Checkpoints(folder).save(RUN, 1, model, optimiser, METRICS)

        weights = Checkpoints(folder).load_weights(RUN, 1).tensors
        assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


class TestWhatIsThere:
    def test_nothing_yet(self, folder):
        """A folder that does not exist holds no checkpoints."""
        checkpoints = Checkpoints(folder)

        assert not checkpoints.exists(RUN, 0)
        assert checkpoints.iterations(RUN) == []

    def test_iterations_in_order(self, folder):
        """Each run has its own, in the order of steps."""
        checkpoints = Checkpoints(folder)
        for iteration in (20, 5, 100, 0):
            checkpoints.save(RUN, iteration, *training(), METRICS)
        checkpoints.save(TrainingRun(1e-2, 0), 7, *training(), METRICS)
        checkpoints.save(TrainingRun(1e-3, 1), 8, *training(), METRICS)

        assert checkpoints.iterations(RUN) == [0, 5, 20, 100]
        assert checkpoints.iterations(TrainingRun(1e-2, 0)) == [7]
        assert checkpoints.exists(RUN, 5)
        assert not checkpoints.exists(RUN, 7)

    def test_learning_rates_that_look_alike(self, folder):
        """Rates that differ in their last digit are different runs."""
        checkpoints = Checkpoints(folder)
        checkpoints.save(TrainingRun(0.1, 0), 3, *training(), METRICS)

        assert not checkpoints.exists(TrainingRun(0.1 + 1e-16, 0), 3)

    def test_seen_by_others_at_once(self, folder):
        """What one process writes another finds, whatever it looked at before."""
        writer, reader = Checkpoints(folder), Checkpoints(folder)
        assert reader.iterations(RUN) == []
        writer.save(RUN, 3, *training(), METRICS)

        assert reader.exists(RUN, 3)
        assert reader.iterations(RUN) == [3]

    def test_deleted(self, folder):
        """A checkpoint that was only kept to go on from leaves nothing behind."""
        checkpoints = Checkpoints(folder)
        checkpoints.save(RUN, 3, *training(), METRICS)
        checkpoints.delete(RUN, 3)

        assert checkpoints.iterations(RUN) == []
        with pytest.raises(StoreError, match="iteration=00000003"):
            checkpoints.load_weights(RUN, 3)


class TestWholeOrNotThere:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("part", [1, 2])
    def test_a_full_disk(self, tmp_path, monkeypatch, call, part):
        """A write that fails leaves no checkpoint, no litter, and the earlier ones as they were."""
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(RUN, 1, *training(), METRICS)
        before = files(tmp_path)
        calls = []

        def full(*arguments):
            calls.append(arguments)
            if len(calls) == part:
                raise OSError(28, "No space left on device")

        owner = os if call == "fsync" else Path
        right = getattr(owner, call)
        monkeypatch.setattr(owner, call, lambda *a: full(*a) or right(*a))
        with pytest.raises(StoreError, match=r"iteration=00000002.*No space left"):
            checkpoints.save(RUN, 2, *training(), METRICS)

        assert not checkpoints.exists(RUN, 2)
        assert checkpoints.iterations(RUN) == [1]
        assert [name for name in files(tmp_path) if "00000002.training" not in name] == before

    def test_weights_come_last(self, tmp_path, monkeypatch):
        """At no moment is there a checkpoint that one could not go on from."""
        checkpoints = Checkpoints(tmp_path)
        right, seen = Path.replace, []

        def replace(source, target):
            seen.append(checkpoints.iterations(RUN))
            return right(source, target)

        monkeypatch.setattr(Path, "replace", replace)
        checkpoints.save(RUN, 2, *training(), METRICS)

        assert seen == [[], []]
        checkpoints.restore(RUN, 2, *training())

    def test_files_of_a_writer_that_died(self, tmp_path):
        """What it had begun is not taken for a checkpoint."""
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(RUN, 1, *training(), METRICS)
        (whole,) = tmp_path.rglob("*.model.safetensors")
        begun = whole.with_name(f".{whole.name.replace('00000001', '00000002')}.0f3a.partial")
        begun.write_bytes(whole.read_bytes()[:100])

        assert checkpoints.iterations(RUN) == [1]

    def test_an_unwritable_folder(self, tmp_path):
        """The message holds the path."""
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(StoreError, match=r"cannot write the checkpoint .*file/learning_rate"):
            Checkpoints(tmp_path / "file").save(RUN, 1, *training(), METRICS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with one checkpoint, and its two files."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model, optimiser = training()
    step(model, optimiser, 2)
    Checkpoints(folder).save(RUN, 2, model, optimiser, METRICS)
    (weights,) = folder.rglob("*.model.safetensors")
    (state,) = folder.rglob("*.training.safetensors")
    return folder, weights, state


class TestDamage:
    """Every damaged file is named; no wrong weight is ever loaded."""

    @given(st.data())
    def test_a_flipped_bit_in_the_weights(self, saved, data):
        """Found wherever it is; or it changed nothing that matters."""
        folder, path, _ = saved
        whole = path.read_bytes()
        right = Checkpoints(folder).load_weights(RUN, 2)
        message, found = path.name, right
        try:
            path.write_bytes(self.flipped(whole, data))
            found = Checkpoints(folder).load_weights(RUN, 2)
        except StoreError as error:
            message = str(error)
        finally:
            path.write_bytes(whole)

        assert path.name in message
        assert weights_hash(found.tensors) == found.sha256 == right.sha256

    @given(st.data())
    def test_a_flipped_bit_in_the_training_state(self, saved, data):
        """Training never goes on from a damaged state."""
        folder, _, path = saved
        whole = path.read_bytes()
        try:
            path.write_bytes(self.flipped(whole, data))
            with pytest.raises(StoreError, match=path.name):
                Checkpoints(folder).restore(RUN, 2, *training())
        finally:
            path.write_bytes(whole)

    @given(st.data())
    def test_a_file_cut_short(self, saved, data):
        """Of either file."""
        folder, *paths = saved
        path = data.draw(st.sampled_from(paths))
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            with pytest.raises(StoreError, match=path.name):
                Checkpoints(folder).restore(RUN, 2, *training())
        finally:
            path.write_bytes(whole)

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {"format": "pt"},
            {"sha256": "wrong", "metrics": "{}"},
            {"sha256": "right"},
            {"sha256": "right", "metrics": "{"},
        ],
    )
    def test_a_file_of_another_program(self, saved, metadata):
        """A safetensors file without our header is named as such."""
        folder, path, _ = saved
        whole = path.read_bytes()
        try:
            tensors = {"w": torch.ones(3)}
            if metadata and metadata.get("sha256") == "right":
                metadata = {**metadata, "sha256": weights_hash(tensors)}
            path.write_bytes(safetensors.torch.save(tensors, metadata))
            with pytest.raises(StoreError, match=path.name):
                Checkpoints(folder).load_weights(RUN, 2)
        finally:
            path.write_bytes(whole)

    def test_the_training_state_is_gone(self, saved):
        """The message names the file that is missing."""
        folder, _, path = saved
        whole = path.read_bytes()
        try:
            path.unlink()
            with pytest.raises(StoreError, match=path.name):
                Checkpoints(folder).restore(RUN, 2, *training())
        finally:
            path.write_bytes(whole)

    def flipped(self, whole: bytes, data) -> bytes:
        header = 8 + int.from_bytes(whole[:8], "little")
        places = st.one_of(st.integers(0, header - 1), st.integers(header, len(whole) - 1))
        place, bit = data.draw(places), data.draw(st.integers(0, 7))
        return whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]


class TestNoCode:
    def test_nothing_is_unpickled(self, tmp_path, monkeypatch):
        """Reading and writing go through safetensors alone."""

        def refuse(*_arguments, **_options):
            raise AssertionError("a pickle was read or written")

        for owner, name in (
            (pickle, "load"),
            (pickle, "loads"),
            (pickle, "dump"),
            (pickle, "dumps"),
            (pickle, "Unpickler"),
            (torch, "load"),
            (torch, "save"),
        ):
            monkeypatch.setattr(owner, name, refuse)
        checkpoints = Checkpoints(tmp_path)
        model, optimiser = training()
        step(model, optimiser, 1)
        checkpoints.save(RUN, 1, model, optimiser, METRICS)
        checkpoints.restore(RUN, 1, *training())

        assert checkpoints.load_weights(RUN, 1).metrics == METRICS

    def test_a_pickle_in_place_of_a_checkpoint(self, tmp_path):
        """It is refused, and what it would do is not done."""
        witness = tmp_path / "executed"

        class Bomb:
            def __reduce__(self):
                return Path.touch, (witness,)

        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(RUN, 1, *training(), METRICS)
        (path,) = tmp_path.rglob("*.model.safetensors")
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(StoreError, match=path.name):
            checkpoints.load_weights(RUN, 1)

        assert not witness.exists()

    def test_open_to_other_programs(self, saved):
        """Any reader of safetensors finds weights by name, and metrics in the header."""
        _, path, _ = saved
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])

        assert "0.weight" in safetensors.torch.load_file(path)
        assert json.loads(header["__metadata__"]["metrics"]) == METRICS


class TestWeightsHash:
    def test_every_name_shape_type_and_bit(self):
        """Any difference between two sets of weights is a difference of their hashes."""
        base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
        others = [
            {"a": torch.zeros(3, 2), "b": torch.ones(1)},
            {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
            {"a": torch.zeros(2, 3), "c": torch.ones(1)},
            {"a": torch.zeros(2, 3)},
            {"a": torch.zeros(2, 3), "b": torch.ones(1) + 2**-23},
            {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
        ]

        assert len({weights_hash(w) for w in [base, *others]}) == 7
        assert weights_hash(dict(reversed(base.items()))) == weights_hash(base)
