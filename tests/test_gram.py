"""Stiffness of networks that were trained elsewhere: their checkpoints, their data, their code."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import time
from pathlib import Path

import mine
import numpy as np
import pytest
import safetensors.torch
import torch
import xarray as xr
from studies import arrays, assert_same_bits, run_options

from distributed_stiffness import cosine_matrix, measure_checkpoints
from distributed_stiffness.analysis import class_matrix, within_between
from distributed_stiffness.cli import main
from distributed_stiffness.data import foreign, load
from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import (
    CheckpointError,
    DataError,
    ModelError,
    StiffnessError,
    StoreError,
    StudyError,
)
from distributed_stiffness.importing import gather
from distributed_stiffness.importing.content import read, stamp
from distributed_stiffness.importing.files import find
from distributed_stiffness.importing.places import Place, describe, grid, placed
from distributed_stiffness.importing.table import from_table
from distributed_stiffness.importing.weights import fitted
from distributed_stiffness.models import build
from distributed_stiffness.report import present
from distributed_stiffness.verify import verify_store

NETS, DATA = "mine:build", "mine:validation"


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(path: str, tensors: dict[str, torch.Tensor]) -> str:
    """Write a checkpoint as its suffix says."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def save_runs(rates=("0.01", "0.1"), steps=(0, 10)) -> None:
    """Write a grid of checkpoints, each with weights of its own."""
    for i, rate in enumerate(rates):
        for j, step in enumerate(steps):
            save(f"runs/lr{rate}/step-{step}.safetensors", mine.weights(10 * i + j))


def measured(*args, store="out.zarr", **choices) -> xr.Dataset:
    """Measure in this process and open what came out."""
    return xr.open_zarr(measure_checkpoints(*args, run=run_options(store), **choices))


def true_cosines(model: torch.nn.Module, examples=None, loss="cross_entropy") -> xr.DataArray:
    """What the notebook call says of a network."""
    return cosine_matrix(model.eval(), loss, examples or mine.validation(), precision="float64")


def network(weights: dict[str, torch.Tensor], build=mine.build) -> torch.nn.Module:
    model = build()
    model.load_state_dict(weights)
    return model


def assert_is(found: xr.DataArray, expected: xr.DataArray, bound: float) -> None:
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=max(bound, 1e-6))


