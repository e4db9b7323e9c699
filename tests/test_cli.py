"""The command line: what a person types, what comes back, and never a traceback for a mistake."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import xarray as xr
from pydantic import BaseModel
from studies import hears_ctrl_c, run_options, tiny_study

from distributed_stiffness.cli import main, read_study, run_app
from distributed_stiffness.cli.app import app
from distributed_stiffness.cli.ending import INTERRUPTED, Interrupted
from distributed_stiffness.cli.fields import OF_RUN, OF_STUDY
from distributed_stiffness.cli.jobs import job_app
from distributed_stiffness.engine import Run, run_study
from distributed_stiffness.study import Data, Model, Study

ROOT = Path(__file__).parents[1]
# paper.py runs several studies, whose fields are its own.
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py") if path.name != "paper.py")


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=280
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Ended]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run jobs/mnist.py as `python jobs/mnist.py WORDS`, but in this process: torch is loaded."""

    def run_here(*words: str) -> Ended:
        script = str(ROOT / "jobs/mnist.py")
        monkeypatch.setattr(sys, "argv", [script, *words])
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ending:
            code = int(ending.code or 0)
        return Ended(code, *capsys.readouterr())

    return run_here


@pytest.fixture
def stiffness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `stiffness WORDS` in this process."""

    def run_here(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["stiffness", *words])
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        return Ended(code, *capsys.readouterr())

    return run_here


TINY = (
    "--data=digits", "--examples=40", "--model-option=widths=[8]", "--iterations=0,20",
    "--learning-rates=0.001,0.01", "--engine=serial",
)  # fmt: skip


class TestDemo:
    def test_it_leaves_a_store_figures_and_a_report_and_says_what_they_show(
        self, tmp_path: Path
    ) -> None:
        """
        `stiffness demo` without a network: the files are there and the terminal says where.
        """
        store = tmp_path / "demo.zarr"

        ended = run("-m", "distributed_stiffness", "demo", "--store", str(store), "--engine=serial")

        assert ended.returncode == 0, ended.stderr
        dataset = xr.open_zarr(str(store))
        assert dataset.sizes["learning_rate"] == 2
        assert dataset.sizes["iteration"] == 4
        assert int(dataset.iteration[0]) == 0
        folder = tmp_path / "demo"
        assert len(list(folder.glob("*.png"))) >= 4
        assert "<img" in (folder / "report.html").read_text()
        for where in (store, folder / "report.html"):
            assert str(where) in ended.stdout
        assert "within" in ended.stdout


class TestJobs:
    @pytest.mark.parametrize("name", JOBS)
    def test_help_names_every_option(self, name: str) -> None:
        """
        `python jobs/X.py --help` says what it computes and lists the common options.
        """
        text = run(f"jobs/{name}", "--help").stdout

        for option in (
            "--data-dir", "--store", "--learning-rates", "--iterations", "--examples",
            "--epochs", "--seed", "--accept-unverified-data", "--model", "--precision",
        ):  # fmt: skip
            assert option in text

    def test_options_override_the_defaults(self, tmp_path: Path, job: Command) -> None:
        """
        What the command line says is in the store.
        """
        ended = job(*TINY, "--seed=0,1", f"--store={tmp_path / 'x.zarr'}")

        assert ended.returncode == 0, ended.stderr
        dataset = xr.open_zarr(str(tmp_path / "x.zarr"))
        assert dict(dataset.sizes) == {
            "learning_rate": 2, "seed": 2, "iteration": 2, "example": 40, "other": 40
        }  # fmt: skip

    def test_a_log_shows_done_total_and_rate(self, tmp_path: Path, job: Command) -> None:
        """
        Without a terminal, progress comes as lines: phase, done, total.
        """
        ended = job(*TINY, f"--store={tmp_path / 'x.zarr'}")

        assert re.search(r"tiles: 5/5 tiles \(100%\), .* tiles/s", ended.stderr), ended.stderr
        assert re.search(r"training: 40/40 steps \(100%\)", ended.stderr)


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--learning-rates=0"], r"learning_rates\.0.*greater than 0"),
            (["--learning-rates=nan"], r"learning_rates\.0.*finite"),
            (["--learning-rates=fast"], r"--learning-rates is 'fast'.*numbers"),
            (["--iterations="], r"iterations.*empty"),
            (["--iterations=10,5"], r"\[10, 5\] is not ascending.*5,10"),
            (["--data=imagenet"], r"no data set is called 'imagenet'.*cifar100"),
            (["--model=transformer"], r"unknown model 'transformer'.*resnet20"),
            (["--device=tpu"], r"unknown device 'tpu'.*cuda"),
            (["--examples=100000"], r"100,000.*500"),
            (["--examples=5"], r"5 examples.*at least one of each"),
            (["--examples=many"], r"--examples is 'many'"),
            (["--memory=lots"], r"--memory is 'lots'.*4GB"),
            (["--memory=2KB"], r"too small.*--memory"),
            (["--memory=-4GB"], r"memory is -4000000000 bytes.*more than 0"),
            (["--seed=99999999999999999999"], r"seeds\.0.*less than"),
            (["--train-examples=9999"], r"9,999.*training|9,999.*--train-examples"),
            (["--model-option=widths=[-5]"], r"cannot be built.*-5"),
            (["--model-option=widths=8"], r"cannot be built"),
            (["--device=cuda"], r"device is cuda.*--device cpu"),
            (["--figures=/dev/null/x"], r"cannot write figures to /dev/null/x"),
            (["--precision=float8"], r"precision.*float32.*float64"),
            (["--model=cnn", "--model-option=depth=3"], r"does not take these options"),
            (["--model=pathlib:Path"], r"PosixPath.*torch\.nn\.Module"),
            (["--engine=spark"], r"unknown engine 'spark'"),
            (["--data=mnist", "--data-dir=/nonexistent", "--no-download"], r"/nonexistent"),
        ],
    )
    def test_a_mistake_is_explained_before_any_work(
        self, tmp_path: Path, job: Command, words: list[str], said: str
    ) -> None:
        """
        Exit code 1, one message that names the value and what is expected, and no store.
        """
        ended = job(*TINY, *words, f"--store={tmp_path / 'x.zarr'}")

        assert ended.returncode == 1, ended.stdout
        assert re.search(said, ended.stderr, re.DOTALL), ended.stderr
        assert "Traceback" not in ended.stderr
        assert not (tmp_path / "x.zarr").exists()

    def test_a_class_without_an_example(
        self, tmp_path: Path, job: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Data whose validation split lacks a class are refused by the class's name.
        """
        (tmp_path / "mydata.py").write_text(
            "import numpy as np\n"
            "def lacking():\n"
            "    x, y = np.random.rand(90, 4).astype('f4'), np.arange(90) % 3\n"
            "    return {'train': (x, y), 'validation': (x[y < 2], y[y < 2]),\n"
            "            'class_names': ['cat', 'dog', 'yak']}\n"
        )

        monkeypatch.chdir(tmp_path)

        ended = job(*TINY, "--data=mydata:lacking", f"--store={tmp_path / 'x.zarr'}")

        assert ended.returncode == 1
        assert "'yak'" in ended.stderr
        assert "Traceback" not in ended.stderr

    @pytest.mark.parametrize("url", ["s3://nobody/x.zarr", "nowhere://x.zarr"])
    def test_a_bucket_that_cannot_be_reached(
        self, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """
        A store without credentials, or of an unknown kind, is refused by its URL.
        """
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

        # A process of its own: s3fs keeps a client, and with it these credentials.
        ended = run("jobs/mnist.py", *TINY, f"--store={url}", f"--figures={tmp_path}")

        assert ended.returncode == 1
        assert url in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_report_of_nothing(self, tmp_path: Path) -> None:
        """
        `stiffness report` on a path that is no store says so.
        """
        ended = run("-m", "distributed_stiffness", "report", str(tmp_path / "none.zarr"))

        assert ended.returncode == 1
        assert "none.zarr" in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study with two rates and two iterations."""
    store = tmp_path_factory.mktemp("plot") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


class TestPlot:
    def plot(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return run("-m", "distributed_stiffness", "plot", *map(str, words))

    def test_a_view_of_some_checkpoints_becomes_a_file_of_the_wanted_kind(
        self, store: Path, tmp_path: Path
    ) -> None:
        """
        `stiffness plot STORE VIEW`: chosen rates and iterations, a PDF where the name says so.
        """
        out = tmp_path / "new" / "curves.pdf"

        ended = self.plot(store, "stiffness_curves", "--learning-rates=0.01", "--out", out)

        assert ended.returncode == 0, ended.stderr
        assert str(out) in ended.stdout
        assert out.read_bytes().startswith(b"%PDF")

    def test_without_a_view_all_are_named(self, store: Path) -> None:
        """
        Each with a sentence that says what it shows.
        """
        ended = self.plot(store)

        assert ended.returncode == 0
        assert re.search(r"^stiffness_curves +Above, the means within", ended.stdout, re.MULTILINE)

    def test_a_measure_chooses_between_two_views(self, store: Path) -> None:
        """
        `class_matrices --measure cosine` is `class_matrices_cosine`; sign is what is meant else.
        """
        for words, view in (
            (["class_matrices"], "class_matrices_sign"),
            (["class_matrices", "--measure=cosine"], "class_matrices_cosine"),
        ):
            ended = self.plot(store, *words)

            assert ended.returncode == 0, ended.stderr
            assert f"{view}.png" in ended.stdout

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["nothing"], "no view 'nothing'"),
            (["stiffness_curves", "--out=x.doc"], "'x.doc'"),
            (["superclass_matrices_sign"], "no numbers for 'superclass_matrices_sign'"),
            (["class_matrices", "--measure=size"], "--measure is 'size': expected one of sign"),
            (["stiffness_curves", "--measure=sign"], "stiffness_curves shows what its name says"),
            (["stiffness_curves", "--iterations=7"], "no iteration 7: it has 0, 30"),
        ],
    )
    def test_what_cannot_be_drawn_is_said(self, store: Path, words: list[str], said: str) -> None:
        """
        And what can be.
        """
        ended = self.plot(store, *words)

        assert ended.returncode == 1
        assert said in ended.stderr.replace("\n", " ")
        assert "Traceback" not in ended.stderr


class TestWhereFiguresGo:
    @pytest.mark.parametrize(
        "words",
        [
            ["report"],
            ["report", "--folder={file}/x"],
            ["plot", "class_matrices"],
            ["plot", "class_matrices", "--out={file}/x.png"],
            ["plot", "class_matrices", "--out=s3://bucket/x.png"],
        ],
    )
    def test_a_folder_that_cannot_be_written(
        self, store: Path, tmp_path: Path, stiffness: Command, words: list[str]
    ) -> None:
        """
        Exit code 1 before the work, no traceback, and the option that names another place.
        """
        file = tmp_path / "file"
        file.touch()
        beside = tmp_path / "read_only.zarr"
        shutil.copytree(store, beside)
        (tmp_path / "read_only").touch()  # in the place of the folder beside the store

        ended = stiffness(words[0], str(beside), *[w.format(file=file) for w in words[1:]])

        assert ended.returncode == 1
        assert "--out" in ended.stderr or "not a URL" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "figures:" not in ended.stderr

    def test_another_folder(self, store: Path, tmp_path: Path, stiffness: Command) -> None:
        """
        `report --out` is what `plot --out` is, and a home folder is one.
        """
        for words in (["report", "--out"], ["plot", "class_matrices_sign", "--out"]):
            out = tmp_path / words[0] / "x.png"
            ended = stiffness(words[0], str(store), *words[1:], str(out))

            assert ended.returncode == 0, ended.stderr
            assert str(out) in ended.stdout


class TestInterruption:
    def test_ctrl_c_says_how_to_go_on(self, tmp_path: Path) -> None:
        """
        SIGINT to a job script: exit code 130, one sentence, no traceback.
        """
        words = [*TINY, "--iterations=0,10000000", f"--store={tmp_path / 'x.zarr'}"]
        running = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/mnist.py"), *words],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hears_ctrl_c,
        )
        assert running.stderr is not None
        while "training" not in running.stderr.readline():
            assert running.poll() is None
        time.sleep(1)
        running.send_signal(signal.SIGINT)

        errors = running.communicate(timeout=60)[1]

        assert running.returncode == 130
        assert "run the same command again" in errors
        assert "Traceback" not in errors


class TestImports:
    def test_ray_is_imported_by_one_module_only(self) -> None:
        """
        Everything but engine/ray.py works without ray.
        """
        program = (
            "import pkgutil, importlib, sys, distributed_stiffness as d\n"
            "for m in pkgutil.walk_packages(d.__path__, 'distributed_stiffness.'):\n"
            "    if not m.name.endswith(('engine.ray', '__main__')):\n"
            "        importlib.import_module(m.name)\n"
            "assert 'ray' not in sys.modules\n"
        )

        ended = run("-W", "error", "-c", program)

        assert ended.returncode == 0, ended.stderr


class TestExplain:
    def test_a_table(self, stiffness):
        """The rule, the work and the share of each layer, without any data."""
        done = stiffness("explain", "--model", "cnn", "--input-shape", "3,16,16", "--classes", "4")

        assert done.returncode == 0
        assert "convolution2d" in done.stdout
        assert "forward and backward pass" in done.stdout

    def test_for_machines(self, stiffness):
        """--json is one JSON object."""
        done = stiffness("explain", "--examples", "500", "--json")

        assert json.loads(done.stdout)["n_examples"] == 500

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--model", "nope"), "unknown model 'nope'"),
            (("--input-shape", "3,x"), "--input-shape is '3,x'"),
            (("--input-shape", "0"), "--input-shape is '0'"),
            (("--precision", "tf32"), "needs a CUDA device"),
            (("--precision", "half"), "unknown precision 'half'"),
            (("--memory", "1KB"), "too small"),
            (("--model", "cnn", "--input-shape", "5"), "needs images"),
        ],
    )
    def test_mistakes_are_said_in_words(self, stiffness, arguments, said):
        """Nothing ends in a traceback."""
        done = stiffness("explain", *arguments)

        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def leaves(model: type[BaseModel], under: str = "") -> set[str]:
    """The fields of a study file by their paths, sections taken apart."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kind, path = field.annotation, f"{under}{name}"
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= leaves(kind, f"{path}.") if is_section else {path}
    return found


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by name, that of a job script among them."""
    job_script = job_app(Study(), store="x.zarr", description="A job.")
    return {**typer.main.get_command(app).commands, "job": typer.main.get_command(job_script)}


COMMANDS = commands()
# Parameters that are neither of a study nor of a run: what is read or shown, and where it goes.
OTHERS = {"figures", "plan_only", "as_json", "help"}
# Of `gram`: which checkpoints, and what they say of themselves.
OF_CHECKPOINTS = {"more", "pattern", "table", "prefix", "key", "checkpoints"}
TRAINED_HERE = {  # fields that networks which are trained already have no use for
    "training.epochs", "training.batch_size", "training.optimizer", "training.momentum",
    "training.weight_decay", "data.permuted_labels", "data.permutation_seed",
}  # fmt: skip
READ_FROM_CHECKPOINTS = {"training.learning_rates", "training.seeds"}

# Each field of a study as an option and in a study file, with another value than the default.
SAID_TWICE: dict[str, tuple[list[str], object]] = {
    "title": (["--title=Mine"], "Mine"),
    "data.name": (["--data=mnist"], "mnist"),
    "data.options": (["--data-option=size=3", "--data-option=name=a"], {"size": 3, "name": "a"}),
    "data.validation_examples": (["--examples=40"], 40),
    "data.train_examples": (["--train-examples=7"], 7),
    "data.sample_seed": (["--sample-seed=3"], 3),
    "data.permuted_labels": (["--permute-labels=0.5"], 0.5),
    "data.permutation_seed": (["--permutation-seed=4"], 4),
    "data.standardise": (["--no-standardise", "--no-unit-norm"], False),
    "data.unit_norm": (["--no-unit-norm"], False),
    "data.accept_unverified": (["--accept-unverified-data"], True),
    "model.name": (["--model=cnn"], "cnn"),
    "model.options": (["--model-option=widths=[8]"], {"widths": [8]}),
    "training.learning_rates": (["--learning-rates=0.1,0.2"], [0.1, 0.2]),
    "training.seeds": (["--seed=1,2"], [1, 2]),
    "training.iterations": (["--iterations=0,9"], [0, 9]),
    "training.epochs": (["--epochs=2.5"], 2.5),
    "training.batch_size": (["--batch-size=8"], 8),
    "training.optimizer": (["--optimizer=sgd"], "sgd"),
    "training.momentum": (["--momentum=0.9"], 0.9),
    "training.weight_decay": (["--weight-decay=0.01"], 0.01),
    "loss": (["--loss=mine:smoothed"], "mine:smoothed"),
    "gradients.parameters": (["--parameters=a.*", "--parameters=b.*"], ["a.*", "b.*"]),
    "gradients.precision": (["--precision=bf16"], "bf16"),
    "gradients.tile": (["--tile=20"], 20),
    "keep": (["--reduce-only"], "sums"),
    "distance_bins": (["--distance-bins=9"], 9),
}


def written(**fields: object) -> dict[str, object]:
    """Fields by their paths as a study file has them."""
    nested: dict[str, dict[str, object]] = {}
    for path, value in fields.items():
        section, _, name = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value  # type: ignore
    return nested  # type: ignore[return-value]


class TestFields:
    def test_a_job_has_an_option_for_every_field_of_a_study_and_of_a_run(self) -> None:
        """
        And no option that is neither.
        """
        names = {parameter.name for parameter in COMMANDS["job"].params}

        assert {OF_STUDY[n].path for n in names & OF_STUDY.keys()} == leaves(Study) - {
            "training.imported"
        }
        assert {OF_RUN[n].path for n in names & OF_RUN.keys()} == {
            field.name for field in dataclasses.fields(Run)
        } - {"quiet"}
        assert names <= OF_STUDY.keys() | OF_RUN.keys() | OTHERS

    def test_gram_has_all_but_those_of_a_training(self) -> None:
        """
        Rates and seeds are read from the checkpoints, which lie beside the store.
        """
        names = {parameter.name for parameter in COMMANDS["gram"].params} - OF_CHECKPOINTS

        assert {OF_STUDY[n].path for n in names & OF_STUDY.keys()} == leaves(Study) - {
            "training.imported"
        } - TRAINED_HERE - READ_FROM_CHECKPOINTS
        assert names & OF_RUN.keys() == OF_RUN.keys() - {"checkpoints"}
        assert names <= OF_STUDY.keys() | OF_RUN.keys() | OTHERS

    def test_run_has_an_option_for_every_field_of_a_run(self) -> None:
        """
        What a study file says is no option of it.
        """
        names = {parameter.name for parameter in COMMANDS["run"].params} - {"study"}

        assert names & OF_RUN.keys() == OF_RUN.keys()
        assert names <= OF_RUN.keys() | OTHERS

    @pytest.mark.parametrize("command", ["demo", "run", "gram"])
    def test_an_option_has_one_name_and_one_text(self, command: str) -> None:
        """
        What commands that compute have in common is called and explained alike.
        """
        of_job = {p.name: p for p in COMMANDS["job"].params}
        for parameter in COMMANDS[command].params:
            of_checkpoints = command == "gram" and parameter.name in OF_CHECKPOINTS
            if parameter.name in (OF_RUN.keys() | OTHERS) - {"help"} and not of_checkpoints:
                same = of_job[parameter.name]
                assert (parameter.opts, parameter.help) == (same.opts, same.help)

    def test_the_table_below_has_every_field(self) -> None:
        """
        So that the next test leaves none out.
        """
        assert SAID_TWICE.keys() == leaves(Study) - {"training.imported"}

    @pytest.mark.parametrize("path", SAID_TWICE)
    def test_an_option_means_what_the_file_says(
        self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A job with an option, and a file with that field changed, are one study.
        """
        words, value = SAID_TWICE[path]
        base = Study(title="base", data=Data(name="digits"), model=Model(name="fully_connected"))
        other = {"title": f"{value}, fully_connected"} if path == "data.name" else {}
        other |= {"title": "digits, cnn"} if path == "model.name" else {}
        other |= {"data.unit_norm": False} if path == "data.standardise" else {}
        fields = written(**({"title": "base"} | other | {path: value}))
        file = tmp_path / "study.json"
        file.write_text(json.dumps(fields))
        seen: list[Study] = []
        monkeypatch.setattr(
            "distributed_stiffness.cli.jobs.compute_or_plan",
            lambda study, *_, **__: seen.append(study),
        )
        monkeypatch.setattr(sys, "argv", ["job.py", *words])
        job_app(base, store="x.zarr", description=None)(standalone_mode=False)

        assert seen == [read_study(file)]
        assert seen != [base]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example(self, command: str) -> None:
        """
        One that can be copied: it begins with the command.
        """
        text = " ".join((COMMANDS[command].help or "").split())

        assert re.search(rf"Example: (stiffness {command}|python)", text)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_choices_are_shown(self, command: str) -> None:
        """
        Wherever only some words are allowed, --help has them.
        """
        for parameter in COMMANDS[command].params:
            if parameter.name in ("engine", "device", "precision", "optimizer", "measure"):
                assert re.fullmatch(r"\[\w+(\|\w+)+\]", str(parameter.metavar))

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_speaks_to_machines(self, command: str) -> None:
        """
        --json, everywhere.
        """
        assert "as_json" in {parameter.name for parameter in COMMANDS[command].params}


class TestJson:
    def test_of_a_job(self, tmp_path: Path, job: Command) -> None:
        """
        What was written where, and what it shows; everything else goes to standard error.
        """
        ended = job(*TINY, "--json", f"--store={tmp_path / 'x.zarr'}")
        said = json.loads(ended.stdout)

        assert said["store"] == str(tmp_path / "x.zarr")
        assert Path(said["report"]).exists()
        assert all(Path(path).exists() for path in said["figures"].values())
        assert said["findings"]

    def test_of_a_study_file(self, tmp_path: Path, store: Path, stiffness: Command) -> None:
        """
        `run` is the same; a store's own study runs from its attribute.
        """
        file = tmp_path / "study.json"
        file.write_text(xr.open_zarr(str(store)).attrs["study"])
        words = ["run", str(file), f"--store={tmp_path / 'x.zarr'}", "--engine=serial", "--json"]

        ended = stiffness(*words)

        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["store"] == str(tmp_path / "x.zarr")
        assert xr.open_zarr(str(tmp_path / "x.zarr")).attrs["study"] == file.read_text()

    def test_of_what_is_read(self, tmp_path: Path, store: Path, stiffness: Command) -> None:
        """
        status, plot, report and the list of views.
        """
        figure = tmp_path / "curves.svg"
        for words, key in (
            (["status", str(store)], "checkpoints"),
            (["plot", str(store), "stiffness_curves", f"--out={figure}"], "figure"),
            (["plot", str(store), "--list"], "stiffness_curves"),
            (["report", str(store), f"--folder={tmp_path / 'report'}"], "report"),
        ):
            ended = stiffness(*words, "--json")

            assert ended.returncode == 0, ended.stderr
            assert key in json.loads(ended.stdout)
        assert figure.exists()

    def test_of_a_cost(self, tmp_path: Path, job: Command) -> None:
        """
        `--plan --json` of a job says what `stiffness plan --json` says.
        """
        ended = job(*TINY, "--plan", "--json", f"--store={tmp_path / 'x.zarr'}")

        assert json.loads(ended.stdout).keys() == {"plan", "prediction"}
        assert not (tmp_path / "x.zarr").exists()


class TestCost:
    @pytest.mark.parametrize("keep", ["pairs", "sums"])
    def test_hours_of_replicas_at_an_assumed_rate(
        self, keep: str, tmp_path: Path, stiffness: Command
    ) -> None:
        """
        Operations by the rate, with folding and checks beside them: in words and for machines.
        """
        study = tmp_path / "study.json"
        study.write_text(tiny_study(keep=keep).model_dump_json())
        words = ("plan", str(study), "--memory=200MB", f"--store={tmp_path / 'x.zarr'}")

        said = stiffness(*words, "--device-rate=20e12")
        found = json.loads(stiffness(*words, "--device-rate=20e12", "--json").stdout)

        assert "at 2e+13 operations a second of a device" in said.stdout
        assert "GPU hours" in said.stdout
        assert " for checks" in said.stdout
        assert ("for folding" in said.stdout) == (keep == "sums")
        hours, operations = found["device_hours"], found["prediction"]["operations"]
        assert hours["device"] == pytest.approx(operations / 20e12 / 3600)
        assert hours["replicas"] == max(hours["device"], hours["fold"]) + hours["checks"]

    def test_a_rate_that_no_device_has(self, tmp_path: Path, stiffness: Command) -> None:
        """
        Is refused before anything is measured.
        """
        study = tmp_path / "study.json"
        study.write_text(tiny_study().model_dump_json())

        ended = stiffness("plan", str(study), "--device-rate=0")

        assert ended.returncode == 1
        assert not ended.stdout
        assert "expected more than 0, such as --device-rate 20e12" in ended.stderr


class TestEnding:
    def test_an_interruption_within_compiled_code(self, capsys: pytest.CaptureFixture[str]) -> None:
        """
        Where it surfaces as a SystemError, as in ray.wait, it is one all the same.
        """

        def waits() -> None:
            raise SystemError("returned a result with an exception set") from Interrupted()

        with pytest.raises(SystemExit) as ending:
            run_app(waits)

        assert ending.value.code == INTERRUPTED
        assert "run the same command again" in capsys.readouterr().err

    def test_another_system_error_is_ours(self) -> None:
        """
        And is shown whole.
        """

        def breaks() -> None:
            raise SystemError("a bug")

        with pytest.raises(SystemError, match="a bug"):
            run_app(breaks)
