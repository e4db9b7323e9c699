"""Figures that set curves side by side: splits, learning rates at equal loss, two studies."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distributed_stiffness.analysis import (
    at_equal_losses,
    distance_profile,
    paired_curves,
    split_blocks,
    summary,
    within_between,
)
from distributed_stiffness.errors import DataError
from distributed_stiffness.figures import (
    VIEWS,
    block_curves,
    equal_loss_curves,
    paired_figure,
    profiles,
)


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return Synthetic(
        n_examples=40,
        n_train=16,
        learning_rates=(1e-3, 1e-2),
        seeds=(0, 1),
        iterations=(0, 10, 100, 1000),
    ).build()


@pytest.fixture(scope="module")
def other(study: xr.Dataset) -> xr.Dataset:
    return study.assign(cosine=study["cosine"] * 0.5, title="Other").assign_attrs(title="Other")


def drawn(ax: Axes, values: np.ndarray) -> bool:
    """Whether a line with these values is in a panel."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    return any(line.shape == values.shape and np.allclose(line, values) for line in lines)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


class TestBlockCurves:
    def test_every_block(self, study: xr.Dataset):
        """Each block has its means over seeds, within and between, in a row for each rate."""
        figure = block_curves(study)
        blocks = split_blocks(study).mean("seed").compute()

        for row in range(2):
            for column, measure in enumerate(("sign", "cosine")):
                at = blocks[measure].isel(learning_rate=row)
                for block in blocks["block"].values:
                    for relation in ("within", "between"):
                        values = at.sel(block=block, relation=relation).values
                        assert drawn(figure.axes[2 * row + column], values)
        assert legend(figure)[:3] == [
            "training pairs",
            "training with validation",
            "validation pairs",
        ]

    def test_one_split(self):
        """A store of one split has no blocks, and no such view."""
        ds = Synthetic(n_examples=12, iterations=(0,)).build()

        with pytest.raises(DataError, match="one split only"):
            block_curves(ds)
        assert not VIEWS["split_blocks"].is_of(summary(ds))


class TestEqualLossCurves:
    def test_every_loss(self, study: xr.Dataset):
        """Each loss has its means over seeds against the learning rate, and its name."""
        figure = equal_loss_curves(study)
        found = at_equal_losses(within_between(study).compute())

        for ax, measure in zip(figure.axes, ("sign", "cosine"), strict=True):
            for k in range(3):
                at = found[measure].isel(train_loss=k).mean("seed")
                for relation in ("within", "between"):
                    assert drawn(ax, at.sel(relation=relation).values)
        assert legend(figure)[0] == f"training loss {float(found['train_loss'][0]):.2g}"

    def test_rates_on_the_axis(self, study: xr.Dataset):
        """The axis names the rates that were run, and no others."""
        figure = equal_loss_curves(study)
        figure.canvas.draw()

        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert labels == ["0.001", "0.01"]

    def test_one_rate(self, study: xr.Dataset):
        """One learning rate cannot be compared."""
        assert not VIEWS["equal_loss"].is_of(summary(study.isel(learning_rate=[0])))


class TestPairedFigure:
    def test_curves_and_difference(self, study: xr.Dataset, other: xr.Dataset):
        """Both studies' means stand above their difference, for each rate and measure."""
        paired = paired_curves(study, other).compute()
        figure = paired_figure(paired)
        means = paired.mean("seed")

        for k in range(2):
            for column, measure in enumerate(("sign", "cosine")):
                above, below = figure.axes[4 * k + column], figure.axes[4 * k + 2 + column]
                at = means.isel(learning_rate=k).sel(relation="within")
                for name in ("first", "second"):
                    assert drawn(above, at[measure].sel(study=name).values)
                assert drawn(below, at[f"{measure}_difference"].values)
                assert below.get_title(loc="left") == "Synthetic study minus Other"
        assert legend(figure)[:2] == ["Synthetic study", "Other"]

    def test_view(self, study: xr.Dataset, other: xr.Dataset):
        """There is such a view only against another store."""
        view = VIEWS["permuted"]

        assert not view.is_of(summary(study))
        assert isinstance(view.draw(summary(study, against=other)), Figure)


class TestProfiles:
    def test_other_distance(self, study: xr.Dataset):
        """A profile over another distance says which."""
        figure = profiles(distance_profile(study, distance="label").compute())

        assert figure.axes[-1].get_xlabel().startswith("distance by label")
        assert "against distance by label" in figure.get_suptitle()