class TestMeasuring:
    def test_numbers_are_those_of_the_notebook_call(self):
        """
        Every checkpoint's matrix is that of the same weights in memory, within the error bound.
        """
        save_runs()

        ds = measured(NETS, DATA, "runs/*/step-*.safetensors")

        assert ds.learning_rate.values.tolist() == [0.01, 0.1]
        assert ds.iteration.values.tolist() == [0, 10]
        for i, rate in enumerate((0.01, 0.1)):
            for j, step in enumerate((0, 10)):
                at = ds.sel(learning_rate=rate, seed=0, iteration=step)
                expected = true_cosines(network(mine.weights(10 * i + j)))
                assert_is(at.cosine, expected, float(at.error_bound))

    def test_inputs_are_taken_as_they_are(self):
        """
        Nothing is standardised or scaled, and the store says so.
        """
        save_runs()
        ds = measured(NETS, DATA, "runs/*/*")
        x = mine.validation()[0].double()
        unit = x / x.norm(dim=1, keepdim=True)

        np.testing.assert_allclose(ds.distance, 1 - unit @ unit.T, atol=1e-6)
        assert ds.attrs["preprocessing"] == "none: as they were given"

    def test_loss_and_accuracy_are_those_of_the_examples(self):
        """
        Validation curves are means over the examples; training curves are not known.
        """
        save_runs()
        ds = measured(NETS, DATA, "runs/*/*")

        np.testing.assert_allclose(ds.validation_loss, ds.loss.mean("example"))
        np.testing.assert_allclose(ds.validation_accuracy, ds.correct.mean("example"))
        assert np.isnan(ds.train_loss).all()
        assert np.isnan(ds.train_accuracy).all()
        assert "epoch" not in ds.coords

    def test_training_examples_beside_them(self):
        """
        Where data have a training split, its examples may come first, and have curves of their own.
        """
        save_runs()
        ds = measured(NETS, "mine:both_splits", "runs/*/*", train_examples=9, examples=12)

        assert ds.split.values.tolist() == ["train"] * 9 + ["validation"] * 12
        train = ds.isel(example=ds.split.values == "train")
        np.testing.assert_allclose(ds.train_loss, train.loss.mean("example"))
        assert set(ds.class_name.values) == {"red", "green", "blue"}
        assert verify_store(run_options("out.zarr")).is_well

    def test_standardised_where_it_is_asked_for(self):
        """
        The package's own preprocessing needs a training split, and is another study.
        """
        save_runs()
        ds = measured(NETS, "mine:both_splits", "runs/*/*", standardise=True, unit_norm=True)

        assert "unit norm" in ds.attrs["preprocessing"]
        with pytest.raises(StoreError, match=r"preprocessing\.unit_norm was true, is false"):
            measured(NETS, "mine:both_splits", "runs/*/*")
        with pytest.raises(DataError, match="has no training split, which is needed to standard"):
            measured(NETS, DATA, "runs/*/*", store="b.zarr", standardise=True)

    def test_a_loss_of_ones_own(self):
        """
        Any function of outputs and targets, by name; verify knows it too.
        """
        save_runs()
        ds = measured(NETS, DATA, "runs/*/*", loss="mine:smoothed")
        at = ds.sel(learning_rate=0.1, seed=0, iteration=10)

        expected = true_cosines(network(mine.weights(11)), loss=mine.smoothed)
        assert_is(at.cosine, expected, float(at.error_bound))
        assert verify_store(run_options("out.zarr")).is_well
        with pytest.raises(StoreError, match='loss was "mine:smoothed", is "cross_entropy"'):
            measured(NETS, DATA, "runs/*/*")

    def test_functions_in_place_of_names(self):
        """
        A function that can be imported stands for its name; one that cannot is refused.
        """
        save_runs()
        imports = gather(mine.build, mine.validation, "runs/*/*", loss=mine.smoothed)

        assert imports.study.model.name == NETS
        assert imports.study.data.name == DATA
        assert imports.study.loss == "mine:smoothed"
        with pytest.raises(StudyError, match=r"model is .*lambda.*put it into a module"):
            gather(lambda: None, DATA, "runs/*/*")

    def test_some_parameters(self):
        """
        Only those that match the patterns are in play.
        """
        save_runs()
        ds = measured(NETS, DATA, "runs/*/*", parameters=["2.*"])
        model = network(mine.weights(0))
        expected = cosine_matrix(model, "cross_entropy", mine.validation(), parameters=["2.*"])

        assert_is(ds.cosine[0, 0, 0], expected, 1e-6)

    def test_sums_in_place_of_pairs(self):
        """
        `keep="sums"`: the same means and errors as of the pairs, resumed and refused like them.
        """
        save_runs()
        pairs = measured(NETS, DATA, "runs/*/*", tile=10)
        sums = measured(NETS, DATA, "runs/*/*", store="sums.zarr", keep="sums", tile=10)
        again = measured(NETS, DATA, "runs/*/*", store="sums.zarr", keep="sums", tile=10)

        assert "cosine" not in sums
        for reduction in (class_matrix, within_between):
            expected = reduction(pairs)
            for ds in (sums, again):
                for name, values in reduction(ds).data_vars.items():
                    np.testing.assert_allclose(values, expected[name], atol=1e-6, err_msg=name)
        assert sums.iteration.values.tolist() == [0, 10]
        with pytest.raises(StoreError, match="keep was"):
            measured(NETS, DATA, "runs/*/*", store="sums.zarr", tile=10)

    def test_options_of_model_and_data(self):
        """
        Keyword arguments of the factories.
        """
        save("a.pt", mine.build(width=4).state_dict())
        ds = measured(NETS, DATA, "a.pt", model_options={"width": 4}, data_options={"n": 9})

        assert ds.sizes["example"] == 9

    def test_the_report_does_without_training_curves(self):
        """
        Figures and report are drawn from such a store without a warning.
        """
        save_runs()
        store = measure_checkpoints(NETS, DATA, "runs/*/*", run=run_options("out.zarr"))
        from distributed_stiffness.progress import Progress

        lines = present(store, Path("figures"), Progress(quiet=True))

        assert any("Learning rate 0.1" in line for line in lines)
        assert "<img" in Path("figures/report.html").read_text()


