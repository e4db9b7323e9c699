"""Findings: every number and every direction follows from the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.report import findings
from distributed_stiffness.report.findings import effect
from distributed_stiffness.report.words import measured, number


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


def with_contrast(study: Summary, inside: float, across: float, error: float) -> Summary:
    """The same study with other means inside super-classes and across, at every checkpoint."""
    assert study.superclass_contrast is not None
    changed = study.superclass_contrast.copy(deep=True)
    changed["sign"].values[:] = (inside, across)
    changed["sign_contrast"].values[:] = inside - across
    changed["sign_contrast_error"].values[:] = error
    return replace(study, superclass_contrast=changed)


def critical_line(study: Summary, *, sign: tuple[float, ...], inside: bool) -> str:
    """The sentence on ξ, with ξ, error and interval of the sign as given and none of the cosine."""
    assert study.critical_length is not None
    length = study.critical_length.copy(deep=True)
    for name, value in zip(("", "_error", "_low", "_high"), sign, strict=True):
        length[f"sign_length{name}"].values[:] = value
    length["sign_inside"].values[:] = inside
    length["cosine_length"].values[:] = np.nan
    lines = findings(replace(study, critical_length=length))
    return next(line for line in lines if "critical length" in line)


class TestFindings:
    def test_numbers(self, study: Summary):
        """The first sentence of a learning rate holds its means at the first and last stage."""
        line = findings(study)[0]

        means = study.within_between.isel(learning_rate=0, seed=0)
        for relation, where in (("within", "within a class"), ("between", "between classes")):
            of_relation = means.sel(relation=relation)
            first, last = (measured(of_relation.isel(iteration=k), "sign") for k in (0, 1))
            assert f"{where} {first} → {last}" in line
            assert " ± " in first
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
        matrix = study.class_matrix.isel(learning_rate=0, seed=0, iteration=1)
        names, cells = matrix["class_name"].values, matrix["sign"].values
        line = next(line for line in findings(study) if "highest for" in line)
        within = np.diag(cells)

        def cell(a: int, b: int) -> str:
            return measured(matrix.isel(class_name=a, other_class_name=b), "sign")

        best, worst = within.argmax(), within.argmin()
        assert f"highest for {names[best]} ({cell(best, best)})" in line
        assert f"lowest for {names[worst]} ({cell(worst, worst)})" in line
        between = np.where(np.eye(len(cells), dtype=bool), np.nan, cells)
        (a, b), (c, d) = (
            np.unravel_index(at, cells.shape)
            for at in (np.nanargmax(between), np.nanargmin(between))
        )
        assert f"({cell(a, b)}) and lowest" in line
        assert line.endswith(f"({cell(c, d)}).")

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
        """Whether super-classes show is read from their contrast."""
        lines = findings(with_contrast(study, inside, across, error=0.01))

        assert any(said in line for line in lines)
        difference = number(inside - across)
        assert any(f"(difference {difference} ± 0.01; p = " in line for line in lines)

    def test_uncertain_superclasses(self, study: Summary):
        """A contrast within two of its errors is none."""
        lines = findings(with_contrast(study, 0.5, 0.1, error=0.25))

        assert any("super-classes make no difference" in line for line in lines)

    @pytest.mark.parametrize(
        ("gap", "said"),
        [
            (0.5, "is larger within a class than between classes (gap 0.50 ± 0.10)"),
            (-0.5, "is smaller within a class than between classes (gap −0.50 ± 0.10)"),
            (0.19, "is as large within a class as between classes, as far as its errors can tell"),
        ],
    )
    def test_gap(self, study: Summary, gap: float, said: str):
        """Within is called larger than between only where the gap exceeds two errors."""
        changed = study.within_between.copy(deep=True)
        changed["sign_gap"].values[:] = gap
        changed["sign_gap_error"].values[:] = 0.1

        assert any(said in line for line in findings(replace(study, within_between=changed)))

    def test_uncertain_mean(self, study: Summary):
        """A mean within two of its errors is called no effect."""
        changed = with_means(study, sign=(0.4, -0.4))
        changed.within_between["sign_error"].values[:] = 0.3
        line = findings(changed)[0]

        assert "two examples of one class help as often as they harm each other" in line

    def test_critical_length(self, study: Summary):
        """ξ has its error and interval, an extrapolation is called one; so is what is not known."""
        line = critical_line(study, sign=(0.5, 0.02, 0.46, 0.55), inside=True)
        assert "sign 0.50 ± 0.02, two errors reach from 0.46 to 0.55; cosine" in line
        assert "cosine not determined (slope " in line

        outside = critical_line(study, sign=(2.5, 0.2, 2.2, 3.1), inside=False)
        assert study.critical_length is not None
        low, high = (
            number(float(study.critical_length[f"{end}_distance"][0, 0, 0]))
            for end in ("lowest", "highest")
        )
        assert (
            "sign 2.50 ± 0.20, two errors reach from 2.20 to 3.10, an extrapolation: the distances"
            f" that occur are {low} to {high};"
        ) in outside

    def test_critical_length_of_some_seeds(self):
        """Where only some seeds have a ξ it is said how many."""
        numbers = summary(Synthetic(n_examples=40, n_classes=2, seeds=(0, 1, 2)).build())
        assert numbers.critical_length is not None
        length = numbers.critical_length.copy(deep=True)
        length["sign_length"].values[:] = [[[0.5], [0.7], [np.nan]]]
        lines = findings(replace(numbers, critical_length=length))

        assert any("sign with 2 of 3 seeds 0.60" in line for line in lines)

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
        assert "learning rate 0.01, step 100" in said[0]

    def test_certain_signs(self, study: Summary):
        """Certainty is claimed of checked checkpoints alone."""
        curves = study.curves.copy(deep=True)
        curves["undecided_share"].values[0, 0, 0] = np.nan

        assert any("every sign is certain." in line for line in findings(study))
        lines = findings(replace(study, curves=curves))
        assert any("that were checked (1 was not)" in line for line in lines)

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


@pytest.mark.parametrize(
    ("error", "seeds", "text"),
    [
        (0.1, None, "0.50 ± 0.10"),
        (0.0034, None, "0.500 ± 0.003"),
        (0.0, None, "0.50 ± 0.00"),
        (0.1, 0.02, "0.50 ± 0.10 (± 0.02)"),
        (np.nan, None, "0.50"),
    ],
)
def test_measured(error: float, seeds: float | None, text: str):
    """A number stands with its error, in digits that show it, and with that over seeds."""
    at = xr.Dataset({"sign": 0.5, "sign_error": error})
    assert measured(at if seeds is None else at.assign(sign_seed_error=seeds), "sign") == text


def test_effect_is_symmetric():
    """Turning the sign turns help into harm, and nothing else."""
    for value in (0.1, 0.5, 0.95):
        swapped = effect(value).replace("help", "#").replace("harm", "help").replace("#", "harm")
        assert effect(-value) == swapped
