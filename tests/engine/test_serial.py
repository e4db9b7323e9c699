"""The serial engine is the reference for every other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import xarray as xr
from studies import arrays, assert_same_bits, run_options, tiny_study

from distributed_stiffness import training
from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import select
from distributed_stiffness.engine import StudyFailed, run_study, serial
from distributed_stiffness.errors import ModelError, StoreError, StudyError
from distributed_stiffness.study import Data, Gradients, Model, Training, training_identity
from distributed_stiffness.training import TrainingEvent, build_model, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was computed without disturbance."""
    store = tmp_path_factory.mktemp("serial") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """Let torch fill what it allocates with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def chunk_files(store: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in store.glob("*/c/**/*") if p.is_file()}


class TestNumbers:
    def test_every_pair_is_that_of_float64_autograd(self, finished: Path) -> None:
        """
        Cosines of each checkpoint equal one-example float64 autograd on its saved weights.
        """
        study = tiny_study().resolved(1297)
        data = select(study.data)
        inputs = torch.from_numpy(data.inputs(slice(None)))
        targets = torch.from_numpy(data.examples.labels)
        dataset = xr.open_zarr(str(finished))
        checkpoints = Checkpoints(str(finished).replace(".zarr", ".checkpoints"))
        for rate in study.training.learning_rates:
            for iteration in study.iterations:
                model = build_model(study, data, 0)
                weights = checkpoints.load_weights(TrainingRun(rate, 0), iteration)
                model.load_state_dict(dict(weights.tensors))

                expected = reference.cosine_matrix(
                    model.eval(), reference.cross_entropy, inputs, targets
                ).numpy()
                stored = dataset.cosine.sel(learning_rate=rate, iteration=iteration, seed=0).values

                assert np.abs(stored - expected).max() < 2e-6
                certain = np.abs(expected) > 1e-6
                assert (np.sign(stored) == np.sign(expected))[certain].all()

    def test_the_bound_is_there_and_covers_float32_noise_only(self, finished: Path) -> None:
        """
        Each checkpoint has an error bound of float32 size, and a count of undecided pairs.
        """
        values = arrays(finished)

        assert (values["error_bound"] < 1e-5).all()
        assert (values["undecided"] >= 0).all()

    def test_matrices_are_symmetric_with_a_unit_diagonal(self, finished: Path) -> None:
        """
        cos(g_i, g_j) = cos(g_j, g_i) to the last bit, and an example is stiff with itself.
        """
        cosine = arrays(finished)["cosine"]

        np.testing.assert_array_equal(cosine, np.swapaxes(cosine, -1, -2))
        np.testing.assert_allclose(np.diagonal(cosine, axis1=-2, axis2=-1), 1, atol=1e-6)

    def test_distance_is_the_cosine_distance_of_the_inputs(self, finished: Path) -> None:
        """
        distance = 1 − x_i·x_j of the inputs on the unit sphere.
        """
        data = select(tiny_study().data)
        x = data.inputs(slice(None)).reshape(60, -1).astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)

        np.testing.assert_allclose(arrays(finished)["distance"], 1 - x @ x.T, atol=1e-6)

    def test_tile_size_moves_values_within_the_bound_only(
        self, finished: Path, tmp_path: Path
    ) -> None:
        """
        Another tile size gives the same matrix within the error bound.
        """
        other = tmp_path / "other.zarr"
        run_study(tiny_study(gradients=Gradients(tile=60)), run_options(other))
        bound = arrays(finished)["error_bound"].max()

        difference = arrays(finished)["cosine"] - arrays(other)["cosine"]

        assert np.abs(difference).max() <= bound

    def test_a_small_budget_gives_the_same_numbers(self, finished: Path, tmp_path: Path) -> None:
        """
        Strips of a few rows, streamed many times, give the same matrix within the bound.
        """
        other = tmp_path / "strips.zarr"
        run_study(tiny_study(), run_options(other, memory=150_000))
        bound = arrays(finished)["error_bound"].max()

        difference = arrays(finished)["cosine"] - arrays(other)["cosine"]

        assert np.abs(difference).max() <= bound

    @pytest.mark.usefixtures("new_memory_is_nan")
    def test_what_memory_held_before_makes_no_difference(
        self, finished: Path, tmp_path: Path
    ) -> None:
        """
        Where memory holds fewer rows than a tile has, part of a tile on the diagonal is left to
        symmetry, and never read.
        """
        other = tmp_path / "other.zarr"
        run_study(tiny_study(gradients=Gradients(tile=60)), run_options(other, memory=60_000))

        np.testing.assert_allclose(
            arrays(other)["cosine"], arrays(finished)["cosine"], rtol=0, atol=1e-6
        )


class TestResume:
    def test_a_finished_study_writes_nothing(self, finished: Path) -> None:
        """
        Running again on a finished store touches no chunk.
        """
        before = chunk_files(finished)

        run_study(tiny_study(), run_options(finished))

        assert chunk_files(finished) == before

    def test_only_what_is_missing_is_computed(self, finished: Path, tmp_path: Path) -> None:
        """
        A tile, a norm chunk and a distance tile are removed: they come back bit for bit, and no
        other pair of tiles is written.
        """
        store = tmp_path / "tiny.zarr"
        shutil.copytree(finished, store)
        shutil.copytree(
            str(finished).replace(".zarr", ".checkpoints"), tmp_path / "tiny.checkpoints"
        )
        before = chunk_files(store)
        gone = ["cosine/c/1/0/1/0/2", "cosine/c/0/0/0/1/1", "correct/c/0/0/1/2", "distance/c/2/2"]
        for chunk in gone:
            (store / chunk).unlink()
        (store / "undecided/c/1/0/1").unlink()

        run_study(tiny_study(), run_options(store))

        assert_same_bits(finished, store)
        touched = {str(p.relative_to(store)) for p, t in chunk_files(store).items()
                   if before.get(p) != t}  # fmt: skip
        pairs = {name for name in touched if name.startswith(("cosine", "distance"))}
        assert pairs == {
            "cosine/c/1/0/1/0/2", "cosine/c/1/0/1/2/0", "cosine/c/0/0/0/1/1",
            "cosine/c/0/0/1/2/2", "distance/c/2/2",
        }  # fmt: skip

    def test_training_continues_from_its_last_checkpoint(
        self, finished: Path, tmp_path: Path
    ) -> None:
        """
        Without the last checkpoint, training starts from the one before it and takes the same
        steps.
        """
        store, checkpoints = tmp_path / "tiny.zarr", tmp_path / "tiny.checkpoints"
        shutil.copytree(str(finished).replace(".zarr", ".checkpoints"), checkpoints)
        for part in checkpoints.rglob("iteration=00000030.*"):
            part.unlink()

        run_study(tiny_study(), run_options(store))

        assert_same_bits(finished, store)

    def test_a_rolling_checkpoint_is_not_one_that_was_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Training that stopped between checkpoints leaves one to continue from; a study that asks
        for just that step measures it, and gets the numbers of an undisturbed run.
        """
        long = tiny_study(training=Training(learning_rates=(1e-2,), iterations=(0, 60)))
        short = tiny_study(training=Training(learning_rates=(1e-2,), iterations=(0, 41, 60)))
        data = select(long.data)
        identity = training_identity(long, content=data.labelled.content_hash())
        folder, run = (
            Checkpoints(tmp_path / "x.checkpoints", identity=identity),
            TrainingRun(1e-2, 0),
        )
        monkeypatch.setattr(training, "EVENT_SECONDS", 0)  # so that it can be stopped anywhere
        steps = train(long, run, data, folder)
        while 41 not in folder.iterations(run, rolling=True):  # an epoch of the digits
            next(steps)

        run_study(short, run_options(tmp_path / "x.zarr"))
        run_study(short, run_options(tmp_path / "fresh.zarr"))

        assert_same_bits(tmp_path / "x.zarr", tmp_path / "fresh.zarr")
        assert np.isfinite(arrays(tmp_path / "x.zarr")["train_loss"]).all()
        assert not folder.iterations(run, rolling=True)

    def test_a_checkpoint_whose_news_was_lost_is_computed(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A training process that dies between writing a checkpoint and saying so loses nothing.
        """

        def silent(*arguments: object, **options: object) -> Iterator[TrainingEvent]:
            return (e for e in train(*arguments, **options) if e.checkpoint is None)

        monkeypatch.setattr(serial, "train", silent)
        run_study(tiny_study(), run_options(tmp_path / "tiny.zarr"))

        assert_same_bits(finished, tmp_path / "tiny.zarr")

    def test_a_damaged_tile_is_named(self, tmp_path: Path) -> None:
        """
        A flipped byte in a tile ends the run with the file's name; without the file it completes.
        """
        store = tmp_path / "tiny.zarr"
        run_study(tiny_study(), run_options(store))
        chunk = store / "cosine/c/0/0/1/0/1"
        good = chunk.read_bytes()
        chunk.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        (store / "undecided/c/0/0/1").unlink()

        with pytest.raises(StoreError, match="cosine/c/0/0/1/0/1"):
            run_study(tiny_study(), run_options(store))

        chunk.unlink()
        run_study(tiny_study(), run_options(store))
        assert chunk.read_bytes() == good


class TestRefusals:
    def test_checkpoints_of_another_study_are_refused(self, finished: Path, tmp_path: Path) -> None:
        """
        The store is gone, the checkpoints are there, the labels are others: nothing is mixed.
        """
        shutil.copytree(
            str(finished).replace(".zarr", ".checkpoints"), tmp_path / "tiny.checkpoints"
        )
        permuted = tiny_study().data.model_copy(update={"permuted_labels": 1.0})

        with pytest.raises(StoreError, match="of another study"):
            run_study(tiny_study(data=permuted), run_options(tmp_path / "tiny.zarr"))

    def test_another_study_is_refused_by_the_field_that_differs(self, finished: Path) -> None:
        """
        A store of another study is refused; the message says what was and what is.
        """
        other = tiny_study(training=Training(learning_rates=(1e-3, 2e-2), iterations=(0, 30)))

        with pytest.raises(StoreError, match=r"learning_rates was \[0.001, 0.01\], is"):
            run_study(other, run_options(finished))

    def test_other_weights_are_refused(self, finished: Path, tmp_path: Path) -> None:
        """
        A checkpoint whose weights changed after the store was begun is refused by its hash.
        """
        store, checkpoints = tmp_path / "tiny.zarr", tmp_path / "tiny.checkpoints"
        shutil.copytree(finished, store)
        shutil.copytree(str(finished).replace(".zarr", ".checkpoints"), checkpoints)
        (store / "cosine/c/1/0/1/0/2").unlink()
        wrong = checkpoints / "learning_rate=0.001/seed=0/iteration=00000030.model.safetensors"
        right = checkpoints / "learning_rate=0.01/seed=0/iteration=00000030.model.safetensors"
        shutil.copy(wrong, right)

        with pytest.raises(StoreError, match=r"belongs to other weights.*iteration 30"):
            run_study(tiny_study(), run_options(store))

    def test_too_many_examples(self, tmp_path: Path) -> None:
        """
        More examples than the split has are refused, with how many there are.
        """
        with pytest.raises(ValueError, match="500"):
            run_study(
                tiny_study(data=Data(name="digits", validation_examples=501)),
                run_options(tmp_path / "x.zarr"),
            )

        assert not (tmp_path / "x.zarr").exists()

    def test_a_model_with_the_wrong_number_of_outputs(self, tmp_path: Path) -> None:
        """
        A factory whose network has too few outputs is refused with both numbers.
        """
        with pytest.raises(ModelError, match=r"\(8, 3\).*10 classes"):
            run_study(
                tiny_study(model=Model(name="networks:three_outputs")),
                run_options(tmp_path / "x.zarr"),
            )

    def test_divergence_names_step_and_rate_and_keeps_the_rest(self, tmp_path: Path) -> None:
        """
        A rate that diverges stops its own run: the message names step and rate, the other
        checkpoints are computed.
        """
        study = tiny_study(
            training=Training(learning_rates=(1e-3, 1e30), iterations=(0, 30), optimizer="sgd")
        )
        store = tmp_path / "x.zarr"

        with pytest.raises(StudyFailed, match=r"at step \d+ with learning rate 1e\+30"):
            run_study(study, run_options(store))

        cosine = arrays(store)["cosine"]
        assert np.isfinite(cosine[0]).all()
        assert np.isfinite(cosine[1, 0, 0]).all()
        assert np.isnan(cosine[1, 0, 1]).all()

    def test_a_checkpoint_with_nan_is_left_out_by_name(self, tmp_path: Path) -> None:
        """
        Weights that are not numbers stop their checkpoint: the message names rate and step, the
        rest is computed.
        """
        study = tiny_study()
        data = select(study.data)
        identity = training_identity(study, content=data.labelled.content_hash())
        model = build_model(study, data, 0)
        optimizer = torch.optim.Adam(model.parameters())
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        folder = Checkpoints(tmp_path / "x.checkpoints", identity=identity)
        folder.save(TrainingRun(1e-2, 0), 30, model, optimizer, {"train_loss": 0.0})

        with pytest.raises(StudyFailed, match=r"0\.01, seed 0, iteration 30: .*not finite"):
            run_study(study, run_options(tmp_path / "x.zarr"))

        cosine = arrays(tmp_path / "x.zarr")["cosine"]
        assert np.isnan(cosine[1, 0, 1]).all()
        assert np.isfinite(cosine[0]).all()

    def test_a_store_that_cannot_be_written(self, tmp_path: Path) -> None:
        """
        A path below a file is refused before anything is computed.
        """
        (tmp_path / "file").write_text("")

        with pytest.raises(StoreError, match="file"):
            run_study(tiny_study(), run_options(tmp_path / "file" / "x.zarr"))

    def test_a_folder_that_is_not_a_store(self, tmp_path: Path) -> None:
        """
        A folder with other files in it is left alone.
        """
        (tmp_path / "thesis.tex").write_text("")

        with pytest.raises(StoreError, match="not a store"):
            run_study(tiny_study(), run_options(tmp_path))

    def test_too_little_memory(self, tmp_path: Path) -> None:
        """
        A budget that does not hold a block is refused with the least that would do.
        """
        with pytest.raises(StudyError, match=r"too small.*--memory"):
            run_study(tiny_study(), run_options(tmp_path / "x.zarr", memory=1000))