class TestGoingOn:
    def test_after_an_interruption(self, monkeypatch):
        """
        Import and computing stop anywhere; the same call goes on, to the same bits.
        """
        save_runs()
        from distributed_stiffness.checkpoints import Checkpoints

        put, count = Checkpoints.put, 0

        def dies(self, *args, **options):
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            put(self, *args, **options)

        monkeypatch.setattr(Checkpoints, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            measured(NETS, DATA, "runs/*/*")
        monkeypatch.setattr(Checkpoints, "put", put)
        from distributed_stiffness.engine.replica import Replica

        check, checks = Replica._check, 0

        def dies_later(self, task):
            nonlocal checks
            checks += 1
            if checks == 2:
                raise KeyboardInterrupt
            check(self, task)

        monkeypatch.setitem(
            sys.modules["distributed_stiffness.engine.replica"]._KINDS, "check", dies_later
        )
        with pytest.raises(KeyboardInterrupt):
            measured(NETS, DATA, "runs/*/*")
        monkeypatch.setitem(
            sys.modules["distributed_stiffness.engine.replica"]._KINDS, "check", check
        )
        measured(NETS, DATA, "runs/*/*")
        measured(NETS, DATA, "runs/*/*", store="at_once.zarr")

        assert_same_bits("out.zarr", "at_once.zarr")

    def test_what_is_there_is_not_read_again(self, monkeypatch):
        """
        A file that has not changed is not opened; one that was only touched is, and is the same.
        """
        save_runs()
        measured(NETS, DATA, "runs/*/*")
        from distributed_stiffness.importing import imports

        opened = []
        monkeypatch.setattr(imports, "read", lambda path, _key: opened.append(path) or read(path))
        measured(NETS, DATA, "runs/*/*")
        assert not opened
        os.utime("runs/lr0.1/step-10.safetensors", (time.time(), time.time() + 5))
        measured(NETS, DATA, "runs/*/*")

        assert opened == ["runs/lr0.1/step-10.safetensors"]

    def test_a_file_that_was_trained_anew(self):
        """
        Other weights under the same name are refused, not taken for the old ones.
        """
        save_runs()
        measured(NETS, DATA, "runs/*/*")
        save("runs/lr0.1/step-10.safetensors", mine.weights(99))

        with pytest.raises(CheckpointError, match=r"step-10\.safetensors.*other weights than when"):
            measured(NETS, DATA, "runs/*/*")

    def test_verify_finds_nothing_and_repairs_what_is_broken(self):
        """
        The store is one like any other: verify computes a sample again, and mends.
        """
        save_runs()
        before = arrays(measure_checkpoints(NETS, DATA, "runs/*/*", run=run_options("out.zarr")))
        well = verify_store(run_options("out.zarr"))
        assert well.is_well, well.lines()
        assert well.checked["examples computed again"]
        chunk = next(Path("out.zarr/cosine/c").rglob("0/0/0/0/0"))
        chunk.write_bytes(b"broken")
        Path("out.zarr/validation_loss/c/0/0/1").unlink()

        found = verify_store(run_options("out.zarr"), repair=True)

        assert len(found.faults) == 2
        assert found.is_well
        for name, values in arrays("out.zarr").items():
            np.testing.assert_array_equal(values, before[name], err_msg=name)

    def test_nothing_is_trained(self):
        """
        Where an imported checkpoint is gone, the study alone cannot make it: it says who can.
        """
        save_runs()
        imports = gather(NETS, DATA, "runs/*/*")
        run = run_options("out.zarr")

        with pytest.raises(StoreError, match=r"of learning rate 0\.01.*`stiffness gram`"):
            run_study(imports.study, run)

    def test_a_store_of_other_data(self):
        """
        Refused, before any checkpoint is read.
        """
        save_runs()
        measured(NETS, DATA, "runs/*/*")

        with pytest.raises(StoreError, match="another study: data was"):
            measured(NETS, DATA, "runs/*/*", data_options={"n": 12})


class TestFormats:
    @pytest.fixture
    def weights(self):
        return mine.weights(5)

    @pytest.mark.parametrize(
        ("name", "wrap", "said"),
        [
            ("w.safetensors", lambda w: w, ""),
            ("w.pt", lambda w: w, ""),
            ("w.pth", lambda w: {"model": w, "epoch": 3, "loss": 0.5}, "found under 'model'"),
            ("w.bin", lambda w: {"model_state_dict": w, "optimizer": {}}, "'model_state_dict'"),
            ("w.pth.tar", lambda w: {"arch": "net", "state_dict": w}, "'state_dict'"),  # timm's
            (
                "w.ckpt",
                lambda w: {
                    "state_dict": {f"net.{k}": v for k, v in w.items()}
                    | {"loss.weight": torch.ones(3)},
                    "pytorch-lightning_version": "2.5",
                    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
                },
                "found under 'state_dict'; prefix 'net.' taken off; 1 tensors of other names",
            ),
            ("w.pt", lambda w: {f"module.{k}": v for k, v in w.items()}, "prefix 'module.'"),
            (
                "w.pt",
                lambda w: {"state_dict": {f"model._orig_mod.{k}": v for k, v in w.items()}},
                "'model._orig_mod.'",
            ),
            ("w.safetensors", lambda w: {k: v.double() for k, v in w.items()}, "float64 read as"),
        ],
    )
    def test_state_dicts_as_people_save_them(self, weights, name, wrap, said):
        """
        Nested, prefixed, in another precision: the same weights come out, and it is said how.
        """
        path = save(name, wrap(weights))

        found, how = fitted(read(path), mine.build(), path)

        assert said in how
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(found[key], value)

    @pytest.mark.parametrize("shards", [1, 2])
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_folders_of_hugging_face(self, weights, shards, suffix):
        """
        model.safetensors or pytorch_model.bin, or several with an index.
        """
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        names = list(weights)
        if shards == 1:
            save(f"checkpoint-30/{stem}.{suffix}", weights)
        else:
            parts = {f"{stem}-1-of-2.{suffix}": names[:2], f"{stem}-2-of-2.{suffix}": names[2:]}
            for part, keys in parts.items():
                save(f"checkpoint-30/{part}", {k: weights[k] for k in keys})
            where = {k: part for part, keys in parts.items() for k in keys}
            index = json.dumps({"weight_map": where})
            Path(f"checkpoint-30/{stem}.{suffix}.index.json").write_text(index)

        assert read("checkpoint-30").weights.keys() == weights.keys()
        assert placed(["checkpoint-30"]) == {Place(iteration=30): "checkpoint-30"}

    def test_tied_weights_that_were_saved_once(self):
        """
        What a network has by two names may be in a file by one.
        """

        def build():
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            model[1].weight = model[0].weight
            return model

        whole = build().state_dict()
        path = save("w.pt", {k: v for k, v in whole.items() if k != "1.weight"})

        found, how = fitted(read(path), build(), path)

        assert torch.equal(found["1.weight"], whole["0.weight"])
        assert "tied: 1.weight" in how

    def test_a_file_that_needs_unpickling_is_not_read(self, weights):
        """
        It is refused with how to convert it, and its code is not run.
        """

        class Bomb:
            def __reduce__(self):
                return Path.touch, (Path("executed"),)

        torch.save({"state_dict": weights, "callback": Bomb()}, "bomb.ckpt")
        torch.save({"state_dict": weights, "hparams": argparse.Namespace(lr=1)}, "light.ckpt")
        torch.save(mine.build(), "whole.pt")

        for path in ("bomb.ckpt", "light.ckpt", "whole.pt"):
            with pytest.raises(CheckpointError, match=rf"{path}.*could run code.*state_dict\(\)"):
                read(path)
        assert not Path("executed").exists()

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("w.safetensors", b"not one", r"cannot read the checkpoint .*w\.safetensors"),
            ("w.pt", b"", r"cannot read the checkpoint .*w\.pt"),
            ("w.pkl", b"", "it is empty"),
            ("w.pt", 3, "holds a int: expected a state dict"),
            ("w.pt", {"epoch": 3, "loss": 0.1}, "holds no state dict, only epoch, loss"),
        ],
    )
    def test_files_that_are_no_checkpoints(self, name, content, said):
        """
        The message names the file and what was expected.
        """
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            torch.save(content, name)

        with pytest.raises(CheckpointError, match=said):
            read(name)

    def test_a_folder_without_a_model(self):
        """
        It is named, with what was looked for.
        """
        Path("checkpoint-3").mkdir()

        with pytest.raises(CheckpointError, match=r"checkpoint-3 holds none of model\.safetensors"):
            stamp("checkpoint-3")

    def test_names_that_do_not_fit(self, weights):
        """
        The first few that lack or are too many are listed, with shapes.
        """
        del weights["2.bias"]
        weights["3.bias"] = torch.zeros(7)
        path = save("w.pt", weights)

        with pytest.raises(
            CheckpointError, match=r"lacks 1 of 4.*2\.bias \(3,\); it has 1.*3\.bias \(7,\)"
        ):
            fitted(read(path), mine.build(), path)

    def test_shapes_that_do_not_fit(self, weights):
        """
        A network of another width.
        """
        path = save("w.pt", weights)

        with pytest.raises(CheckpointError, match=r"0\.weight is \(8, 6\), in the network \(4, 6"):
            fitted(read(path), mine.build(width=4), path)

    def test_two_networks_in_one_file(self, weights):
        """
        A teacher beside its student: it is asked which, and --prefix says it.
        """
        teacher = mine.weights(6)
        both = {f"student.{k}": v for k, v in weights.items()}
        both |= {f"teacher.{k}": v for k, v in teacher.items()}
        path, expected = save("w.pt", both), mine.build()

        with pytest.raises(CheckpointError, match=r"'student.' and 'teacher.'.*--prefix"):
            fitted(read(path), expected, path)
        found, _ = fitted(read(path), expected, path, prefix="teacher.")
        assert torch.equal(found["0.weight"], teacher["0.weight"])


