"""What nobody gave is not said, and names are drawn as they were given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic
from matplotlib.figure import Figure
from matplotlib.text import Text

from distributed_stiffness.analysis import Summary, paired_curves, summary
from distributed_stiffness.figures import VIEWS, save
from distributed_stiffness.figures.checkpoints import Names
from distributed_stiffness.figures.style import in_one_line

AWKWARD = ("$x_$", "$5 & $6", r"\frac{1", "100 %", "a_b^c {d}", "<script>", "~#&")


def imported(**changes: Sequence[float]) -> xr.Dataset:
    """A store of networks that were trained elsewhere: nobody knows their epochs."""
    given = {"learning_rates": (0.0,), "seeds": (0,), "iterations": (0,)} | changes
    return Synthetic(n_examples=24, **given).build().drop_vars("epoch")  # type: ignore[arg-type]


def with_class_names(names: Sequence[str]) -> xr.Dataset:
    """A store whose classes have these names."""
    ds = Synthetic(n_examples=6 * len(names), n_classes=len(names), n_superclasses=2).build()
    of = np.asarray(names)[ds["label"].values]
    above = np.asarray(names)[ds["superclass"].values]
    named = {"class_name": of, "superclass_name": above}
    coordinates = {name: ("example", values) for name, values in named.items()}
    coordinates |= {f"other_{name}": ("other", values) for name, values in named.items()}
    ds = ds.assign_coords(coordinates)
    return ds.assign_attrs(
        class_names=json.dumps(list(names)), superclass_names=json.dumps(list(names[:2]))
    )


def figures(numbers: Summary) -> Iterator[tuple[str, Figure]]:
    for name, view in VIEWS.items():
        if view.is_of(numbers):
            yield name, view.draw(numbers)


def texts(figure: Figure) -> list[str]:
    """Every text that is seen in a figure, once it has been drawn."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text.get_text() for text in found if text.get_visible() and text.get_text()]


class TestNames:
    def test_a_training_of_ours_has_everything(self):
        """Its step 0 is before training, and one seed is its seed."""
        ds = Synthetic(n_examples=12, iterations=(0,)).build()
        names = Names.of(ds)

        assert names.place({"learning_rate": 1e-3, "seed": 0, "iteration": 0}) == (
            "learning rate 0.001, seed 0, step 0"
        )
        assert names.stage_title(ds["cosine"][0, 0, 0]).startswith("step 0, before training")
        assert names.steps == "optimiser steps"

    def test_one_checkpoint_of_others_has_nothing_but_its_accuracy(self):
        """Neither rate nor seed nor step of a single file was given."""
        ds = imported()
        ds = ds.assign_coords(validation_accuracy=ds["validation_accuracy"])
        names = Names.of(ds)

        assert names.place({"learning_rate": 0.0, "seed": 0, "iteration": 0}) == ""
        assert names.stage_title(ds["cosine"][0, 0, 0]) == "validation accuracy 10 %"

    def test_what_tells_checkpoints_apart_is_said(self):
        """Step 0 among others is step 0, though nobody says that it is before training."""
        ds = imported(learning_rates=(0.0, 0.1), seeds=(0, 3), iterations=(0, 100))
        names = Names.of(ds)

        assert names.rate_title(0.0) == "learning rate not given"
        assert names.place({"learning_rate": 0.1, "seed": 0, "iteration": 0}) == (
            "learning rate 0.1, seed 0, step 0"
        )
        assert names.stage_title(ds["cosine"][0, 0, 0]) == "step 0"

    def test_one_seed_that_was_given_is_said(self):
        """No seed but 0 stands for a seed that was not given."""
        assert Names.of(imported(seeds=(3,))).place({"seed": 3}) == "seed 3"


