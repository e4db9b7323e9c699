"""Heat maps: one scale about 0, classes in order and named, stages and accuracies in the titles."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic, class_names

from distributed_stiffness.analysis import class_matrix
from distributed_stiffness.errors import DataError
from distributed_stiffness.figures import (
    class_matrices,
    learning_rate_matrices,
    superclass_matrices,
)
from distributed_stiffness.figures.checkpoints import stages


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return Synthetic(
        n_examples=40, learning_rates=(1e-3, 1e-2), iterations=(0, 10, 100), seeds=(0, 1)
    ).build()


@pytest.fixture(scope="module")
def many() -> xr.Dataset:
    """100 classes in 20 super-classes."""
    return Synthetic(n_examples=200, n_classes=100, n_superclasses=20, iterations=(0, 9)).build()


def panels(figure) -> list:
    return [ax for ax in figure.axes if ax.images]


def bar(figure):
    return next(ax for ax in figure.axes if not ax.images)


def names(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


class TestClassMatrices:
    def test_one_scale_about_zero(self, study: xr.Dataset):
        """All panels have one scale, symmetric about 0, that holds every value."""
        figure = class_matrices(study, "cosine")

        limits = {(ax.images[0].norm.vmin, ax.images[0].norm.vmax) for ax in panels(figure)}
        assert len(limits) == 1
        low, high = limits.pop()
        assert low == -high
        values = class_matrix(study)["cosine"].mean("seed")
        assert float(np.abs(values).max()) <= high <= 1

    def test_values(self, study: xr.Dataset):
        """What is shown is the class matrix of that learning rate, seed and stage."""
        figure = class_matrices(study, "sign", learning_rate=1e-2, seed=1)

        expected = class_matrix(study)["sign"].sel(learning_rate=1e-2, seed=1)
        for ax, step in zip(panels(figure), study["iteration"].values, strict=True):
            np.testing.assert_array_equal(
                ax.images[0].get_array(), expected.sel(iteration=step).values
            )

    def test_titles(self, study: xr.Dataset):
        """Each panel says when: step, epoch and validation accuracy."""
        figure = class_matrices(study, learning_rate=1e-3, seed=0)

        accuracy = study["validation_accuracy"].sel(learning_rate=1e-3, seed=0).values
        assert [ax.get_title(loc="left") for ax in panels(figure)] == [
            f"step 0, before training\nvalidation accuracy {100 * accuracy[0]:.0f} %",
            f"step 10, epoch 0.25\nvalidation accuracy {100 * accuracy[1]:.0f} %",
            f"step 100, epoch 2.5\nvalidation accuracy {100 * accuracy[2]:.0f} %",
        ]
        assert figure.get_suptitle().strip() == "Sign stiffness within and between classes"

    def test_class_names(self, study: xr.Dataset):
        """Classes are named in class order, left of the first column and below the last row."""
        first, *others = panels(class_matrices(study, learning_rate=1e-3))

        assert names(first.get_yticklabels()) == class_names(4)
        assert all(names(ax.get_xticklabels()) == class_names(4) for ax in (first, *others))
        assert all(not any(names(ax.get_yticklabels())) for ax in others)

    def test_meaning(self, study: xr.Dataset):
        """The colour bar says what the colours mean."""
        sign, cosine = (bar(class_matrices(study, m)).get_xlabel() for m in ("sign", "cosine"))

        assert sign.endswith("share of pairs that help each other minus share that harm")
        assert cosine.endswith("mean cosine of the two loss gradients")

    def test_from_class_matrix(self, study: xr.Dataset):
        """A class matrix that is at hand is drawn as it is."""
        from_store = class_matrices(study, learning_rate=1e-3)
        from_matrix = class_matrices(class_matrix(study).compute(), learning_rate=1e-3)

        for a, b in zip(panels(from_store), panels(from_matrix), strict=True):
            np.testing.assert_array_equal(a.images[0].get_array(), b.images[0].get_array())

    def test_missing(self):
        """Cells without a pair are masked, and the colour bar says so."""
        ds = Synthetic(n_examples=16).build()
        ds["cosine"].values[:, :, 1] = np.nan
        figure = class_matrices(ds)

        first, second = panels(figure)
        assert not np.ma.is_masked(first.images[0].get_array())
        assert second.images[0].get_array().mask.all()
        assert "grey: no pairs yet" in bar(figure).get_xlabel()

    def test_splits(self):
        """Between two splits the axes say which is which."""
        ds = Synthetic(n_examples=24, n_train=8).build()
        first, *_ = panels(class_matrices(class_matrix(ds, splits=("train", "validation"))))

        assert "train example" in first.get_ylabel()
        assert "validation example" in first.get_xlabel()

    def test_one_checkpoint(self, study: xr.Dataset):
        """A store cut down to one checkpoint gives one panel."""
        figure = class_matrices(study.isel(learning_rate=0, seed=0, iteration=1))

        assert len(panels(figure)) == 1

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"measure": "signs"}, "expected 'sign' or 'cosine'"),
            ({"learning_rate": 0.5}, "there are only 0.001, 0.01"),
            ({"seed": 7}, "there are only 0, 1"),
        ],
    )
    def test_unknown_choice(self, study: xr.Dataset, choice: dict, message: str):
        """What does not exist is refused, with what does."""
        with pytest.raises(DataError, match=message):
            class_matrices(study, **choice)


class TestManyClasses:
    def test_grouped(self, many: xr.Dataset):
        """100 classes are sorted by super-class, which is named in place of the classes."""
        ax = panels(class_matrices(many, "cosine"))[0]
        matrix = class_matrix(many)["cosine"].isel(learning_rate=0, seed=0, iteration=0).compute()
        order = np.argsort(matrix["superclass"].values, kind="stable")

        np.testing.assert_array_equal(ax.images[0].get_array(), matrix.values[order][:, order])
        assert names(ax.get_yticklabels()) == [f"group {k}" for k in range(20)]
        np.testing.assert_array_equal(ax.get_yticks(), 2 + 5 * np.arange(20))
        assert len(ax.lines) == 2 * 19  # borders between super-classes, across and down

    def test_every_name(self, many: xr.Dataset):
        """Every class is named if asked for."""
        ax = panels(class_matrices(many, class_labels=True))[0]

        assert sorted(names(ax.get_yticklabels())) == sorted(class_names(100))

    def test_without_superclasses(self, many: xr.Dataset):
        """Without super-classes as many classes are named as can be read."""
        plain = many.drop_vars([name for name in many.coords if "superclass" in str(name)])
        ax = panels(class_matrices(plain))[0]

        assert 10 <= len(ax.get_yticklabels()) <= 30

    def test_superclass_matrices(self, many: xr.Dataset):
        """Super-classes have a matrix of their own."""
        figure = superclass_matrices(many, "cosine")

        assert panels(figure)[0].images[0].get_array().shape == (20, 20)
        assert "super-classes" in figure.get_suptitle()

    def test_no_superclasses(self, study: xr.Dataset):
        """A data set without super-classes has no such figure."""
        with pytest.raises(DataError, match="no super-classes"):
            superclass_matrices(study)


class TestLearningRateMatrices:
    def test_rows(self, study: xr.Dataset):
        """A row for each learning rate, a column for each stage, means over seeds."""
        figure = learning_rate_matrices(study)

        shown = panels(figure)
        assert len(shown) == 2 * 3
        assert shown[0].get_ylabel().startswith("learning rate 0.001")
        assert shown[3].get_ylabel().startswith("learning rate 0.01")
        expected = class_matrix(study)["sign"].mean("seed").sel(learning_rate=1e-2, iteration=10)
        np.testing.assert_allclose(shown[4].images[0].get_array(), expected.values)


class TestStages:
    @pytest.mark.parametrize(
        ("iterations", "shown"),
        [
            ([5], [5]),
            ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
            ([0, 1, 10, 100, 1000, 5000, 10000], [0, 1, 100, 10000]),
            (list(range(0, 1100, 100)), [0, 100, 300, 1000]),
        ],
    )
    def test_paper_stages(self, iterations: list[int], shown: list[int]):
        """Up to six are all shown; else the first, an early one, one between and the last."""
        assert [iterations[k] for k in stages(iterations)] == shown
