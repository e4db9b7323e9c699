"""Neighbouring measures, spectra and single examples: what is drawn is what was computed."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic
from matplotlib.figure import Figure

from distributed_stiffness import data
from distributed_stiffness.analysis import neighbours, reduced, spectrum, summary, teaching
from distributed_stiffness.errors import DataError
from distributed_stiffness.figures import (
    VIEWS,
    neighbour_curves,
    pictures_of,
    save,
    spectra,
    teaching_examples,
)
from distributed_stiffness.figures.teaching import PLACES


@pytest.fixture(scope="module")
def study() -> xr.Dataset:
    return Synthetic(
        n_examples=24, learning_rates=(1e-3, 1e-2), iterations=(0, 10, 1000), seeds=(0, 1)
    ).build()


def drawn(ax, values: np.ndarray) -> bool:
    """Whether a line with these values is in a panel."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    return any(line.shape == values.shape and np.allclose(line, values) for line in lines)


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


class TestNeighbourCurves:
    def test_values(self, study: xr.Dataset):
        """Each measure has a panel with the means over seeds, of both kernels."""
        measures = neighbours(study).compute()
        figure = neighbour_curves(measures)
        panels = dict(zip(titles(figure), figure.axes, strict=True))

        for title, name in (
            ("Gradient coherence", "coherence"),
            ("m-coherence", "m_coherence"),
            ("Effective rank", "participation_ratio"),
            ("Alignment with the labels", "alignment"),
        ):
            for kernel in ("cosine", "gram"):
                mean = measures[name].sel(kernel=kernel).mean("seed")
                assert drawn(panels[title], mean.isel(learning_rate=1).values)
        least = measures["minimum"].sel(kernel="cosine").mean("seed").isel(learning_rate=0)
        assert drawn(panels["Least cosine of any pair"], least.values)

    def test_bands(self, study: xr.Dataset):
        """Measures with a standard error have a band for each rate and kernel, others none."""
        figure = neighbour_curves(neighbours(study).compute())
        panels = dict(zip(titles(figure), figure.axes, strict=True))

        assert len(panels["Gradient coherence"].collections) == 4
        assert not panels["Gradient confusion η"].collections

    def test_sums_in_place_of_pairs(self, study: xr.Dataset):
        """What a store has no numbers for has no panel."""
        figure = neighbour_curves(neighbours(reduced(study)).compute())

        assert len(figure.axes) == 6
        assert {"Effective rank", "Alignment with the labels"} <= set(titles(figure))
        assert not {"Least cosine of any pair", "Gradient confusion η"} & set(titles(figure))

    def test_without_norms(self, study: xr.Dataset):
        """Cosines alone are drawn, and the last panel of each column has the steps."""
        figure = neighbour_curves(neighbours(study.drop_vars("gradient_norm")).compute())

        assert len(figure.axes) == 8
        assert sum(bool(ax.get_xlabel()) for ax in figure.axes) == 3


class TestSpectra:
    def test_values(self, study: xr.Dataset):
        """Each stage is a line of shares, with its effective rank in the key."""
        found = spectrum(study, 10).compute()
        figure = spectra(found)
        mean = found.mean("seed").isel(learning_rate=1, iteration=2).sel(kernel="gram")
        ax = figure.axes[3]

        assert drawn(ax, mean["share"].values)
        key = [text.get_text() for text in ax.get_legend().get_texts()]
        assert key[2] == f"step 1,000\neffective rank {float(mean['effective_rank']):.1f}"


