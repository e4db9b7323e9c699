"""Status, plans and parts: what a person asks for before, during and between runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from studies import arrays, assert_same_bits, run_options, tiny_study

from distributed_stiffness.cli import app, read_study, run_app
from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.status import status
from distributed_stiffness.errors import StoreError, StudyError
from distributed_stiffness.progress import Progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store."""
    store = tmp_path_factory.mktemp("finished") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


class TestStatus:
    def test_a_finished_store(self, finished: Path) -> None:
        """Everything is there, and nobody is at work."""
        found = status(str(finished))

        assert found.tiles == (5 * 9, 5 * 9)
        assert all(checkpoint.complete for checkpoint in found.checkpoints)
        first, second, *rest = found.lines()
        assert "finished 20" in first
        assert second == "tiles: 45/45 (100%); checkpoints complete: 4/4"
        assert not rest

    def test_a_store_in_work(self, tmp_path: Path) -> None:
        """What is missing is named, and so is who computes what."""
        store = tmp_path / "part.zarr"
        run_study(tiny_study(), run_options(store, rows=(0, 20)))
        assert "nobody computes it" in next(status(str(store)).lines())

        lease = Lease(str(store))
        lease.status = {
            "replicas": {"replica-1": ["rate 0.1: tiles rows [1] column 2"], "replica-2": []},
            "phases": {"tiles": {"done": 30, "total": 45, "unit": "tiles", "rate": 0.5}},
        }
        with lease.held(Progress(quiet=True)):
            lines = list(status(str(store)).lines())

        assert "computed by process" in lines[0]
        assert lines[1] == "tiles: 25/45 (56%); checkpoints complete: 0/4"
        assert "tiles: 30/45 tiles, 0.5 tiles/s, about 0.5 min left" in lines
        assert "  learning rate 0.001, seed 0, iteration 0: 5/9 tiles" in lines
        assert lines[-2:] == ["  replica-1: rate 0.1: tiles rows [1] column 2", "  replica-2: idle"]

    def test_for_machines(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """--json is one object, with every checkpoint."""
        app(["status", str(finished), "--json"], standalone_mode=False)
        found = json.loads(capsys.readouterr().out)

        assert (found["tiles"], found["of"]) == (45, 45)
        assert len(found["checkpoints"]) == 4
        assert found["state"].startswith("finished")

    def test_no_store(self, tmp_path: Path) -> None:
        """A sentence."""
        with pytest.raises(StoreError, match="there is no store"):
            status(str(tmp_path / "nothing.zarr"))


class TestRows:
    def test_a_band_of_rows_then_the_rest(self, finished: Path, tmp_path: Path) -> None:
        """Rows that were asked for are whole; a later run adds the others, with the same bits."""
        store = tmp_path / "band.zarr"

        run_study(tiny_study(), run_options(store, rows=(20, 40)))
        part = arrays(store)
        assert not np.isnan(part["cosine"][..., 20:40, :]).any()
        assert not np.isnan(part["cosine"][..., :, 20:40]).any()
        assert np.isnan(part["cosine"][..., :20, 40:]).all()
        assert (part["undecided"] == -1).all()

        run_study(tiny_study(), run_options(store))
        assert_same_bits(finished, store)

    @pytest.mark.parametrize("rows", [(0, 61), (5, 5), (-1, 3), (30, 20)])
    def test_rows_that_are_not_there(self, rows: tuple[int, int], tmp_path: Path) -> None:
        """Refused before the store is made."""
        store = tmp_path / "x.zarr"
        with pytest.raises(StudyError, match=r"not in the matrix: expected FIRST:LAST"):
            run_study(tiny_study(), run_options(store, rows=rows))

        assert not store.exists()

    def test_a_wrong_word(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On the command line too."""
        script = str(Path(__file__).parents[2] / "jobs/mnist.py")
        monkeypatch.setattr(sys, "argv", [script, "--rows", "many"])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(script, run_name="__main__")

        assert ending.value.code == 1
        assert "--rows is 'many': expected FIRST:LAST" in capsys.readouterr().err


class TestPlan:
    def test_before_the_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Operations, bytes and time of a study file; nothing is made."""
        monkeypatch.chdir(tmp_path)
        Path("study.json").write_text(tiny_study().model_dump_json())

        app(["plan", "study.json", "--replicas", "2"], standalone_mode=False)

        out = capsys.readouterr().out
        assert "plan: 4 checkpoints" in out
        assert "floating-point operations" in out
        assert "on 2 replica(s)" in out
        assert [path.name for path in tmp_path.iterdir()] == ["study.json"]

    def test_for_machines(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """--json holds the plan and the prediction."""
        file = tmp_path / "study.json"
        file.write_text(tiny_study().model_dump_json())

        app(["plan", str(file), "--json", "--store", str(tmp_path / "x.zarr")],
            standalone_mode=False)  # fmt: skip

        found = json.loads(capsys.readouterr().out)
        assert found["plan"]["n_examples"] == 60
        assert found["prediction"]["seconds"] > 0

    def test_a_file_that_is_no_study(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sentence that names the field, and exit code 1."""
        file = tmp_path / "study.json"
        file.write_text('{"model": {"nmae": "cnn"}}')
        monkeypatch.setattr(sys, "argv", ["stiffness", "plan", str(file)])
        with pytest.raises(SystemExit) as ending:
            run_app(app)

        assert ending.value.code == 1
        assert "model.nmae" in capsys.readouterr().err


class TestStudyFiles:
    def test_one_study_in_three_languages(self, tmp_path: Path) -> None:
        """JSON, YAML and TOML with the same fields are the same study."""
        study = tiny_study()
        (tmp_path / "a.json").write_text(study.model_dump_json())
        (tmp_path / "b.yaml").write_text(
            "title: tiny\n"
            "data: {name: digits, validation_examples: 60}\n"
            "model: {name: fully_connected, options: {widths: [16, 8]}}\n"
            "training: {learning_rates: [1e-3, 1e-2], iterations: [0, 30]}\n"
            "gradients: {tile: 20}\n"
        )
        (tmp_path / "c.toml").write_text(
            'title = "tiny"\n'
            'data = {name = "digits", validation_examples = 60}\n'
            'model = {name = "fully_connected", options = {widths = [16, 8]}}\n'
            "training = {learning_rates = [1e-3, 1e-2], iterations = [0, 30]}\n"
            "gradients = {tile = 20}\n"
        )

        for file in tmp_path.iterdir():
            assert read_study(file) == study

    @pytest.mark.parametrize("name", ["x.json", "x.yaml", "x.toml"])
    def test_what_cannot_be_parsed(self, name: str, tmp_path: Path) -> None:
        """A sentence, with the place."""
        file = tmp_path / name
        file.write_text("a: [")

        with pytest.raises(StudyError, match=rf"{name} cannot be parsed: (?s:.*)line"):
            read_study(file)
