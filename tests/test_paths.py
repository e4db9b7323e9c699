"""Places: a home folder, a pathlib.Path, a URL, and what cannot be written, everywhere alike."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mine
import pytest
import torch

from distributed_stiffness import add_distances, measure_checkpoints, verify_store, watch
from distributed_stiffness.checkpoints import Checkpoints
from distributed_stiffness.data.catalogue import data_directory
from distributed_stiffness.engine import Run
from distributed_stiffness.engine.status import status
from distributed_stiffness.errors import CheckpointError, DataError, StoreError, StudyError
from distributed_stiffness.paths import as_written, local, located, require_writable
from distributed_stiffness.report import plot, present
from distributed_stiffness.store import Store, is_there


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another folder to work in."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SCRATCH", str(home / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(here)
    return home


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    torch.save(mine.weights(), folder / "step-1.pt")
    run = Run(store=folder / "s.zarr", engine="serial", quiet=True)
    measure_checkpoints("mine:build", "mine:validation", folder / "step-1.pt", run=run)
    return folder


@pytest.fixture
def store(home: Path, finished: Path) -> Path:
    """A store in the home folder."""
    shutil.copytree(finished, home, dirs_exist_ok=True)
    return home / "s.zarr"


class Anything(os.PathLike[str]):
    """A path of a package of its own."""

    def __fspath__(self) -> str:
        return "~/x"


class TestLocated:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("x", "{here}/x"),
            ("./x/", "{here}/x"),
            (Path("x"), "{here}/x"),
            (b"x", "{here}/x"),
            ("~/x", "{home}/x"),
            ("~", "{home}"),
            (Path("~/x"), "{home}/x"),
            (Anything(), "{home}/x"),
            ("$SCRATCH/x", "{home}/scratch/x"),
            ("${SCRATCH}/x", "{home}/scratch/x"),
            ("file:///not/there/x", "/not/there/x"),
            ("FILE:///not/there/x", "/not/there/x"),
            ("file://localhost/not/x", "/not/x"),
            ("file:/not/x", "/not/x"),
            ("file:///a%20b", "/a b"),
            ("local:///not/x", "/not/x"),
            ("s3://bucket/x/", "s3://bucket/x"),
            ("S3://Bucket/X", "s3://Bucket/X"),
            ("memory://x", "memory://x"),
            ("run[1]/x", "{here}/run[1]/x"),
            ("a b", "{here}/a b"),
        ],
    )
    def test_what_is_meant(self, home: Path, given: Any, expected: str) -> None:
        """
        Text, paths of any kind and URLs become an absolute path, or a URL.
        """
        assert located(given, "store") == expected.format(home=home, here=Path.cwd())

    def test_names_that_look_like_more(self) -> None:
        """
        What is there is meant as it stands: a folder called $SCRATCH, or ~friend, or a%20b.
        """
        for name in ("$SCRATCH", "~friend", "a%20b"):
            Path(name).mkdir()

            assert located(f"file:{Path.cwd()}/{name}", "store") == str(Path(name).absolute())
            assert located(name, "store") == str(Path(name).absolute())

    def test_a_folder_called_tilde_is_nobodys_home(self, home: Path) -> None:
        """
        One that an earlier mistake has made does not catch the next path.
        """
        Path("~").mkdir()

        assert located("~/x", "store") == f"{home}/x"

    def test_above(self) -> None:
        """
        What lies beside "..", such as checkpoints, needs the folder's own name.
        """
        Path("deep").mkdir()

        assert located("deep/..", "store") == str(Path.cwd())

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("", "store is '': expected a path or a URL"),
            ("  ", "expected a path or a URL"),
            ("a\0b", "expected a path or a URL"),
            (3, "store is 3: expected a path or a URL, as text or a pathlib.Path"),
            (None, "store is None"),
            (["x"], r"store is \['x'\]"),
            ("$NOWHERE/x", r"the environment has no \$NOWHERE"),
            ("s3://bucket/$NOWHERE", r"the environment has no \$NOWHERE"),
            ("~nobody_is_called_so/x", "~nobody_is_called_so is the home of no user"),
            (Path("s3://bucket/x"), r"no URL: expected s3://bucket/x, as text"),
            ("gs:/bucket/x", "no URL: expected gs://bucket/x"),
        ],
    )
    def test_what_is_no_place(self, given: Any, said: str) -> None:
        """
        Names what it was and what was expected.
        """
        with pytest.raises(StudyError, match=said):
            located(given, "store")

    def test_a_url_where_files_are_needed(self) -> None:
        """
        Figures and data are files of this machine; a folder called s3: is never made.
        """
        with pytest.raises(DataError, match=r"the figure is s3://b/x\.png: expected a folder or"):
            local("s3://b/x.png", "the figure", DataError)

    def test_as_it_was_written(self, home: Path) -> None:
        """
        Tables of checkpoints show short paths where the user gave them.
        """
        for given, expected in (
            ("runs/x", "runs/x"),
            ("./runs/x", "runs/x"),
            (f"{Path.cwd()}/x", f"{Path.cwd()}/x"),
            ("~/x", f"{home}/x"),
            ("s3://b/x", "s3://b/x"),
        ):
            assert as_written(given, located(given, "x")) == expected


@pytest.mark.parametrize("given", ["~/s.zarr", Path("~/s.zarr"), "$HOME/s.zarr", "file://{}"])
def test_every_function_finds_the_store(store: Path, given: Any) -> None:
    """
    Looking at a store takes its place as measuring does: no function has its own idea of a path.
    """
    given = given.format(store) if isinstance(given, str) else given

    assert is_there(given)
    assert Store(given).url == str(store)
    assert status(given).store == str(store)
    assert verify_store(given).is_well
    assert add_distances(given, ["euclidean"]) == ["distance_euclidean"]
    assert plot(given, "class_matrices_sign", Path("~/one.png")) == store.parent / "one.png"
    assert not Path("~").exists()


def test_a_report_in_the_home_folder(store: Path, home: Path) -> None:
    """
    What is written goes where a place is, too.
    """
    assert any(str(store) in line for line in present("~/s.zarr", "~/report"))
    assert (home / "report" / "report.html").exists()


@pytest.mark.parametrize("given", ["~/w.zarr", Path("~/w.zarr"), "file://{}/w.zarr"])
def test_a_training_that_is_watched(home: Path, given: Any) -> None:
    """
    The store of `watch` is a place like any other.
    """
    given = given.format(home) if isinstance(given, str) else given
    with watch(mine.build(), "cross_entropy", mine.validation(), store=given, quiet=True) as found:
        found.step(0)

    assert is_there(home / "w.zarr")


class TestRun:
    def test_places_are_kept_absolute(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A run means the same place wherever the process goes; checkpoints lie beside the store.
        """
        run = Run(store=Path("x.zarr"), data_directory="~/data")
        here = Path.cwd()
        monkeypatch.chdir(home)

        assert run.store_url == f"{here}/x.zarr"
        assert run.checkpoint_folder == f"{here}/x.checkpoints"
        assert run.data_directory == f"{home}/data"
        assert Run(store="x", checkpoints=Path("~/c")).checkpoint_folder == f"{home}/c"
        assert Run(store="s3://b/x.zarr/").checkpoint_folder == "s3://b/x.checkpoints"

    def test_a_store_beside_the_run(self) -> None:
        """
        `store=` counts beside `run=`; two different ones are refused, not one of them left out.
        """
        torch.save(mine.weights(), "step-1.pt")
        what = ("mine:build", "mine:validation", "step-1.pt")

        made = measure_checkpoints(*what, store="here.zarr", run=Run(engine="serial", quiet=True))

        assert made == f"{Path.cwd()}/here.zarr"
        with pytest.raises(StudyError, match=r"here\.zarr, and the run's is .*there\.zarr"):
            measure_checkpoints(*what, store="here.zarr", run=Run(store="there.zarr"))

    def test_folders_of_data_and_checkpoints(self, home: Path) -> None:
        """
        They are places too.
        """
        assert data_directory(Path("~/data")) == home / "data"
        assert Checkpoints(Path("~/c")).url == f"{home}/c"
        with pytest.raises(DataError, match="the data directory is s3://b/data"):
            data_directory("s3://b/data")

    def test_a_path_where_a_name_is_meant(self) -> None:
        """
        A path says nothing of what is there: data have a kind before it.
        """
        with pytest.raises(StudyError, match=r"data is the path 'd\.npz'.*'npz:FILE'"):
            measure_checkpoints("mine:build", Path("d.npz"), "x.pt")


