"""What is installed: a wheel that holds the package, all of it, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = "distributed_stiffness"


def run(*command: str | Path, **options: object) -> str:
    """Run a command; its output, or its errors where it fails."""
    ended = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, **options
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an archive: a copy of the tree, without git and so without tags."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (PACKAGE, "tests", "jobs", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run(sys.executable, "-m", "pip", "wheel", source, *options, "-w", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


class TestWheel:
    def test_it_holds_the_package_and_nothing_else(self, wheel):
        """
        Every file of the package's folder is there, of whatever kind; no test, job or page is.
        """
        files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        tree = {
            str(path.relative_to(ROOT))
            for path in (ROOT / PACKAGE).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

        assert files == tree
        data = ("py.typed", "report/page.html", "figures/style.mplstyle")
        assert files >= {f"{PACKAGE}/{name}" for name in data}

    def test_what_it_says_of_itself(self, wheel):
        """
        Licence, command, and the version of an archive, which is that of CITATION.cff.
        """
        archive = zipfile.ZipFile(wheel)
        info = f"{wheel.name.split('-py3')[0]}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
        fallback = settings["tool"]["setuptools_scm"]["fallback_version"]
        cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]

        assert f"\nVersion: {fallback}\n" in metadata
        assert fallback.removesuffix(".dev0") == cited
        assert "\nLicense-Expression: MIT\n" in metadata
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        assert "stiffness = distributed_stiffness.cli:main" in (
            archive.read(f"{info}/entry_points.txt").decode()
        )

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_it_works_where_nothing_else_of_ours_is(self, wheel, tmp_path):
        """
        In a virtual environment of its own, whose dependencies alone are those of this one.
        """
        venv.create(tmp_path / "venv", with_pip=True)
        python = tmp_path / "venv/bin/python"
        home = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # A path file's folders are not searched for path files: an editable install stays out.
        Path(home, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
        elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": ""}}
        stiffness = tmp_path / "venv/bin/stiffness"

        where = run(python, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", **elsewhere)
        assert where.startswith(home)
        assert "demo" in run(stiffness, "--help", **elsewhere)
        demo = run(stiffness, "demo", "--engine=serial", "--store=x.zarr", **elsewhere)
        assert "x/report.html" in demo
        assert "no fault; complete" in run(stiffness, "verify", "x.zarr", **elsewhere)
