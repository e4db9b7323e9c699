"""What the page's heat map is drawn from: the store's numbers, rounded, and never too many."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from analysis.synthetic import Synthetic
from matplotlib.figure import Figure

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.figures import class_matrices
from distributed_stiffness.figures.checkpoints import of_seed
from distributed_stiffness.report.matrices import heat_maps

HALF = 0.5e-4 + 1e-12  # of the last digit that is kept


def numbers_in(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def whole(content: dict[str, Any], matrix: int, part: str, measure: str, at: int) -> np.ndarray:
    """The matrix of a checkpoint, written apart from the code: NaN where it is not known."""
    one = content["matrices"][matrix]
    n = len(one["names"])
    values = numbers_in(one[part][measure][at], "<i2").astype(float)
    values[values == content["missing"]] = np.nan
    values /= content["scale"]
    if not one["symmetric"]:
        return values.reshape(n, n)
    out = np.empty((n, n))
    k = 0
    for a in range(n):
        for b in range(a, n):
            out[a, b] = out[b, a] = values[k]
            k += 1
    assert k == len(values)
    return out


@pytest.fixture(scope="module")
def numbers() -> Summary:
    made = Synthetic(n_examples=32, n_superclasses=2, learning_rates=(1e-3, 1e-2), seeds=(0, 1, 2))
    return summary(made.build())


def many_steps(numbers: Summary, n_classes: int, n_steps: int) -> Summary:
    """A study of many classes and checkpoints, whose matrices are random numbers."""
    random = np.random.default_rng(0)
    shape = (1, 1, n_steps, n_classes, n_classes)
    half = random.uniform(-1, 1, shape)
    symmetric = (half + np.swapaxes(half, -1, -2)) / 2
    names = [f"class {k}" for k in range(n_classes)]
    dims = ("learning_rate", "seed", "iteration", "class_name", "other_class_name")
    run = {"learning_rate": [1e-3], "seed": [0], "iteration": 100 * np.arange(n_steps)}
    variables = dict.fromkeys(("sign", "cosine"), (dims, symmetric))
    variables |= dict.fromkeys(("sign_error", "cosine_error"), (dims, np.abs(symmetric) / 10))
    variables |= dict.fromkeys(("pairs", "cosine_pairs"), (dims, np.full(shape, 9900)))
    coords = run | {"class_name": names, "other_class_name": names}
    one = {"learning_rate": 0, "seed": 0, "iteration": 0}

    def for_each(ds: xr.Dataset) -> xr.Dataset:
        plain = ds.reset_coords(drop=True).isel(one, drop=True)
        return plain.expand_dims(run)

    return replace(
        numbers,
        class_matrix=xr.Dataset(variables, coords, {"splits": "validation-validation"}),
        superclass_matrix=None,
        within_between=for_each(numbers.within_between),
        curves=for_each(numbers.curves),
    )


class TestNumbers:
    def test_are_those_of_the_store(self, numbers: Summary):
        """Every mean, error and number of pairs of every checkpoint is there, to four digits."""
        content = heat_maps(numbers)
        assert content is not None

        places = [(r, s, i) for r in range(2) for s in range(4) for i in range(2)]
        for k, ds in enumerate((numbers.class_matrix, numbers.superclass_matrix)):
            for at, (rate, seed, step) in enumerate(places):
                one = of_seed(ds, None if seed == 0 else seed - 1)
                one = one.isel(learning_rate=rate, iteration=step)
                for measure, pairs in (("sign", "pairs"), ("cosine", "cosine_pairs")):
                    for part, name in (("means", measure), ("errors", f"{measure}_error")):
                        found = whole(content, k, part, measure, at)
                        np.testing.assert_allclose(found, one[name].values, rtol=0, atol=HALF)
                    counts = content["matrices"][k]["pairs"]
                    kept = numbers_in(counts["counts"][counts["at"][measure][at]], "<f8")
                    n = len(one[pairs])
                    np.testing.assert_array_equal(kept, one[pairs].values[np.triu_indices(n)])

    def test_error_over_seeds(self, numbers: Summary):
        """The mean over seeds has the error over seeds too."""
        content = heat_maps(numbers)
        assert content is not None

        expected = of_seed(numbers.class_matrix, None)["sign_seed_error"]
        for at, (rate, step) in enumerate(np.ndindex(2, 2)):
            found = whole(content, 0, "seed_errors", "sign", at)
            np.testing.assert_allclose(found, expected.values[rate, step], rtol=0, atol=HALF)

    def test_train_with_validation(self):
        """A matrix of two splits is not symmetric, and is kept whole."""
        numbers = summary(
            Synthetic(n_examples=48, n_train=24).build(), splits=("train", "validation")
        )
        content = heat_maps(numbers)
        assert content is not None

        assert content["splits"] == ["train", "validation"]
        assert not content["matrices"][0]["symmetric"]
        np.testing.assert_allclose(
            whole(content, 0, "means", "sign", 1),
            numbers.class_matrix["sign"].values[0, 0, 1],
            rtol=0,
            atol=HALF,
        )

    def test_missing_pairs(self):
        """What is not computed yet is missing, not zero."""
        ds = Synthetic(n_examples=16).build()
        ds["cosine"][..., 1, :, :] = np.nan
        content = heat_maps(summary(ds))
        assert content is not None

        assert np.isnan(whole(content, 0, "means", "sign", 1)).all()
        assert np.isfinite(whole(content, 0, "means", "sign", 0)).all()


class TestLook:
    @pytest.mark.parametrize("measure", ["sign", "cosine"])
    def test_colours_of_the_figures(self, numbers: Summary, measure: str):
        """Map and limits are those of the figure of the same matrices."""
        content = heat_maps(numbers)
        figure: Figure = class_matrices(numbers.class_matrix, measure)
        image = figure.axes[0].images[0]

        limit = content["matrices"][0]["limits"][measure]
        assert (image.norm.vmin, image.norm.vmax) == (-limit, limit)
        for value in np.linspace(-limit, limit, 41):
            k = min(int((value + limit) / (2 * limit) * 256), 255)
            red, green, blue, _ = image.cmap(image.norm(value), bytes=True)
            assert content["colours"][k] == f"#{red:02x}{green:02x}{blue:02x}"

    def test_super_classes_together(self):
        """Where classes are many, those of one super-class stand together, as in the figure."""
        content = heat_maps(
            summary(Synthetic(n_examples=64, n_classes=32, n_superclasses=4).build())
        )
        matrix = content["matrices"][0]

        assert matrix["groups"] == [(f"group {k}", 8) for k in range(4)]
        assert matrix["names"][:8] == [f"class {32 - 4 * k}" for k in range(8)]


class TestSize:
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_hundred_classes_at_forty_checkpoints(self, numbers: Summary, symmetric: bool):
        """A study of 100 classes and 40 checkpoints is there whole, of one split or of two."""
        every = many_steps(numbers, 100, 40)
        if not symmetric:
            every.class_matrix["sign"][..., 0, 1] = 0.5
        content = heat_maps(every)

        assert content["left_out"] == ""
        assert content["matrices"][0]["symmetric"] == symmetric
        assert len(content["matrices"][0]["means"]["sign"]) == 40
        assert len(json.dumps(content)) < 4_500_000

    @pytest.mark.parametrize("limit", [40_000, 60_000, 100_000])
    def test_what_does_not_fit_is_said(self, numbers: Summary, limit: int):
        """Iterations are thinned out until the rest fits; the last one stays; the page says it."""
        every = many_steps(numbers, 20, 64)
        content = heat_maps(every, limit)

        kept = content["iteration"]
        assert len(json.dumps(content)) < limit + 100
        assert 1 < len(kept) < 64
        assert kept[-1] == 6300
        assert content["left_out"] == f"{64 - len(kept)} of 64 iterations"
        at = int(every.class_matrix["iteration"].values.tolist().index(kept[0]))
        np.testing.assert_allclose(
            whole(content, 0, "means", "sign", 0),
            every.class_matrix["sign"].values[0, 0, at],
            rtol=0,
            atol=HALF,
        )

    def test_seeds_go_first(self, numbers: Summary):
        """Single seeds are left out before any iteration; their mean stays."""
        size = len(json.dumps(heat_maps(numbers)))
        content = heat_maps(numbers, size - 100)

        assert content["seeds"] == ["mean of 3"]
        assert content["iteration"] == [0, 100]
        assert content["left_out"] == "the single seeds (their mean is here)"

    def test_nothing_fits(self, numbers: Summary):
        """Where not one iteration fits there is no heat map."""
        assert heat_maps(numbers, 1000) is None