class TestPlaces:
    @pytest.mark.parametrize(
        ("path", "place"),
        [
            ("runs/lr0.1/step-100.safetensors", Place(0.1, 0, 100)),
            ("runs/lr=1e-3/seed=2/iteration=00000468.pt", Place(1e-3, 2, 468)),
            ("learning_rate_0.05_seed_7_epoch_12.pth", Place(0.05, 7, 12)),
            ("logs/LR1e-03_Seed3/epoch=4-step=1200.ckpt", Place(1e-3, 3, 1200)),
            ("out/seed1/checkpoint-500", Place(0.0, 1, 500)),
            ("ckpt/global_step700.pt", Place(0.0, 0, 700)),
            ("resnet18_final.pt", Place(0.0, 0, 0)),
            ("a/lr.5/iter_3.pt", Place(0.5, 0, 3)),
        ],
    )
    def test_numbers_after_known_words(self, path, place):
        """
        Learning rate, seed and iteration are found in names as people write them.
        """
        assert placed([path]) == {place: path}

    @pytest.mark.parametrize(
        ("pattern", "path", "place"),
        [
            ("{learning_rate}/seed{seed}/step-{iteration}", "r/1e-3/seed0/step-9.pt", (1e-3, 0, 9)),
            ("{lr}/*/{step}", "r/0.5/anything/12", (0.5, 0, 12)),
            ("run{seed}_*_{epoch}", "run4_best_12.pth.tar", (0.0, 4, 12)),
            ("w-{iteration}.pt", "deep/w-3.pt", (0.0, 0, 3)),
        ],
    )
    def test_a_pattern(self, pattern, path, place):
        """
        Named fields and *, for the end of the path, with or without its suffix.
        """
        assert placed([path], pattern) == {Place(*place): path}

    @pytest.mark.parametrize(
        ("paths", "pattern", "said"),
        [
            (["a1.pt", "a2.pt"], None, "no iteration was found in a1.pt, a2.pt"),
            (["step-1.pt", "last.pt"], None, r"no iteration was found in last\.pt"),
            (["lr0.1/lr0.2/step-1.pt"], None, r"more than one learning rate \(0\.1, 0\.2\)"),
            (["a/step-1.pt", "b/step-1.pt"], None, "a/step-1.pt and b/step-1.pt are both of"),
            (["step-1.pt", "epoch-2.pt"], None, r"different words \(steps and epochs\?\)"),
            (["step-1.pt"], "{iteration}", "step-1.pt does not end like --pattern"),
            (["step-1.pt"], "step-{rate}", r"has \{rate\}: expected \{learning_rate\}"),
            (["step-1.pt"], "step-1", "no fields"),
            (["1-2.pt"], "{step}-{epoch}", "once each at most"),
        ],
    )
    def test_what_is_ambiguous_is_refused(self, paths, pattern, said):
        """
        Nothing is guessed: the message says what is unclear, and how to say it.
        """
        with pytest.raises(CheckpointError, match=said):
            placed(paths, pattern)

    def test_a_table(self):
        """
        A CSV file beside the checkpoints; columns that nobody knows are left alone.
        """
        for name in "ab":
            save(f"runs/{name}.pt", mine.weights())
        with Path("runs/table.csv").open("w", newline="") as file:
            rows = [["path", "learning_rate", "iteration", "note"], ["a.pt", "0.1", "5", "x"]]
            csv.writer(file).writerows([*rows, ["b.pt", "0.1", "10", ""]])

        expected = {Place(0.1, 0, 5): "runs/a.pt", Place(0.1, 0, 10): "runs/b.pt"}
        assert from_table("runs/table.csv") == expected
        rows = [{"path": "runs/a.pt", "lr": 0.1, "step": 5}]
        assert from_table(rows) == {Place(0.1, 0, 5): "runs/a.pt"}

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ([], "has no rows"),
            ([{"file": "a.pt"}], "row 1 of the table has no path"),
            ([{"path": "none.pt"}], "there is no file none.pt"),
            ([{"path": "a.pt", "seed": "x"}], "has 'x' for the seed: expected a whole number"),
            ([{"path": "a.pt", "step": 1.5}], "'1.5' for the iteration"),
            ([{"path": "a.pt", "lr": -1}], "'-1' for the learning rate"),
            ([{"path": "a.pt"}, {"path": "a.pt"}], "both of"),
        ],
    )
    def test_a_table_with_a_mistake(self, rows, said):
        """
        The row is named.
        """
        save("a.pt", mine.weights())

        with pytest.raises(CheckpointError, match=said):
            from_table(rows)

    def test_holes_are_listed_with_what_to_do(self):
        """
        A rate that lacks a step: which, and the iterations that all have.
        """
        paths = [f"lr{rate}/step-{step}.pt" for rate in (1, 2) for step in (0, 5, 9)]
        files = placed([path for path in paths if path != "lr2/step-9.pt"])

        with pytest.raises(
            CheckpointError, match=r"Missing: learning rate 2, seed 0: iterations 9.*--iterations 0"
        ):
            grid(files)
        assert len(grid(files, [0, 5])) == 4
        with pytest.raises(CheckpointError, match="no checkpoint is of iteration 7: there are 0"):
            grid(files, [7])

    def test_files_that_are_not_there(self):
        """
        The pattern is named, and where it was looked for.
        """
        with pytest.raises(CheckpointError, match=r"no file matches 'runs/\*\.pt'"):
            find("runs/*.pt")

    def test_a_long_list_is_cut(self):
        """
        What was understood is one line a file, and of many the first and last.
        """
        lines = describe(placed([f"step-{k}.pt" for k in range(50)]))

        assert len(lines) == 22
        assert "(30 more)" in lines[11]
        assert "not given" in lines[1]

    def test_a_learning_rate_that_nobody_knows(self):
        """
        Is 0 in the store, which no training has and which `sel` finds; the store says what it is.
        """
        save("step-3.pt", mine.weights())
        ds = measured(NETS, DATA, "step-3.pt")

        assert ds.cosine.sel(learning_rate=0).sel(seed=0, iteration=3).shape == (mine.N, mine.N)
        assert "not given" in ds.learning_rate.attrs["long_name"]
        assert verify_store(run_options("out.zarr")).is_well

    def test_a_bucket(self, bucket):
        """
        Checkpoints and store may be URLs.
        """
        import fsspec

        save_runs()
        filesystem, root = fsspec.core.url_to_fs(bucket)
        filesystem.put("runs", f"{root}/runs", recursive=True)

        ds = measured(NETS, DATA, f"{bucket}/runs/*/step-*.safetensors", store=f"{bucket}/o.zarr")

        assert dict(ds.sizes)["learning_rate"] == 2
        assert np.isfinite(ds.cosine).all()


