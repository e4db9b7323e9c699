"""The report: valid HTML that holds everything and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
from pathlib import Path

import pytest
import xarray as xr
from analysis.synthetic import Synthetic, write

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.errors import StoreError
from distributed_stiffness.figures import VIEWS, draw_all
from distributed_stiffness.report import findings, present, write_report
from distributed_stiffness.report import page as report_page

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects tags and text, and holds that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ds = Synthetic(n_examples=32, n_superclasses=2, learning_rates=(1e-3, 1e-2)).build()
    ds.attrs["title"] = "Cats <b>&</b> dogs"
    return write(ds, tmp_path_factory.mktemp("report") / "study.zarr")


@pytest.fixture(scope="module")
def numbers(store: Path) -> Summary:
    return summary(xr.open_zarr(store))


@pytest.fixture(scope="module")
def figures(numbers: Summary, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return draw_all(numbers, tmp_path_factory.mktemp("figures"))


@pytest.fixture(scope="module")
def text(numbers: Summary, figures: dict[str, Path], store: Path, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    assert write_report(numbers, figures, path, store=str(store)) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


class TestReport:
    def test_figures(self, page: Page, figures: dict[str, Path]):
        """Every figure is in the page, whole, with a text in its place for who cannot see it."""
        images = page.all("img")

        held = {base64.b64decode(str(image["src"]).partition("base64,")[2]) for image in images}
        assert held == {path.read_bytes() for path in figures.values()}
        assert all(image["alt"] for image in images)

    def test_no_network(self, page: Page):
        """Nothing is loaded from anywhere: no style sheet, no foreign script, no address."""
        for tag, attrs in page.tags:
            assert tag not in {"link", "iframe", "object"}
            for name in ("src", "href"):
                assert str(attrs.get(name, "#")).startswith(("#", "data:"))
        assert "url(" not in page.text
        assert "@import" not in page.text

    def test_only_its_own_script_runs(self, text: str):
        """The page's policy allows the script and the style that are in it, by hash, only."""
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
        for tag, directive in (("style", "style-src"), ('script type="module"', "script-src")):
            inline = re.search(rf"<{tag}>(.*?)</{tag.split()[0]}>", text, re.DOTALL)[1]
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"{directive} 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert not re.search(r"<[^>]* (style|on\w+)=", text)

    def test_findings(self, page: Page, numbers: Summary):
        """The findings are those that a command prints."""
        assert all(line in page.text for line in findings(numbers))

    def test_what_was_run(self, page: Page, store: Path):
        """Data, preprocessing, versions, revision and how to open the store are told."""
        for text in (
            "Each input is scaled to unit norm.",
            "0.001, 0.01",
            "0, 100 optimiser steps",
            "2024-01-01 00:10 UTC",
            "0" * 40,
            f'xarray.open_zarr("{store}")',
            '"optimizer": "adam"',
        ):
            assert text in page.text

    def test_numbers(self, page: Page, numbers: Summary):
        """Every checkpoint has its row in the tables."""
        within = numbers.within_between["sign"].sel(relation="within")

        assert all(f"{value:.2f}" in page.text for value in within.values.ravel())
        assert len(page.all("tr")) == 4 * (1 + 4)  # four tables: a head and four checkpoints

    def test_evidence(self, page: Page, store: Path):
        """The page says how exact its numbers are, and how to see for oneself."""
        for line in (
            "the largest difference from one-example float64 gradients",
            "the matrix is complete at every checkpoint",
            f"stiffness verify {store}",
        ):
            assert line in page.text

    def test_sections(self, text: str, figures: dict[str, Path]):
        """Figures stand below the section of their view, in the order of the views."""
        names = re.findall(r'<h3 class="section">(.*?)</h3>|<figure id="(.*?)">', text)

        section, found = "", []
        for title, name in names:
            section = title or section
            if name:
                found.append(name)
                assert VIEWS[name].section == section
        assert sorted(found) == sorted(figures)
        assert len({title for title, _ in names if title}) == len([t for t, _ in names if t])

    def test_escaped(self, page: Page):
        """Text from a store is text, never markup."""
        assert "Cats <b>&</b> dogs" in page.text
        assert not page.all("b")

    def test_small_store(self, tmp_path: Path):
        """A store with the least that there can be has a report too, straight from the data."""
        ds = Synthetic(n_examples=12, iterations=(5,)).build()
        ds = ds.drop_vars(["distance", "error_bound", "undecided", "train_loss"])
        ds.attrs = {"class_names": ds.attrs["class_names"]}

        written = Page(write_report(ds, {}, tmp_path / "report.html").read_text(encoding="utf-8"))

        assert "Stiffness study" in written.text
        assert not written.all("img")

    def test_matrix_too_large(self, numbers: Summary, tmp_path: Path, monkeypatch):
        """A page without room for the matrices has no heat map, and all the rest."""
        monkeypatch.setattr(report_page, "heat_maps", lambda _numbers: None)
        written = Page(write_report(numbers, {}, tmp_path / "r.html").read_text(encoding="utf-8"))

        assert not written.all("canvas")
        assert len(written.all("table")) == 4


class TestPresent:
    def test_everything(self, store: Path, numbers: Summary, tmp_path: Path):
        """From a path to figures, report and lines to print."""
        lines = present(str(store), tmp_path / "out")

        assert lines[: len(findings(numbers))] == findings(numbers)
        assert f"Report: {tmp_path / 'out' / 'report.html'}" in lines
        assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
        assert (tmp_path / "out" / "class_matrices_sign.png").exists()

    def test_no_store(self, tmp_path: Path):
        """A path without a store is refused in words."""
        with pytest.raises(StoreError, match="there is no store at"):
            present(str(tmp_path / "none.zarr"), tmp_path / "out")
