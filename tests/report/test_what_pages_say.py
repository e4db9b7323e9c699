"""The report says what is known, warns of what is not certain, and is silent on the rest."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import summary
from distributed_stiffness.report import findings, write_report
from distributed_stiffness.report.evidence import evidence, uncertain
from distributed_stiffness.report.tables import tables


def imported(**changes: object) -> xr.Dataset:
    """A store of networks that were trained elsewhere, on data of the user's own."""
    given = {"learning_rates": (0.0,), "seeds": (0,), "iterations": (0,)} | changes
    ds = Synthetic(n_examples=24, **given).build().drop_vars("epoch")  # type: ignore[arg-type]
    training = {"imported": True, "learning_rates": [0.0], "seeds": [0], "epochs": 10.0}
    study = {"training": training, "gradients": {"precision": "float32"}}
    check = {"classes": 4, "examples": 24, "largest_difference": 1e-6}
    check |= {"learning_rate": 0.0, "seed": 0, "iteration": int(ds["iteration"][-1])}
    return ds.assign_attrs(
        dataset="mine:load",
        dataset_source="Made by mine:load.",
        dataset_verified=0,
        study=json.dumps(study),
        whole_matrix_check=json.dumps(check),
    )


def page_of(ds: xr.Dataset, folder: Path) -> str:
    return write_report(ds, {}, folder / "report.html", store="s.zarr").read_text()


def seen(page: str) -> str:
    """What a reader sees of a page, without the controls that its script shows or leaves out."""
    page = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r'<div class="slider">.*?</div>', "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def with_bounds(ds: xr.Dataset, *bounds: float, precision: str = "float32") -> xr.Dataset:
    """The same store with these error bounds at its iterations."""
    values = xr.DataArray(np.array(bounds)[None, None], dims=ds["error_bound"].dims)
    study = {"gradients": {"precision": precision}}
    return ds.assign(error_bound=values).assign_attrs(study=json.dumps(study))


class TestOneCheckpoint:
    def test_nothing_that_was_not_given_is_said(self, tmp_path: Path):
        """No rate, no seed, no step, no training before or over which anything is."""
        said = seen(page_of(imported(), tmp_path)).partition("The study")[0]

        for word in ("not given", "learning rate ", "seed ", "step 0", "before training", "epoch"):
            assert word not in said.lower(), word
        assert "Iterations" not in said
        assert "checksums" not in said
        assert "of this network." in said
        assert "mine:load, Made by" not in said

    def test_findings_begin_with_what_is_known(self):
        """The accuracy, where it is; else what was found."""
        lines = findings(summary(imported()))

        assert lines[0].startswith("Validation accuracy 10 %: sign stiffness within a class")
        assert "Two examples of one class " in lines[0]
        assert lines[1].startswith("Sign stiffness")
        assert not any("step" in line or "rate" in line for line in lines)

    def test_evidence_names_no_checkpoint(self):
        """There is but one: nothing is at most, or at every checkpoint."""
        said = evidence(summary(imported()))

        assert said["Error bound of a cosine"].startswith("1.0e−6: the largest difference")
        assert said["All pairs at once"].startswith("the mean cosines of 4 classes")
        assert said["Missing pairs"] == "none: the matrix is complete."

    def test_tables_have_no_empty_columns(self):
        """Columns that tell nothing apart, or hold no number, are left out."""
        ds = imported()
        ds = ds.assign({name: ds[name] * np.nan for name in ("train_loss", "train_accuracy")})
        heads = {table.title: [text for _, text in table.head] for table in tables(summary(ds))}

        assert heads["Loss and accuracy"] == ["validation loss", "validation accuracy"]
        for head in heads.values():
            assert not {"learning rate", "seed", "step"} & set(head)

    def test_how_it_would_be_trained_is_not_said(self, tmp_path: Path):
        """A study of checkpoints has an optimiser's defaults that nobody used."""
        assert '"epochs"' not in page_of(imported(), tmp_path)

    def test_a_part_of_a_store_keeps_its_place(self):
        """One step of a training is that step, though it is no dimension any more."""
        ds = Synthetic(n_examples=24, iterations=(0, 100)).build().isel(iteration=1)
        numbers = summary(ds)

        assert "learning rate 0.001, from" not in findings(numbers)[0].lower()
        assert findings(numbers)[0].startswith("Learning rate 0.001, step 100 (validation accuracy")
        assert tables(numbers)[-1].rows[0][2].text == "100"


