"""Two stores pair by pair, against loops over the differences."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import deletion
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness.analysis import (
    paired_curves,
    paired_differences,
    reduced,
    summary,
    within_between,
)
from distributed_stiffness.errors import DataError

CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # differences of float32 cosines
AT = {"learning_rate": 0, "seed": 0, "iteration": 0}
STUDY = Synthetic(n_examples=18, n_classes=2, n_train=8, iterations=(0,), zero_gradients=(9,))


def like(first: xr.Dataset, **changes: object) -> xr.Dataset:
    """A store of the same examples, of other gradients."""
    other = replace(STUDY, **changes).build()
    random = np.random.default_rng(3)
    factor = random.uniform(-1, 1, other["cosine"].shape).astype(np.float32)
    factor = (factor + np.swapaxes(factor, -1, -2)) / 2
    return other.assign(cosine=other["cosine"] * factor).assign_coords(
        {name: c for name, c in first.coords.items() if c.dims in (("example",), ("other",))}
    )


def differences(first: xr.Dataset, second: xr.Dataset, measure: str, splits: tuple[str, str]):
    """Pairs whose cosine is the difference of the measure, and who they are of."""
    a, who = deletion.block(first.isel(AT), *splits)
    b, _ = deletion.block(second.isel(AT), *splits)
    value = {"cosine": lambda c: c, "sign": lambda c: float(np.sign(c))}[measure]
    return [
        replace(p, cosine=value(p.cosine) - value(q.cosine), zero=p.zero or q.zero)
        for p, q in zip(a, b, strict=True)
    ], who


def statistics(found, measure: str) -> dict:
    """Means of cells within and between, and their gap, in loops."""
    cells: dict = {}
    for p in found:
        if not (measure == "cosine" and p.zero):
            cells.setdefault(p.classes, []).append(p.cosine)
    values = {name: math.fsum(some) / len(some) for name, some in cells.items()}
    within = [v for (a, b), v in values.items() if a == b]
    between = [v for (a, b), v in values.items() if a != b]
    means = {
        "within": math.fsum(within) / len(within),
        "between": math.fsum(between) / len(between),
    }
    return means | {"gap": means["within"] - means["between"]}


class TestPairedDifferences:
    @settings(max_examples=6)
    @given(
        measure=st.sampled_from(["cosine", "sign"]),
        splits=st.sampled_from([("validation", "validation"), ("train", "validation")]),
        zero=st.integers(0, 17),
    )
    def test_definition(self, measure: str, splits: tuple[str, str], zero: int):
        """Means, gap and errors are those of the differences of each pair, example by example."""
        first = STUDY.build()
        second = like(first, zero_gradients=(zero,), random_seed=1)
        found, who = differences(first, second, measure, splits)

        got = paired_differences(first, second, splits=splits).isel(AT).compute()
        expected = statistics(found, measure)
        errors = deletion.errors(
            lambda some: statistics(some, measure), found, deletion.strata(who, by_class=True)
        )
        for relation in ("within", "between"):
            at = got.sel(relation=relation)
            np.testing.assert_allclose(at[measure], expected[relation], **CLOSE)
            np.testing.assert_allclose(at[f"{measure}_error"], errors[relation], **CLOSE)
        np.testing.assert_allclose(got[f"{measure}_gap"], expected["gap"], **CLOSE)
        np.testing.assert_allclose(got[f"{measure}_gap_error"], errors["gap"], **CLOSE)

    def test_with_itself(self, made: xr.Dataset):
        """A store differs from itself by nothing, and that is known for certain."""
        got = paired_differences(made, made).compute()

        for name in got.data_vars:
            np.testing.assert_array_equal(got[name], 0)

    def test_order(self, made: xr.Dataset):
        """The other way round it is the same with the other sign."""
        other = made.assign(cosine=made["cosine"] ** 2)
        one, two = (paired_differences(*pair).compute() for pair in ((made, other), (other, made)))

        np.testing.assert_allclose(one["sign_gap"], -two["sign_gap"])
        np.testing.assert_allclose(one["cosine_error"], two["cosine_error"])

    def test_errors_are_narrower(self, made: xr.Dataset):
        """What both stores share is in no error: it is less than that of independent means."""
        other = made.assign(cosine=made["cosine"] * 0.8)
        error = paired_differences(made, other).compute()["cosine_error"]
        apart = [within_between(ds).compute()["cosine_error"] for ds in (made, other)]

        assert (error < 0.5 * np.hypot(*(e.values for e in apart))).all()

    def test_checkpoints_in_common(self, made: xr.Dataset):
        """Checkpoints are matched by their coordinates, whatever their order and number."""
        other = made.assign(cosine=made["cosine"] * 0.5)
        part = other.isel(iteration=[1], learning_rate=[1, 0])

        got = paired_differences(made, part).compute()
        xr.testing.assert_allclose(
            got, paired_differences(made, other).compute().isel(iteration=[1]), rtol=1e-9
        )

    def test_no_checkpoint_in_common(self, made: xr.Dataset):
        """Stores of other steps have nothing to subtract."""
        later = made.assign_coords(iteration=made["iteration"] + 1)

        with pytest.raises(DataError, match="no checkpoint in common"):
            paired_differences(made, later)

    def test_other_examples(self, made: xr.Dataset):
        """Other examples are refused, by the name of what differs."""
        other = made.assign_coords(example=made["example"] + 1, other=made["other"] + 1)

        with pytest.raises(DataError, match="differ in 'example'"):
            paired_differences(made, other)

    def test_permuted_training_labels(self, made: xr.Dataset):
        """Classes of training examples may differ, where validation pairs are compared."""
        names = made["class_name"].values.copy()
        names[:16] = np.roll(names[:16], 1)
        other = made.assign_coords(class_name=("example", names), other_class_name=("other", names))

        assert (paired_differences(made, other).compute()["cosine"] == 0).all()
        with pytest.raises(DataError, match=r"differ in 'class_name'.*take validation pairs"):
            paired_differences(made, other, splits=("train", "train"))

    def test_sums(self, made: xr.Dataset):
        """A store of sums has no pairs to subtract."""
        with pytest.raises(DataError, match="the second store keeps no pairs"):
            paired_differences(made, reduced(made))


class TestPairedCurves:
    def test_parts(self, made: xr.Dataset):
        """Both studies' means stand beside their difference."""
        other = made.assign(cosine=made["cosine"] * 0.5)
        got = paired_curves(made, other).compute()

        for study, ds in (("first", made), ("second", other)):
            expected = within_between(ds).compute()
            for name in ("sign", "cosine_error"):
                np.testing.assert_allclose(got[name].sel(study=study), expected[name])
        np.testing.assert_allclose(
            got["cosine_difference"],
            got["cosine"].sel(study="first") - got["cosine"].sel(study="second"),
            atol=1e-7,
        )

    @pytest.mark.parametrize(
        ("share", "name"), [(1.0, "permuted labels"), (0.5, "50 % of labels permuted")]
    )
    def test_names(self, made: xr.Dataset, share: float, name: str):
        """Studies are named by their labels."""
        study = [json.dumps({"data": {"permuted_labels": s}}) for s in (0.0, share)]
        stores = [made.assign_attrs(study=text) for text in study]

        assert paired_curves(*stores)["study_name"].values.tolist() == ["true labels", name]

    def test_titles(self, made: xr.Dataset):
        """Where labels do not tell them apart they are named by their titles, else by place."""
        titled = paired_curves(made, made.assign_attrs(title="Other"))["study_name"]

        assert titled.values.tolist() == ["Synthetic study", "Other"]
        same = paired_curves(made, made)["study_name"]
        assert same.values.tolist() == ["first store", "second store"]

    def test_summary(self, made: xr.Dataset):
        """A summary against another store holds them."""
        numbers = summary(made, against=made)

        assert numbers.paired is not None
        assert (numbers.paired["sign_difference"] == 0).all()
        assert summary(made).paired is None
