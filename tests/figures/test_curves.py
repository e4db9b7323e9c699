"""Curves: the numbers of each learning rate, the steps on the axis, the note on open signs."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic
from matplotlib.figure import Figure

from distributed_stiffness.analysis import checkpoint_curves, within_between
from distributed_stiffness.figures import stiffness_curves

TITLES = ["Sign stiffness", "Cosine stiffness", "Loss", "Accuracy"]


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return Synthetic(
        n_examples=24, learning_rates=(1e-3, 1e-2), iterations=(0, 10, 20, 1000), seeds=(0, 1)
    ).build()


def draw(ds: xr.Dataset) -> Figure:
    return stiffness_curves(within_between(ds).compute(), checkpoint_curves(ds).compute())


def drawn(ax, values: np.ndarray) -> bool:
    """Whether a line with these values is in a panel."""
    lines = [np.asarray(line.get_ydata()) for line in ax.lines]
    return any(line.shape == values.shape and np.allclose(line, values) for line in lines)


class TestStiffnessCurves:
    def test_panels(self, study: xr.Dataset):
        """Sign and cosine stiffness stand above loss and accuracy."""
        assert [ax.get_title(loc="left") for ax in draw(study).axes] == TITLES

    def test_stiffness(self, study: xr.Dataset):
        """Each learning rate has its means over seeds, within and between classes."""
        sign = draw(study).axes[0]
        means = within_between(study)["sign"].mean("seed")

        for rate in study["learning_rate"].values:
            for relation in ("within", "between"):
                assert drawn(sign, means.sel(learning_rate=rate, relation=relation).values)

    def test_bands(self, study: xr.Dataset):
        """Each mean has a band of one standard error over examples to both sides."""
        figure = draw(study)
        result = within_between(study).mean("seed").compute()
        at = result.isel(learning_rate=0).sel(relation="within")

        for ax, measure in zip(figure.axes, ("sign", "cosine"), strict=False):
            mean, error = at[measure].values, at[f"{measure}_error"].values
            ends = [np.minimum(mean + error, 1), np.maximum(mean - error, -1)]
            first = ax.collections[0].get_paths()[0].vertices[:, 1]
            assert len(ax.collections) == 4  # two rates, within and between
            for value in np.concatenate(ends):
                assert np.isclose(first, value).any()
        assert "± one standard error over examples" in figure.axes[0].texts[-1].get_text()

    def test_without_errors(self, study: xr.Dataset):
        """Results without errors are drawn without bands."""
        bare = within_between(study).compute()
        bare = bare.drop_vars([name for name in bare if str(name).endswith("_error")])
        figure = stiffness_curves(bare, checkpoint_curves(study).compute())

        assert not figure.axes[0].collections

    def test_training(self, study: xr.Dataset):
        """Loss and accuracy of both splits stand below, on the same steps."""
        *_, loss, accuracy = draw(study).axes

        for ax, name in ((loss, "loss"), (accuracy, "accuracy")):
            for split in ("train", "validation"):
                mean = study[f"{split}_{name}"].mean("seed").isel(learning_rate=0)
                assert drawn(ax, mean.values)

    def test_steps(self, study: xr.Dataset):
        """Steps are logarithmic where they span much, step 0 at the left, labels at the steps."""
        ax = draw(study).axes[2]

        assert ax.get_xscale() == "symlog"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "10", "20", "1,000"]

    def test_crowded_steps(self):
        """Labels that would run into each other are left out, the first and the last never."""
        ds = Synthetic(n_examples=12, iterations=(0, 1, 2, 500, 990, 995, 1000)).build()
        labels = [label.get_text() for label in draw(ds).axes[2].get_xticklabels()]

        assert labels[0] == "0"
        assert labels[-1] == "1,000"
        assert "995" not in labels

    def test_one_iteration(self):
        """One checkpoint is a point."""
        figure = draw(Synthetic(n_examples=12, iterations=(50,)).build())

        assert figure.axes[2].get_xticks().tolist() == [50]

    @pytest.mark.parametrize(("undecided", "noted"), [(0, False), (50, True), (-1, False)])
    def test_open_signs(self, study: xr.Dataset, undecided: int, noted: bool):
        """A note is there exactly where more than one pair in a thousand has an open sign."""
        ds = study.copy(deep=True)
        ds["undecided"].values[1, 0, 2] = undecided
        note = draw(ds).legends[0].get_title().get_text()

        assert bool(note) == noted
        if noted:
            assert "up to 18.1 % of all pairs" in note  # 50 of 24 * 23 / 2
            assert "learning rate 0.01, step 20" in note
