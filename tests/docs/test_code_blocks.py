"""The code blocks of README and docs: each page has one folder and one namespace, in order."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest

import pytest
from markdown_it import MarkdownIt
from studies import run_options
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

import distributed_stiffness
from distributed_stiffness.cli import main
from distributed_stiffness.cli.studies import DEMO
from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.serial import run_serially
from distributed_stiffness.study import Data, Training

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, WRITTEN = ("python", "bash"), ("yaml", "toml", "json", "csv")
SHOWN = ("text",)  # checked where `<!-- printed -->` stands before it
FENCE = re.compile(r"^[ \t]*(?:```|~~~)(\S[^\n]*)$", re.MULTILINE)
FILE = re.compile(r"# (\S+\.\w+)\n")  # a block whose first line is a name is that file
PRINTED = "<!-- printed -->"
BUCKET = "your-bucket"


def has_code(page: Path) -> bool:
    return not set(RUN).isdisjoint(FENCE.findall(page.read_text()))


class Reader:
    """Somebody who does what a page says, from top to bottom."""

    def __init__(self, *, here: bool, heard: Callable[[], str]) -> None:
        self.here = here  # commands in this process, where torch is loaded
        self._heard = heard
        self.said = ""
        self._python = PythonEvaluator()

    def read(self, page: Path) -> None:
        parsers = [
            *(CodeBlockParser(language, self.write) for language in WRITTEN),
            CodeBlockParser("python", self.python),
            CodeBlockParser("bash", self.bash),
            CodeBlockParser("text", self.text),
            SkipParser(),
        ]
        document = Document.parse(str(page), *parsers)
        for example in document.examples():
            try:
                example.evaluate()
            except SkipTest:
                continue
            except BaseException as error:
                error.add_note(f"{page}, line {example.line}")
                raise
            self.said += self._heard()

    def write(self, example: Example) -> None:
        """Write a block that begins with the name of a file."""
        if name := FILE.match(example.parsed):
            Path(name[1]).write_text(example.parsed)

    def python(self, example: Example) -> None:
        (self.write if FILE.match(example.parsed) else self._python)(example)

    def bash(self, example: Example) -> None:
        lines = example.parsed.replace("\\\n", " ").splitlines()
        commands = [words for line in lines if (words := shlex.split(line, comments=True))]
        if self.here and all(words[0] in ("stiffness", "python") for words in commands):
            for words in commands:
                run_here(words)
            return
        folder = Path(sys.executable).parent
        ended = subprocess.run(
            ["bash", "-e", "-c", example.parsed],
            env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        self.said += ended.stdout

    def text(self, example: Example) -> None:
        """Compare a block that is marked as printed with all that was printed before."""
        before = example.document.text[: example.start].rstrip()
        if before.endswith(PRINTED):
            assert " ".join(example.parsed.split()) in " ".join(self.said.split())


def run_here(words: list[str]) -> None:
    """Do what `stiffness …` or `python FILE …` would do."""
    before = sys.argv
    sys.argv = words[words[0] == "python" :]
    try:
        main() if words[0] == "stiffness" else runpy.run_path(words[1], run_name="__main__")
    except SystemExit as ending:
        if ending.code:
            raise AssertionError(f"{shlex.join(words)} ended with {ending.code}") from ending
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `stiffness demo` leaves behind, of one rate, and fewer examples and steps."""
    folder = tmp_path_factory.mktemp("demo") / "results"
    study = DEMO.model_copy(
        update={
            "data": Data(name="digits", validation_examples=100),
            "training": Training(learning_rates=(1e-3,), iterations=(0, 60)),
        }
    )
    run_study(study, run_options(folder / "demo.zarr"))
    return folder


@pytest.fixture
def folder(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Path]:
    """Where the page is read: `jobs/`, the demo's store and a bucket, if it speaks of them."""
    text = page.read_text()
    if "jobs/" in text:
        (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    if "results/demo.zarr" in text:
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / "results")
    if f"s3://{BUCKET}" in text:
        import boto3

        request.getfixturevalue("bucket")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "page", [*filter(has_code, PAGES)], ids=lambda page: str(page.relative_to(ROOT))
)
class TestCodeBlocks:
    @pytest.mark.usefixtures("folder")
    def test_a_page_runs_from_top_to_bottom(self, page, capsys, monkeypatch):
        """
        No block fails, and what a page says is printed is printed. Nobody starts Ray for it.
        """
        serial = SimpleNamespace(run_on_ray=run_serially)
        monkeypatch.setitem(sys.modules, "distributed_stiffness.engine.ray", serial)
        Reader(here=True, heard=lambda: capsys.readouterr().out).read(page)

    @pytest.mark.slow
    @pytest.mark.usefixtures("folder")
    def test_its_commands_run_in_a_shell(self, page, capsys):
        """
        The same with bash, a process for each command, and Ray where nothing else is said.
        """
        if "bash" not in FENCE.findall(page.read_text()):
            pytest.skip("no commands")
        Reader(here=False, heard=lambda: capsys.readouterr().out).read(page)


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_no_block_goes_by_another_name(self, page):
        """
        A language that is not known here would never be run; a skipped block has its reason.
        """
        text = page.read_text()
        languages = {
            info for info in FENCE.findall(text) if 'exec="' not in info
        }  # run by `mkdocs build`

        assert languages <= {*RUN, *WRITTEN, *SHOWN}
        assert len(re.findall(r"skip: next\b", text)) == len(re.findall(r'skip: next "\w', text))
        assert "skip: start" not in text

    @pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "cluster/README.md"])
    def test_links_of_pages_outside_the_site(self, name):
        """
        `mkdocs build --strict` looks after the site; these lead to files that are there.
        """
        page = ROOT / name
        tokens = MarkdownIt().parse(page.read_text())
        inline = [child for token in tokens for child in token.children or ()]
        links = [str(token.attrs.get("href") or token.attrs.get("src", "")) for token in inline]
        local = [link.partition("#")[0] for link in links if link and "://" not in link]

        assert [link for link in local if not (page.parent / link).exists()] == []

    def test_every_public_name_is_in_the_reference(self):
        """
        Those of the analysis and the figures are listed by the pages themselves.
        """
        pages = (ROOT / "docs/reference").glob("*.md")
        text = "\n".join(page.read_text() for page in pages)
        documented = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", text, re.M)}

        assert set(distributed_stiffness.__all__) <= documented
