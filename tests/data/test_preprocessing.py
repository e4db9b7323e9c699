"""Inputs are standardised over the training split, then put on the unit sphere."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from distributed_stiffness.data import Preprocessing, Split, load
from distributed_stiffness.data import preprocessing as module
from distributed_stiffness.errors import DataError

PIXELS = arrays(
    np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=5), elements=st.integers(0, 255)
)
FLOATS = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=5, max_side=4),
    elements=st.integers(-(10**6), 10**6).map(lambda k: k / 1000),
)


def split(inputs: np.ndarray) -> Split:
    return Split(inputs=inputs, labels=np.zeros(len(inputs), dtype=int))


def varies(x: np.ndarray) -> bool:
    """Whether some channel varies."""
    channels = np.moveaxis(x, 1, 0) if x.ndim == 4 else x[None]
    return any(channel.min() < channel.max() for channel in channels)


@given(raw=PIXELS.filter(varies))
def test_statistics_of_images_are_per_channel(raw):
    """Mean and standard deviation over examples and pixels, of values scaled to 0..1."""
    fitted = Preprocessing.fit(split(raw))
    scaled = raw.astype(np.float64) / 255
    std = scaled.std(axis=(0, 2, 3))

    np.testing.assert_allclose(fitted.mean, scaled.mean(axis=(0, 2, 3)), atol=1e-12)
    # A channel that never varies is only centred. numpy's standard deviation of it is rounding.
    np.testing.assert_allclose(fitted.std, np.where(std > 1e-12, std, 1), rtol=1e-9)


@given(raw=PIXELS.filter(varies))
def test_pixel_statistics_do_not_depend_on_the_order_of_examples(raw):
    """They come from counts, so they are the same to the last bit."""
    assert Preprocessing.fit(split(raw)) == Preprocessing.fit(split(raw[::-1]))


def test_features_share_one_mean_and_one_standard_deviation():
    """One statistic for each feature would change the angles between examples."""
    x = np.random.default_rng(0).normal(3, 2, (500, 7)) * np.arange(1, 8)
    fitted = Preprocessing.fit(split(x))

    np.testing.assert_allclose(fitted.mean, [x.mean()])
    np.testing.assert_allclose(fitted.std, [x.std()])


def test_large_offsets_do_not_cancel():
    """Values that vary by 1 around ten million keep their standard deviation."""
    x = np.random.default_rng(0).normal(0, 1, (500, 3))

    np.testing.assert_allclose(Preprocessing.fit(split(x + 1e7)).std, x.std(), rtol=1e-6)


def test_the_training_split_is_standardised():
    """Without the unit sphere, its channels have mean 0 and standard deviation 1."""
    raw = np.random.default_rng(0).integers(0, 255, (200, 3, 8, 8)).astype(np.uint8)
    x = Preprocessing.fit(split(raw), unit_norm=False)(raw)

    # float32 values of about 1, 12,800 of them a channel
    np.testing.assert_allclose(x.mean(axis=(0, 2, 3), dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(axis=(0, 2, 3), dtype=np.float64), 1, atol=1e-6)


@given(raw=PIXELS.filter(varies) | FLOATS.filter(varies))
def test_every_example_is_on_the_unit_sphere(raw):
    """Norms are 1 up to float32 rounding, or 0 where nothing is left; shape stays."""
    x = Preprocessing.fit(split(raw))(raw)
    norms = np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=1)

    assert x.dtype == np.float32
    assert x.shape == raw.shape
    assert np.all((np.abs(norms - 1) < 1e-6) | (norms == 0))


def test_an_example_without_direction_is_left_at_zero():
    """An example equal to the mean has no direction: zero, not NaN."""
    fitted = Preprocessing(mean=(2.0,), std=(1.0,))

    assert fitted(np.array([[2.0, 2.0], [5.0, 6.0]])).tolist() == [
        [0.0, 0.0],
        pytest.approx([0.6, 0.8]),
    ]


@given(raw=PIXELS.filter(varies), data=st.data())
def test_an_example_does_not_depend_on_its_company(raw, data):
    """Alone, in a batch or in another order, an example gives the same bits."""
    fitted = Preprocessing.fit(split(raw))
    chosen = data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=5))

    assert np.array_equal(fitted(raw)[chosen], fitted(raw[chosen]))


def test_the_block_size_changes_no_bit(monkeypatch):
    """Blocks bound the memory, and nothing else."""
    digits = load("digits").train
    whole = Preprocessing.fit(digits)(digits.inputs)
    monkeypatch.setattr(module, "BLOCK", 100)

    assert np.array_equal(Preprocessing.fit(digits)(digits.inputs), whole)


@given(shift=st.integers(-1000, 1000), power=st.integers(-10, 10))
def test_the_scale_of_the_raw_values_does_not_matter(shift, power):
    """Standardising takes out offset and scale: digits may run to 16 or to 1."""
    x = np.random.default_rng(0).normal(size=(20, 1, 3, 3))
    y = (x + shift) * 2.0**power

    np.testing.assert_allclose(
        Preprocessing.fit(split(y))(y), Preprocessing.fit(split(x))(x), atol=1e-6
    )


def test_distances_depend_on_the_preprocessing():
    """What all images share pulls them together: a ξ has to say how its inputs were made."""
    digits = load("digits")
    raw = digits.validation.inputs.astype(float)
    standardised = Preprocessing.fit(digits.train)(digits.validation.inputs)

    def typical_distance(x: np.ndarray) -> float:
        flat = x.reshape(len(x), -1)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        return float(np.median(1 - unit @ unit.T))

    assert typical_distance(raw) + 0.1 < typical_distance(standardised)


def test_a_channel_that_never_varies_is_only_centred():
    """It becomes zero, not a division by zero and not amplified rounding."""
    raw = np.random.default_rng(0).normal(size=(10, 2, 3, 3))
    raw[:, 1] = 0.1
    x = Preprocessing.fit(split(raw), unit_norm=False)(raw)

    np.testing.assert_allclose(x[:, 1], 0, atol=1e-12)


@pytest.mark.parametrize("value", [np.uint8(7), np.float64(0.1)])
def test_inputs_that_are_all_the_same_are_refused(value):
    """Nothing can be learned from them, and their distance is undefined."""
    with pytest.raises(DataError, match="expected inputs that vary"):
        Preprocessing.fit(split(np.full((5, 1, 2, 2), value)))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 48)])
def test_inputs_with_other_channels_are_refused(shape):
    """Statistics of three channels say nothing about one."""
    fitted = Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(DataError, match="expected 3"):
        fitted(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((), ()), ((0.0,), (1.0, 1.0)), ((0.0,), (0.0,)), ((float("nan"),), (1.0,))],
)
def test_statistics_have_to_make_sense(mean, std):
    """One mean and one positive standard deviation a channel."""
    with pytest.raises(DataError):
        Preprocessing(mean=mean, std=std)


def test_the_description_tells_every_step():
    """A store says how its inputs were made."""
    fitted = Preprocessing(mean=(0.5, 0.25), std=(0.1, 0.2))

    assert fitted.describe() == (
        "uint8 divided by 255, then standardised per channel over the training split"
        " (mean 0.5, 0.25; standard deviation 0.1, 0.2), then each example scaled to unit norm"
    )
    assert "unit norm" not in replace(fitted, unit_norm=False).describe()