class TestModels:
    def test_torchvision(self):
        """
        A ResNet-18 of torchvision, on small images of a folder.
        """
        from PIL import Image

        random = np.random.default_rng(0)
        for name in ("cat", "dog"):
            Path("pets", name).mkdir(parents=True)
            for k in range(5):
                pixels = random.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"pets/{name}/{k}.png")
        make = lambda: build("torchvision:resnet18", input_shape=(3, 32, 32), n_classes=2)  # noqa: E731
        save("step-7.pt", make().state_dict())
        options = {"resize": 36, "crop": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2]}

        ds = measured(
            "torchvision:resnet18",
            "images:pets",
            "step-7.pt",
            data_options={**options, "per_class": 2},
            parameters=["layer1.*"],  # of eleven million: float64 gradients of all take long
        )

        assert ds.class_name.values.tolist() == ["cat"] * 2 + ["dog"] * 2
        data = load("images:pets", options={**options, "per_class": 2}).validation
        examples = torch.from_numpy(data.inputs), torch.from_numpy(data.labels)
        model = network(torch.load("step-7.pt"), make).eval()
        expected = cosine_matrix(model, "cross_entropy", examples, parameters=["layer1.*"])
        assert_is(ds.cosine[0, 0, 0], expected, float(ds.error_bound[0, 0, 0]))

    def test_more_outputs_than_classes(self):
        """
        A network that was trained on more classes than the examples have is taken as it is.
        """
        make = lambda: build(  # noqa: E731
            "torchvision:squeezenet1_1", input_shape=(3, 32, 32), n_classes=9
        )
        save("w.pt", make().state_dict())
        x = torch.rand(6, 3, 40, 40)
        np.savez("d.npz", x=x.numpy(), y=np.arange(6) % 2)
        options = {"num_classes": 9}

        ds = measured("torchvision:squeezenet1_1", "npz:d.npz", "w.pt", model_options=options)

        assert np.isfinite(ds.cosine).all()
        assert verify_store(run_options("out.zarr")).is_well

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("torchvision:resnet19", r"no model 'resnet19' \(but .*resnet18"),
            ("hf:nowhere", r"there is no .*/nowhere/config\.json"),
            ("mine:nothing", "has no attribute 'nothing'"),
            ("resnet19", "unknown model.*torchvision:NAME"),
        ],
    )
    def test_a_network_that_is_not_there(self, name, said):
        """
        Said with the names that are near.
        """
        with pytest.raises(ModelError, match=said):
            build(name, input_shape=(3, 8, 8), n_classes=2)

    def test_a_model_folder_of_hugging_face(self):
        """
        Network, weights and tokens with masks, from what save_pretrained wrote; offline.
        """
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=mine.TOKENS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8, num_labels=mine.CLASSES,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        model.save_pretrained("bert/checkpoint-40")

        ds = measured("hf:bert/checkpoint-40", "mine:padded_text")

        assert ds.iteration.values.tolist() == [40]
        expected = true_cosines(model, mine.padded_text())
        assert_is(ds.cosine[0, 0, 0], expected, float(ds.error_bound[0, 0, 0]))
        assert verify_store(run_options("out.zarr")).is_well

    def test_timm(self):
        """
        By timm's names.
        """
        timm = pytest.importorskip("timm")
        save("w.pt", timm.create_model("resnet10t", num_classes=2).state_dict())
        np.savez("d.npz", x=torch.rand(4, 3, 32, 32).numpy(), y=np.arange(4) % 2)

        ds = measured("timm:resnet10t", "npz:d.npz", "w.pt")

        assert np.isfinite(ds.cosine).all()


