"""Findings: every number and every direction follows from the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.report import findings
from distributed_stiffness.report.findings import effect, number


@pytest.fixture(scope="module")
def study() -> Summary:
    ds = Synthetic(
        n_examples=40, n_superclasses=2, learning_rates=(1e-3, 1e-2), zero_gradients=(3,)
    ).build()
    return summary(ds)


def with_means(study: Summary, **means: tuple[float, float]) -> Summary:
    """The same study with other means within and between classes, at every checkpoint."""
    changed = study.within_between.copy(deep=True)
    for measure, values in means.items():
        changed[measure].values[:] = values
    return replace(study, within_between=changed)


class TestFindings:
    def test_numbers(self, study: Summary):
        """The first sentence of a learning rate holds its means at the first and last stage."""
        line = findings(study)[0]

        sign = study.within_between["sign"].isel(learning_rate=0, seed=0)
        for relation, where in (("within", "within a class"), ("between", "between classes")):
            first, last = (number(float(v)) for v in sign.sel(relation=relation))
            assert f"{where} {first} → {last}" in line
        assert line.startswith("Learning rate 0.001, from step 0 (validation accuracy 10 %)")

    @pytest.mark.parametrize(
        ("means", "within", "between"),
        [
            ((0.95, -0.4), "nearly always help each other", "mostly harm each other"),
            ((-0.95, 0.4), "nearly always harm each other", "mostly help each other"),
            ((0.01, -0.02), "help as often as they harm", "help as often as they harm"),
            ((0.2, -0.2), "more often than they harm", "more often than they help"),
        ],
    )
    def test_direction(self, study: Summary, means: tuple[float, float], within: str, between: str):
        """The words follow the sign and the size of the numbers."""
        line = findings(with_means(study, sign=means))[0]
        of_one, of_two = line.split("two examples of one class ")[1].split(", and two of different")

        assert within in of_one
        assert between in of_two

    def test_classes(self, study: Summary):
        """The classes named are those with the extreme cells at the last stage."""
        matrix = study.class_matrix["sign"].isel(learning_rate=0, seed=0, iteration=1)
        names, cells = matrix["class_name"].values, matrix.values
        line = next(line for line in findings(study) if "highest for" in line)
        within = np.diag(cells)

        assert f"highest for {names[within.argmax()]} ({number(within.max())})" in line
        assert f"lowest for {names[within.argmin()]} ({number(within.min())})" in line
        between = cells[~np.eye(len(cells), dtype=bool)]
        assert f"({number(between.max())}) and lowest" in line
        assert line.endswith(f"({number(between.min())}).")

    def test_equal_classes(self, study: Summary):
        """Classes that are all alike are not ranked."""
        matrix = study.class_matrix.copy(deep=True)
        matrix["sign"].values[..., range(4), range(4)] = 1.0
        lines = findings(replace(study, class_matrix=matrix))

        assert any("within a class is 1.00 for every class; between" in line for line in lines)

    @pytest.mark.parametrize(
        ("inside", "across", "said"),
        [
            (0.5, 0.1, "are stiffer with each other"),
            (0.1, 0.5, "are less stiff with each other"),
            (0.1, 0.1, "make no difference"),
        ],
    )
    def test_superclasses(self, study: Summary, inside: float, across: float, said: str):
        """Whether super-classes show is read from the class matrix."""
        matrix = study.class_matrix.copy(deep=True)
        same = matrix["superclass_name"] == matrix["other_superclass_name"]
        matrix["sign"] = xr.where(same, inside, across).broadcast_like(matrix["sign"])
        lines = findings(replace(study, class_matrix=matrix))

        assert any(said in line for line in lines)

    def test_critical_length(self, study: Summary):
        """An extrapolated length stands in brackets, and one that is none is called so."""
        assert study.critical_length is not None
        length = study.critical_length.copy(deep=True)
        length["sign_length"].values[:] = 0.5
        length["sign_inside"].values[:] = False
        length["cosine_length"].values[:] = np.nan
        line = next(
            line
            for line in findings(replace(study, critical_length=length))
            if "critical length" in line
        )

        assert "sign (0.50); cosine none. In brackets: outside the observed distances" in line

    def test_unfinished(self, study: Summary):
        """A learning rate without a finished checkpoint says so, and missing pairs are counted."""
        relations, matrix = (
            ds.copy(deep=True) for ds in (study.within_between, study.class_matrix)
        )
        relations["sign"].values[1] = np.nan
        matrix["missing"].values[1] = matrix["pairs"].values[1]
        matrix["pairs"].values[1] = 0
        lines = findings(replace(study, within_between=relations, class_matrix=matrix))

        assert "Learning rate 0.01: no checkpoint is computed yet." in lines
        assert "50 % of the pairs are not computed yet and left out." in lines

    def test_open_signs(self, study: Summary):
        """The largest share of undecided pairs is named with its checkpoint."""
        curves = study.curves.copy(deep=True)
        curves["undecided_share"].values[1, 0, 1] = 0.0123
        lines = findings(replace(study, curves=curves))

        said = [line for line in lines if "1.2 % of all pairs" in line]
        assert len(said) == 1
        assert "step 100, learning rate 0.01" in said[0]

    def test_certain_signs(self, study: Summary):
        """Certainty is claimed of checked checkpoints alone."""
        curves = study.curves.copy(deep=True)
        curves["undecided_share"].values[0, 0, 0] = np.nan

        assert any("every sign is certain." in line for line in findings(study))
        lines = findings(replace(study, curves=curves))
        assert any("that were checked (1 were not)" in line for line in lines)

    def test_zero_gradients(self, study: Summary):
        """Zero gradients are mentioned."""
        assert any("1 example has a gradient of zero" in line for line in findings(study))

    def test_seeds(self):
        """Means over seeds are said to be that."""
        ds = Synthetic(n_examples=12, seeds=(0, 1, 2)).build()

        assert findings(summary(ds))[0].startswith("Learning rate 0.001 (mean of 3 seeds), from")

    def test_one_checkpoint(self):
        """With one checkpoint nothing is compared."""
        ds = Synthetic(n_examples=12, iterations=(50,)).build()
        line = findings(summary(ds))[0]

        assert "→" not in line
        assert line.startswith("Learning rate 0.001, step 50 (validation accuracy")


@pytest.mark.parametrize(
    ("value", "text"), [(0.934, "0.93"), (-0.21, "−0.21"), (-0.001, "0.00"), (float("nan"), "–")]
)
def test_number(value: float, text: str):
    """Numbers have two decimals, a true minus sign, and no minus before zero."""
    assert number(value) == text


def test_effect_is_symmetric():
    """Turning the sign turns help into harm, and nothing else."""
    for value in (0.1, 0.5, 0.95):
        swapped = effect(value).replace("help", "#").replace("harm", "help").replace("#", "harm")
        assert effect(-value) == swapped