class TestTeachingExamples:
    def test_table(self, study: xr.Dataset):
        """Without pictures each example has its class, its number and its mean."""
        found = teaching(study).compute()
        figure = teaching_examples(found)
        text = figure.subfigs[0].axes[0].texts[0].get_text()
        means = found["cosine"].mean("seed").isel(learning_rate=0, iteration=-1)
        within = means.sel(relation="within")
        best = int(within.argmax("example"))

        assert len(figure.subfigs) == 2
        assert text == f"{found['class_name'].values[best]}\nno. {best}\n{within.max():+.2f}"

    def test_pictures(self, study: xr.Dataset):
        """With pictures each example is the picture of its own."""
        found = teaching(study).compute()

        def pictures(examples: xr.Dataset) -> np.ndarray:
            numbers = examples["example"].values.astype(np.float64)
            return numbers[:, None, None] + np.array([[0.0, 1000.0]])

        figure = teaching_examples(found, pictures)
        axes = figure.subfigs[1].axes
        assert sum(len(ax.images) for ax in axes) == 4 * PLACES
        # Scaled to its own range, and the label below has its number.
        assert axes[0].images[0].get_array().tolist() == [[0.0, 1.0]]
        assert axes[0].get_xlabel().startswith("no. ")

    def test_nothing_computed(self, study: xr.Dataset):
        """A study without a pair is drawn without examples."""
        empty = study.assign(cosine=study["cosine"] * np.nan)
        figure = teaching_examples(teaching(empty).compute())

        texts = [text.get_text() for ax in figure.subfigs[0].axes for text in ax.texts]
        assert not any("no. " in text for text in texts)


class TestPictures:
    @staticmethod
    def examples(index: list[int], labels: np.ndarray) -> xr.Dataset:
        split = np.array(["validation"] * len(index), dtype=object)
        return xr.Dataset(
            coords={
                "index": ("example", index),
                "label": ("example", labels),
                "split": ("example", split),
            }
        )

    def test_known_data(self):
        """Pictures are those at the examples' positions in their split."""
        digits = data.load("digits").validation
        index = [3, 0, 77]
        got = pictures_of({"dataset": "digits"}, self.examples(index, digits.labels[index]))

        assert got is not None
        np.testing.assert_array_equal(got, digits.inputs[index, 0])

    def test_other_data(self):
        """Labels that are not those of the data, and data of the user's, have no pictures."""
        digits = data.load("digits").validation
        wrong = self.examples([0, 1], (digits.labels[:2] + 1) % 10)

        assert pictures_of({"dataset": "digits"}, wrong) is None
        assert pictures_of({"dataset": "mine:data"}, self.examples([0], digits.labels[:1])) is None

    def test_data_that_are_not_there(self, tmp_path, monkeypatch: pytest.MonkeyPatch):
        """Nothing is downloaded for a picture."""
        monkeypatch.setenv("STIFFNESS_DATA_DIR", str(tmp_path))

        assert pictures_of({"dataset": "mnist"}, self.examples([0], np.array([7]))) is None

    def test_the_folder_that_is_given(self, monkeypatch: pytest.MonkeyPatch):
        """As of a job's --data-dir, is where the data are looked for."""
        looked_in = []

        def load(name: str, *, directory: str | None, **_: object):
            looked_in.append(directory)
            raise DataError(f"no {name}")

        monkeypatch.setattr(data, "load", load)
        pictures_of({"dataset": "mnist"}, self.examples([0], np.array([7])), directory="here")

        assert looked_in == ["here"]


def test_views(study: xr.Dataset, tmp_path):
    """The views of a study draw them, of pairs and, as far as there are numbers, of sums."""
    whole = summary(study.isel(seed=[0], iteration=[0, 2]))
    sums = summary(reduced(study.isel(seed=[0], learning_rate=[0], iteration=[2])))

    for name in ("neighbours", "spectrum", "teaching_examples"):
        assert save(VIEWS[name].draw(whole), tmp_path / f"{name}.png").stat().st_size > 0
    assert [name for name in ("neighbours", "spectrum") if VIEWS[name].is_of(sums)] == [
        "neighbours"
    ]
    for name in ("neighbours", "teaching_examples"):
        assert save(VIEWS[name].draw(sums), tmp_path / f"{name}.png").stat().st_size > 0
