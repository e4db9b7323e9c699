"""Every figure as a PNG, without a display and without pyplot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import summary
from distributed_stiffness.figures import draw_all


class TestDrawAll:
    def test_files(self, tmp_path: Path):
        """Each figure that there are numbers for is a PNG of its name."""
        ds = Synthetic(n_examples=24, n_superclasses=2).build()
        paths = draw_all(ds, tmp_path / "new")

        assert set(paths) == {
            "class_matrices_sign",
            "class_matrices_cosine",
            "superclass_matrices_sign",
            "superclass_matrices_cosine",
            "stiffness_curves",
            "distance_profile",
            "neighbours",
            "spectrum",
            "teaching_examples",
        }
        for name, path in paths.items():
            assert path == tmp_path / "new" / f"{name}.png"
            assert path.read_bytes().startswith(b"\x89PNG")

    def test_without_extras(self, tmp_path: Path):
        """Without super-classes and distances the others are drawn, from a summary too."""
        numbers = summary(Synthetic(n_examples=12).build().drop_vars("distance"))

        assert set(draw_all(numbers, tmp_path)) == {
            "class_matrices_sign",
            "class_matrices_cosine",
            "stiffness_curves",
            "neighbours",
            "spectrum",
            "teaching_examples",
        }

    def test_style_stays_inside(self, tmp_path: Path):
        """Drawing changes no setting of the caller's."""
        before = dict(matplotlib.rcParams)
        draw_all(Synthetic(n_examples=12).build(), tmp_path)

        assert dict(matplotlib.rcParams) == before

    def test_no_pyplot(self):
        """No window system and no pyplot is needed, whatever backend is set."""
        code = (
            "import sys, distributed_stiffness.figures; print('matplotlib.pyplot' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"MPLBACKEND": "tkagg"},
        )

        assert done.stdout.strip() == "False"