class TestWriting:
    @pytest.mark.parametrize("what", ["file/new/x", "file", "/proc/x", "link/x"])
    def test_what_cannot_be_written(self, what: str) -> None:
        """
        Below a file, in a folder that takes none, behind a link to nowhere.
        """
        Path("file").write_text("")
        Path("link").symlink_to("nowhere")

        with pytest.raises(StoreError, match=rf"cannot write figures to .*{what}: .*; go away"):
            require_writable(Path(what).absolute(), "figures", "go away", StoreError)

    def test_nothing_is_left_behind(self) -> None:
        """
        Trying makes neither folder nor file.
        """
        require_writable(Path("a/b/c").absolute(), "figures", "")

        assert not list(Path().iterdir())

    @pytest.mark.parametrize(
        "places", [{"store": "file/s.zarr"}, {"store": "s.zarr", "checkpoints": "file/c"}]
    )
    def test_a_study_is_refused_before_its_data_are_loaded(
        self, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        And not after hours, when the first tile is to be kept.
        """
        Path("file").write_text("")
        torch.save(mine.weights(), "step-1.pt")
        monkeypatch.setattr(mine, "validation", lambda: pytest.fail("the data were loaded"))

        with pytest.raises(StoreError, match=r"cannot write .*/file/.* is a file; give another"):
            measure_checkpoints(
                "mine:build",
                "mine:validation",
                "step-1.pt",
                run=Run(engine="serial", quiet=True, **places),
            )

    @pytest.mark.parametrize(
        ("draw", "said"),
        [
            (lambda s: present(s, "file/figures"), "cannot write figures to .*--out"),
            (lambda s: plot(s, "stiffness_curves", "file/x.png"), "cannot write figures .*--out"),
            (lambda s: plot(s, "stiffness_curves", "."), "cannot be written as"),
            (lambda s: plot(s, "stiffness_curves", "x.png"), "x.png: it is a folder; .*--out"),
            (lambda s: present(s, "s3://b/figures"), "expected a folder or file of this machine"),
        ],
    )
    def test_figures_are_refused_before_they_are_drawn(
        self, store: Path, draw: Callable[[Path], Any], said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Reports and figures say where else they may go.
        """
        Path("file").write_text("")
        Path("x.png").mkdir()
        monkeypatch.setattr(
            sys.modules["distributed_stiffness.report.present"],
            "summary",
            lambda *_, **__: pytest.fail("the store was reduced"),
        )

        with pytest.raises((StoreError, DataError), match=said):
            draw(store)


def test_a_checkpoint_is_no_store() -> None:
    """
    Each place has its own error: a checkpoint's is one of checkpoints.
    """
    with pytest.raises(CheckpointError, match="a checkpoint is 5"):
        located(5, "a checkpoint", CheckpointError)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["zip://here/s.zarr", "https://example.org/s.zarr"])
def test_places_that_are_read_as_a_whole(place: str) -> None:
    """
    No store is written there, and none is begun.
    """
    with pytest.raises(StoreError, match="chunks cannot be written side by side"):
        Run(store=place).require_writable()