class TestFigures:
    @pytest.mark.parametrize("iterations", [(0,), (100, 200)], ids=str)
    def test_no_figure_says_what_was_not_given(self, iterations: tuple[int, ...]):
        """No learning rate, no step 0, no training of which nothing is known."""
        for name, figure in figures(summary(imported(iterations=iterations))):
            said = "\n".join(texts(figure))
            assert "not given" not in said, name
            assert "before training" not in said, name
            assert "optimiser" not in said, name
            if len(iterations) == 1:
                assert "step" not in said, name
                assert "over training" not in said, name

    def test_steps_are_spaced_as_is_said(self):
        """An axis is called logarithmic where it is."""
        for iterations, spaced in (((100, 200), False), ((0, 1, 1000), True)):
            numbers = summary(Synthetic(n_examples=12, iterations=iterations).build())
            said = texts(VIEWS["stiffness_curves"].draw(numbers))
            assert ("optimiser steps, spaced like a logarithm" in said) == spaced
            assert ("optimiser steps" in said) != spaced

    def test_a_curve_that_is_not_known_has_no_entry(self):
        """Where no training loss is known no legend speaks of one."""
        ds = imported(iterations=(100, 200))
        unknown = {name: ds[name] * np.nan for name in ("train_loss", "train_accuracy")}
        ds = ds.assign(unknown)
        figure = VIEWS["stiffness_curves"].draw(summary(ds))

        assert "validation" in texts(figure)
        assert "training" not in texts(figure)


class TestNamesInFigures:
    def test_class_names_are_drawn_as_they_are(self, tmp_path: Path):
        """Dollars, backslashes, percents, underscores, carets, braces: no formula, no failure.

        Outside of the project's style too, as when a notebook saves the figure.
        """
        numbers = summary(with_class_names(AWKWARD))
        for name, figure in figures(numbers):
            figure.savefig(tmp_path / f"{name}.png")
            if name.startswith("class_matrices"):
                assert set(AWKWARD) <= set(texts(figure))
                figure.savefig(tmp_path / f"{name}.svg")
                figure.savefig(tmp_path / f"{name}.pdf")
            if name.startswith("superclass_matrices"):
                assert set(AWKWARD[:2]) <= set(texts(figure))

    def test_names_of_data_and_models_are_no_formulas(self):
        """A path with dollars stands in the line below the title."""
        ds = Synthetic(n_examples=12).build().assign_attrs(dataset="npz:$HOME/$x_.npz", model="$m$")
        for name, figure in figures(summary(ds)):
            lines = [line for line in texts(figure) if "npz:$HOME/$x_.npz  ·  $m$" in line]
            if name != "permuted":
                assert lines, name

    def test_titles_of_two_studies_are_no_formulas(self, tmp_path: Path):
        """Titles that are typed by hand name the curves."""
        ds = Synthetic(n_examples=12).build()
        first, second = (ds.assign_attrs(title=title) for title in ("Cost $1 vs $2", r"\alpha^{"))
        figure = VIEWS["permuted"].draw(summary(first, against=second))
        figure.savefig(tmp_path / "x.png")

        assert "Cost $1 vs $2 minus \\alpha^{" in texts(figure)
        assert paired_curves(first, second)["study_name"].values.tolist() == [
            "Cost $1 vs $2",
            r"\alpha^{",
        ]

    def test_a_name_stays_in_its_line(self):
        """What ends a line, or is no sign, is drawn as a sign of its own; all else stays."""
        assert in_one_line("a\nb") == "a↵b"
        assert in_one_line("caf\udce9\x07") == "caf��"
        assert in_one_line("x" * 20 + "y" * 20, most=9) == "xxxxx…yyy"
        for name in ("", "nan", "日本語", "🦊", "e\u0301", "a\u00a0b", "x" * 300, *AWKWARD):
            assert in_one_line(name) == name

    def test_signs_that_no_font_has_are_no_failure(self, tmp_path: Path):
        """A box stands for an emoji; warnings are errors here."""
        for name, figure in figures(summary(with_class_names(("🦊", "日本語", "a\nb", "")))):
            saved = save(figure, tmp_path / f"{name}.png")
            assert saved.read_bytes().startswith(b"\x89PNG")

    def test_long_names_leave_room_for_the_matrix(self):
        """Of three hundred letters beginning and end are drawn; warnings are errors here."""
        numbers = summary(with_class_names(("a" * 300, "b" * 299 + "c", "d", "e")))
        figure = VIEWS["class_matrices_sign"].draw(numbers)

        assert f"{'b' * 21}…{'b' * 9}c" in texts(figure)
        figure.draw_without_rendering()
        assert figure.axes[0].get_window_extent().width > 100

    def test_powers_of_ten_are_written_without_formulas(self):
        """Logarithmic axes have ticks such as 10⁻²."""
        numbers = summary(Synthetic(n_examples=48).build())
        said = texts(VIEWS["spectrum"].draw(numbers))

        assert "10⁻¹" in said
        assert not any("$" in text for text in said)