class TestData:
    @pytest.mark.parametrize("name", ["mine:validation", "mine:as_dataset", "npz:d.npz"])
    def test_the_same_examples_in_other_clothes(self, name):
        """
        A pair, a Dataset and a file: the same arrays, in their order, with classes numbered.
        """
        x, y = mine.validation()
        np.savez("d.npz", x=x.numpy(), y=y.numpy())

        data = load(name)

        np.testing.assert_array_equal(data.validation.inputs, x)
        np.testing.assert_array_equal(data.validation.labels, y)
        assert data.train is None
        assert data.class_names == ("0", "1", "2")

    @pytest.mark.parametrize("data", ["mine:text", "mine:padded_text"])
    def test_tokens(self, data):
        """
        Token ids stay whole numbers, and a mask beside them goes to the network by name.
        """
        torch.manual_seed(0)
        model = mine.TextClassifier()
        save("step-1.pt", model.state_dict())

        ds = measured("mine:TextClassifier", data, "step-1.pt")

        expected = true_cosines(model, getattr(mine, data.partition(":")[2])())
        assert_is(ds.cosine[0, 0, 0], expected, float(ds.error_bound[0, 0, 0]))
        found = verify_store(run_options("out.zarr"))
        assert found.is_well, found.lines()

    def test_a_hugging_face_data_set_on_disk(self):
        """
        Columns by their usual names, the class names of its features.
        """
        datasets = pytest.importorskip("datasets")
        inputs, labels = mine.padded_text()
        features = datasets.Features(
            input_ids=datasets.Sequence(datasets.Value("int64")),
            attention_mask=datasets.Sequence(datasets.Value("int64")),
            label=datasets.ClassLabel(names=["a", "b", "c"]),
        )
        columns = {k: v.tolist() for k, v in inputs.items()} | {"label": labels.tolist()}
        made = datasets.Dataset.from_dict(columns, features=features)
        datasets.DatasetDict(validation=made).save_to_disk("texts")

        data = load("hf:texts", options={"limit": 20})

        assert data.class_names == ("a", "b", "c")
        np.testing.assert_array_equal(data.validation.inputs["input_ids"], inputs["input_ids"][:20])

    def test_images_of_a_hugging_face_data_set(self):
        """
        A column of images is read as a folder of the same images is, with its options.
        """
        datasets = pytest.importorskip("datasets")
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 5), dtype=np.uint8)
        images = [Image.fromarray(array) for array in pixels]
        for k, image in enumerate(images):
            Path("folder", str(k)).mkdir(parents=True)
            image.save(f"folder/{k}/a.png")
        features = datasets.Features(
            img=datasets.Image(), label=datasets.ClassLabel(names=["0", "1", "2", "3"])
        )
        columns = {"img": images, "label": [0, 1, 2, 3]}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk("saved")

        for options in ({}, {"grey": True, "crop": 4, "mean": [0.5], "std": [0.2]}):
            found = load("hf:saved", options=options)
            expected = load("images:folder", options=options)
            np.testing.assert_array_equal(found.validation.inputs, expected.validation.inputs)
            np.testing.assert_array_equal(found.validation.labels, expected.validation.labels)
        with pytest.raises(DataError, match=r"column 'label' of .* holds numbers.*leave resize"):
            load("hf:saved", options={"inputs": "label", "grey": True})

    def test_fewer_examples_than_classes(self):
        """
        A sample of a data set of many classes need not hold each of them.
        """
        x = torch.rand(50, 6)
        np.savez("d.npz", x=x.numpy(), y=np.arange(50) % 25)
        save("w.pt", torch.nn.Sequential(torch.nn.Linear(6, 25)).state_dict())
        from distributed_stiffness.data.selection import select
        from distributed_stiffness.study import Data

        study = Data(name="npz:d.npz", validation_examples=9, standardise=False, unit_norm=False)
        data = select(study, every_class=False)

        assert data.n_examples == 9

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            (7, r"is a int: expected \(inputs, labels\)"),
            ([1, 2, 3], "the items are no pairs"),
            ({"test": 3}, r"no 'validation' but \['test'\]"),
            ((np.zeros((2, 3)), [0.5, 1.0]), "labels are float64.*expected integers"),
            ((np.zeros((2, 3)), [0]), "2 inputs and 1 labels"),
            (({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}, [0, 1]), "expected one n for all"),
            ([(np.zeros(2), 0), (np.zeros(3), 1), (np.zeros(3), 1)], "cannot be stacked"),
        ],
    )
    def test_data_of_another_kind(self, made, said):
        """
        The message says what came and what was expected.
        """
        with pytest.raises(DataError, match=said):
            foreign.labelled(made, "mine:broken")

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("npz:none.npz", {}, r"cannot read .*/none\.npz"),
            ("npz:d.npz", {}, "no array 'x' or 'inputs', only a, b"),
            ("npz:lfs.npz", {}, "begins with b'version https://git-lfs' and is no .npz"),
            ("npz:d.npz", {"inputs": "c"}, "no array 'c'"),
            ("npz:d.npz", {"size": 3}, "takes inputs, labels"),
            ("images:none", {}, "there is no folder .*/none"),
            ("images:empty", {}, "holds no images by class"),
            ("digits", {"size": 3}, "takes no options"),
        ],
    )
    def test_files_that_are_not_as_they_should_be(self, name, options, said):
        """
        Missing, or with other names in them.
        """
        np.savez("d.npz", a=np.zeros(3), b=np.zeros(3))
        Path("lfs.npz").write_text("version https://git-lfs")
        Path("empty").mkdir()

        with pytest.raises(DataError, match=said):
            load(name, options=options)

    def test_images_of_several_sizes(self):
        """
        Are refused, with the options that make them one.
        """
        from PIL import Image

        for k, size in enumerate(((4, 4), (5, 4))):
            Path("i", str(k)).mkdir(parents=True)
            Image.new("RGB", size).save(f"i/{k}/a.png")

        with pytest.raises(DataError, match=r"expected one size for all.*resize=256"):
            load("images:i")
        assert load("images:i", options={"crop": 4, "grey": True}).input_shape == (1, 4, 4)

    def test_a_network_that_is_trained_here_needs_a_training_split(self):
        """
        Data without one are for `stiffness gram`.
        """
        from distributed_stiffness.study import Data, Model, Study

        data = Data(name=DATA, standardise=False, unit_norm=False)
        with pytest.raises(StudyError, match=r"no training split to train on.*stiffness gram"):
            run_study(Study(data=data, model=Model(name=NETS)), run_options("out.zarr"))