class TestSeveralCheckpoints:
    def test_steps_are_said_and_no_rate(self):
        """What tells them apart, and nothing else."""
        lines = findings(summary(imported(iterations=(100, 200))))

        assert lines[0].startswith("From step 100 (validation accuracy ")
        assert lines[1].startswith("Step 200: sign stiffness")
        assert not any("learning rate" in line for line in lines)

    def test_a_mean_over_seeds_is_said_without_a_rate(self):
        """Seeds tell runs apart."""
        lines = findings(summary(imported(iterations=(100,), seeds=(0, 1))))

        assert lines[0].startswith("Mean of 2 seeds, step 100 (validation accuracy")

    def test_a_training_of_ours_says_everything(self, tmp_path: Path):
        """Rate, seed and step, and that step 0 is before training."""
        said = seen(page_of(Synthetic(n_examples=24, iterations=(0, 100)).build(), tmp_path))

        for line in ("Learning rate 0.001, from step 0", "0, 100 optimiser steps", "Training"):
            assert line in said
        assert "these networks." in said

    def test_one_class_alone(self):
        """Where no pair is between classes, nothing is said of such pairs."""
        ds = imported(n_classes=1)
        lines = findings(summary(ds))

        assert "within a class" in lines[0]
        assert "between" not in lines[0]
        assert "different classes" not in lines[0]


class TestUncertain:
    @pytest.mark.parametrize(
        ("precision", "bounds", "warned"),
        [
            ("float32", (1e-6, 0.0101), [200]),
            ("float32", (3.2, np.inf), [100, 200]),
            ("float32", (0.0099, np.nan), []),
            ("bf16x3", (0.05, 0.0), [100]),
            ("bf16", (0.05, 0.11), [200]),
            ("tf32", (0.05, 0.099), []),
        ],
    )
    def test_each_checkpoint_above_what_is_allowed_has_a_line(
        self, precision: str, bounds: tuple[float, float], warned: list[int]
    ):
        """0.01, or 0.1 where gradients have few digits; what was not checked has none."""
        ds = with_bounds(imported(iterations=(100, 200)), *bounds, precision=precision)
        lines = uncertain(summary(ds))

        assert len(lines) == len(warned)
        for line, step in zip(lines, warned, strict=True):
            assert line.startswith(f"WARNING: the error bound of a cosine at step {step} is ")
            assert f"above the {0.1 if precision in ('bf16', 'tf32') else 0.01:g}" in line

    def test_it_stands_in_red_before_everything(self, tmp_path: Path):
        """On the page as in the lines that a command prints."""
        ds = with_bounds(imported(), 3.2)
        page = page_of(ds, tmp_path)
        (line,) = uncertain(summary(ds))

        assert line.startswith("WARNING: the error bound of a cosine is 3.2, above the 0.01")
        assert f'<p class="warning" role="alert">{line}</p>' in page
        assert page.index('class="warning"') < page.index('<ul class="findings">')
        assert re.search(r"\.warning \{ color: var\(--alarm\)", page)
        assert findings(summary(ds))[0] == line
        assert seen(page).count(line) == 1

    def test_that_it_was_let_pass_is_said(self):
        """A store says so in its attribute `allow_error`."""
        ds = with_bounds(imported(), 3.2)

        assert "--allow-error" not in uncertain(summary(ds))[0]
        assert "(--allow-error)" in uncertain(summary(ds.assign_attrs(allow_error=1)))[0]

    def test_a_certain_store_has_no_such_line(self, tmp_path: Path):
        """And the page has no place for one."""
        assert uncertain(summary(imported())) == []
        assert 'class="warning"' not in page_of(imported(), tmp_path)


class TestNames:
    def test_awkward_names_stand_as_they_are(self, tmp_path: Path):
        """In findings and in the heat map's names; nothing is run that a name says."""
        names = ["<script>alert(1)</script>", "$5 & $6", "a\"b'c", "x\ny\x07"]
        ds = imported()
        of = np.asarray(names)[ds["label"].values]
        ds = ds.assign_coords(class_name=("example", of), other_class_name=("other", of))
        page = page_of(ds.assign_attrs(class_names=json.dumps(names)), tmp_path)
        content = re.search(r'<script type="application/json" id="matrices">(.*?)</script>', page)

        assert content is not None
        assert json.loads(content[1])["matrices"][0]["names"] == names
        assert "<script>alert(1)" not in page
        assert all("\x07" not in line for line in findings(summary(ds)))

    def test_undecodable_names_are_no_failure(self, tmp_path: Path):
        """Names of folders may hold bytes that are no text."""
        ds = imported().assign_attrs(title="caf\udce9", dataset="images:/caf\udce9")

        assert "caf\\udce9" in page_of(ds, tmp_path)
