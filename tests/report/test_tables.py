"""Tables to copy: every digit for software, few for people; and the evidence beside them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.report.evidence import evidence
from distributed_stiffness.report.tables import Table, tables
from distributed_stiffness.report.words import measured


@pytest.fixture(scope="module")
def numbers() -> Summary:
    made = Synthetic(n_examples=32, learning_rates=(1e-3, 1e-2), seeds=(0, 1), zero_gradients=(3,))
    return summary(made.build())


@pytest.fixture(scope="module")
def by_name(numbers: Summary) -> dict[str, Table]:
    return {table.name: table for table in tables(numbers)}


def column(table: Table, name: str) -> list[dict[str, object]]:
    k = [head for head, _ in table.head].index(name)
    return [json.loads(row[k].csv) for row in table.rows]


class TestTables:
    def test_one_row_a_checkpoint(self, by_name: dict[str, Table]):
        """Means over seeds have a row for each rate and step, the others one for each seed too."""
        rows = {name: len(table.rows) for name, table in by_name.items()}

        assert rows == {"stages": 4, "lengths": 8, "training": 8, "exactness": 8}
        assert all(len(r) == len(table.head) for table in by_name.values() for r in table.rows)

    def test_every_digit(self, numbers: Summary, by_name: dict[str, Table]):
        """A CSV has the means, their errors over examples and over seeds, unrounded."""
        seeds = numbers.within_between["sign"].sel(relation="within")
        found = column(by_name["stages"], "sign_within")

        np.testing.assert_allclose(
            [cell[""] for cell in found], seeds.values.mean(1).ravel(), rtol=1e-12
        )
        np.testing.assert_allclose(
            [cell["_seed_error"] for cell in found],
            (seeds.values.std(1, ddof=1) / np.sqrt(2)).ravel(),
            rtol=1e-9,
        )
        assert all(cell["_error"] > 0 for cell in found)

    def test_few_for_people(self, numbers: Summary, by_name: dict[str, Table]):
        """A table shows each length with its error; a copy has the ends of its interval too."""
        length = numbers.critical_length.isel(learning_rate=0, seed=1, iteration=1)
        cell = by_name["lengths"].rows[3][6]
        values = column(by_name["lengths"], "cosine_length")[3]

        assert cell.text.startswith(measured(length, "cosine_length"))
        assert values[""] == float(length["cosine_length"])
        assert values["_inside"] == bool(length["cosine_inside"])
        ends = column(by_name["lengths"], "cosine_length_interval")[3]
        assert ends["_low"] == float(length["cosine_length_low"])

    def test_unknown_is_null(self, numbers: Summary):
        """What is not known is an empty field, not a word."""
        curves = numbers.curves.assign(error_bound=numbers.curves["error_bound"] * np.nan)
        [table] = [t for t in tables(replace(numbers, curves=curves)) if t.name == "exactness"]

        assert all(cell == {"": None} for cell in column(table, "error_bound"))
        assert table.rows[0][3].text == "–"

    def test_zero_gradients(self, by_name: dict[str, Table]):
        """Examples without a gradient are counted at every checkpoint."""
        assert [cell[""] for cell in column(by_name["exactness"], "zero_gradients")] == [1] * 8


class TestEvidence:
    def test_whole_matrix(self, numbers: Summary):
        """The check of all pairs at once says where it was made and what came of it."""
        check = {
            "learning_rate": 1e-2,
            "seed": 1,
            "iteration": 4100,
            "classes": 10,
            "examples": 500,
            "largest_difference": 8.22e-7,
        }
        said = evidence(replace(numbers, attrs={"whole_matrix_check": check}))

        text = said["All pairs at once"]
        assert "learning rate 0.01, seed 1, step 4,100" in text
        assert "10 classes (500 examples)" in text
        assert "within 8.2e−7" in text

    def test_not_compared_yet(self, numbers: Summary):
        """A study that is not finished says that it was not compared."""
        assert evidence(numbers)["All pairs at once"].startswith("not compared yet")

    def test_worst_checkpoint(self, numbers: Summary):
        """The largest bound and the most open signs are named with their checkpoint."""
        bounds = numbers.curves["error_bound"].copy()
        bounds[0, 1, 1] = 3e-5
        undecided = numbers.curves["undecided"].copy()
        undecided[1, 0, 0] = 7
        share = undecided / (32 * 31 / 2)
        curves = numbers.curves.assign(
            error_bound=bounds, undecided=undecided, undecided_share=share
        )
        said = evidence(replace(numbers, curves=curves))

        assert "3.0e−5 (learning rate 0.001, seed 1, step 100)" in said["Error bound of a cosine"]
        assert said["Undecided signs"].startswith(
            "7 pairs at most (1.4 % of all, learning rate 0.01, seed 0, step 0)"
        )

    def test_missing_pairs(self):
        """Pairs that are not computed yet are counted."""
        ds = Synthetic(n_examples=16, iterations=(0,)).build()
        ds["cosine"][..., :4, :] = np.nan

        assert evidence(summary(ds))["Missing pairs"].startswith("60 (25 %)")
        assert evidence(summary(Synthetic(n_examples=16).build()))["Missing pairs"].startswith(
            "none"
        )