class TestCommand:
    @pytest.fixture
    def stiffness(self, monkeypatch, capsys):
        """Run `stiffness gram WORDS` here: torch is loaded; return exit code and output."""

        def run_here(*words: str) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["stiffness", "gram", "--engine=serial", *words])
            code = 0
            try:
                main()
            except SystemExit as ending:
                code = int(ending.code or 0)
            return code, *capsys.readouterr()

        return run_here

    WORDS = (f"--model={NETS}", f"--data={DATA}", "--store=out.zarr")

    def test_from_checkpoints_to_a_report(self, stiffness):
        """
        One command: what was understood is printed first, at the end where everything is.
        """
        save_runs()
        code, out, err = stiffness(*self.WORDS, "--checkpoints=runs/*/step-*.safetensors")

        assert code == 0, err
        assert "0.01     0         10  runs/lr0.01/step-10.safetensors" in out
        assert out.index("step-10.safetensors") < out.index(f"Report: {Path.cwd()}/out/report.html")
        assert xr.open_zarr("out.zarr").sizes["iteration"] == 2

    def test_sums_alone_and_an_answer_for_machines(self, stiffness):
        """
        --reduce-only keeps no pairs; --json is one object on standard output, and nothing else.
        """
        save_runs()
        words = ["--checkpoints=runs/*/*", "--reduce-only", "--distance-bins=7", "--json"]
        code, out, err = stiffness(*self.WORDS, *words)
        said = json.loads(out)

        assert code == 0, err
        assert "step-10.safetensors" in err
        assert Path(said["report"]).exists()
        ds = xr.open_zarr(said["store"])
        assert "cosine" not in ds
        assert ds.sizes["distance_bin"] == 7

    def test_places_names_and_keys(self, stiffness, monkeypatch, tmp_path):
        """
        The shell leaves the ~ of --store=~/… alone; brackets, decimal commas and a key are meant.
        """
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        both = {"model": mine.weights(1), "ema": mine.weights(2)}
        save("run[1]/lr0,01_step-1,000.pt", both)

        code, out, err = stiffness(
            *self.WORDS[:2], "--store=~/out.zarr", "--figures=~/figures", "--key=ema",
            "--checkpoints=run[1]/*.pt",
        )  # fmt: skip

        assert code == 0, err
        assert "0.01     0      1,000  run[1]/lr0,01_step-1,000.pt" in out
        assert "found under 'ema'" in err
        ds = xr.open_zarr("home/out.zarr")
        assert_is(ds.cosine[0, 0, 0], true_cosines(network(both["ema"])), 1e-6)
        assert Path("home/figures/report.html").exists()
        assert not Path("~").exists()

    def test_a_table_of_a_spreadsheet(self, stiffness):
        """
        --table takes what a German Excel saves.
        """
        save("a.pt", mine.weights(1))
        Path("t.csv").write_bytes(
            "\ufeffpath;learning_rate;iteration\r\na.pt;0,001;5\r\n;;\r\n".encode()
        )

        code, out, err = stiffness(*self.WORDS, "--table=t.csv", "--plan")

        assert code == 0, err
        assert "0.001     0          5  a.pt" in out

    def test_a_pattern_that_the_shell_has_expanded(self, stiffness):
        """
        Without quotes the command gets the files themselves, and takes them all.
        """
        save_runs()
        paths = find("runs/*/*")
        code, out, err = stiffness(*self.WORDS, "--checkpoints", *paths, "--plan")

        assert code == 0, err
        assert all(path in out for path in paths)

    def test_the_cost_before(self, stiffness):
        """
        --plan computes and imports nothing.
        """
        save_runs()
        code, out, err = stiffness(*self.WORDS, "--checkpoints=runs/*/*", "--plan")

        assert code == 0, err
        assert "plan: 4 checkpoints" in out
        assert not list(Path().glob("out*"))

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "no checkpoints are named"),
            (["--checkpoints=none/*"], r"no file matches 'none/\*'"),
            (["--checkpoints=runs/*/*", "--table=t.csv"], "leave --checkpoints and --pattern out"),
            (["--table=t.csv"], "cannot read the table t.csv"),
            (["--checkpoints=runs/*/*", "--loss=mse"], "expected cross_entropy, or package"),
            (["--checkpoints=runs/*/*", "--loss=mine:no"], "loss 'mine:no' cannot be imported"),
            (["--checkpoints=runs/*/*", "--loss=mine:weights"], r"loss .*fails with"),
            (["--checkpoints=runs/*/*", "--model-option=width=9"], r"0\.weight is \(8, 6\)"),
            (["--checkpoints=runs/*/*", "--model-option=depth=9"], "does not take these options"),
            (["--checkpoints=runs/*/*", "--data-option=n=0"], "at least one example"),
            (["--checkpoints=runs/*/*", "--data=npz:no.npz"], r"cannot read .*no\.npz"),
            (["--checkpoints=runs/*/*", "--data=mine:text"], "does not take inputs of shape"),
            (["--checkpoints=runs/*/*", "--unit-norm"], "with standardise false, give unit_norm"),
            (["--checkpoints=runs/*/*", "--train-examples=3"], "no training split.*3 training"),
            (["--checkpoints=runs/*/*", "--iterations=3"], "no checkpoint is of iteration 3"),
            (["--checkpoints=runs/*/*", "--pattern={x}"], r"has \{x\}"),
            (["--checkpoints=runs/*/*", "--prefix=model."], "names after 'model.'.*lacks 4 of 4"),
            (["--checkpoints=runs/*/*", "--precision=half"], "precision"),
            (["--checkpoints=runs/*/*", "--key=ema"], "no weights under the key 'ema'"),
            (
                ["--checkpoints=runs/*/*", "--figures=mine.py/x"],
                "cannot write figures to .*--figures",
            ),
            (["--checkpoints=runs/*/*", "--figures=s3://b/x"], "not a URL"),
            (
                ["--checkpoints=runs/*/*", "--store=mine.py/x.zarr"],
                "cannot write .*mine.py is a file",
            ),
        ],
    )
    def test_a_mistake_is_explained_before_any_work(self, stiffness, words, said):
        """
        Exit code 1, one sentence, no traceback, no store.
        """
        save_runs()
        Path("mine.py").touch()
        code, _, err = stiffness(*self.WORDS, *words)

        assert code == 1
        assert re.search(said, err), err
        assert "Traceback" not in err
        assert not Path("out.zarr").exists()

    def test_a_mistake_is_of_a_kind_that_users_mend(self):
        """
        One class catches them all in Python.
        """
        with pytest.raises(StiffnessError):
            measure_checkpoints(NETS, DATA, "none/*")
