"""Permuted labels keep their counts, and draws keep the classes balanced."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distributed_stiffness.data import Split, permute_labels, require_every_class, subset
from distributed_stiffness.errors import DataError

SEEDS = st.integers(0, 2**32 - 1)
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array)


def numbered(labels: np.ndarray) -> Split:
    """A split whose only feature is the position of the example."""
    return Split(inputs=np.arange(len(labels))[:, None], labels=labels)


@given(labels=LABELS, seed=SEEDS, share=st.floats(0, 1))
def test_permuting_keeps_the_counts_of_the_classes(labels, seed, share):
    """Labels only change places, so each class is as frequent as before."""
    permuted = permute_labels(labels, seed=seed, share=share)

    assert np.array_equal(np.bincount(permuted), np.bincount(labels))


@given(n=st.integers(1, 300), seed=SEEDS, share=st.floats(0, 1))
def test_no_more_than_the_share_changes(n, seed, share):
    """With share s at most s·n labels differ; labels that are all different show which moved."""
    labels = np.arange(n)
    moved = np.count_nonzero(permute_labels(labels, seed=seed, share=share) != labels)

    assert moved <= round(share * n)


def test_a_whole_permutation_leaves_about_one_label_in_ten_right():
    """Ten balanced classes: a tenth of the permuted labels is right by chance, not more."""
    labels = np.arange(10_000) % 10
    right = np.mean(permute_labels(labels, seed=0) == labels)

    # 10,000 draws at 0.1: standard deviation 0.003; five of them either side
    assert 0.085 < right < 0.115


def test_the_seed_decides_and_the_labels_given_stay():
    """One seed gives one permutation, another gives another, and the input is not written to."""
    labels = np.arange(100) % 10
    before = labels.copy()

    assert np.array_equal(permute_labels(labels, seed=3), permute_labels(labels, seed=3))
    assert not np.array_equal(permute_labels(labels, seed=3), permute_labels(labels, seed=4))
    assert np.array_equal(labels, before)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(share):
    """Anything else is refused, with its value."""
    with pytest.raises(DataError, match=str(share)):
        permute_labels(np.array([0, 1]), seed=0, share=share)


def test_a_class_without_example_is_named():
    """The message says which class, where, and that there are others."""
    with pytest.raises(DataError, match=r"class 'dog' \(nor of 1 more\) in the validation split"):
        require_every_class(np.array([0, 0]), ("cat", "dog", "fish"), "validation split")


def test_every_class_with_an_example_passes():
    """Nothing is raised when all are there, once each."""
    require_every_class(np.array([2, 0, 1]), ("cat", "dog", "fish"), "validation split")


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_a_draw_has_the_size_asked_for_in_the_order_of_the_split(labels, seed, data):
    """Different examples, in order, each with its label; `index` says which they are."""
    n_classes = len(np.bincount(labels))
    assume(n_classes <= len(labels))
    n = data.draw(st.integers(n_classes, len(labels)))
    drawn, index = subset(numbered(labels), n, seed=seed, n_classes=n_classes)

    assert len(drawn) == n
    assert index.dtype == np.int64
    assert np.all(np.diff(index) > 0)
    assert np.array_equal(drawn.inputs[:, 0], index)
    assert np.array_equal(drawn.labels, labels[index])


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_every_class_of_the_split_is_drawn(labels, seed, data):
    """However rare a class is, it has an example in every draw that has room for it."""
    n_classes = len(np.bincount(labels))
    assume(n_classes <= len(labels))
    n = data.draw(st.integers(n_classes, len(labels)))
    drawn, _ = subset(numbered(labels), n, seed=seed, n_classes=n_classes)

    assert set(drawn.labels) == set(labels)


@given(
    counts=st.lists(st.integers(20, 200), min_size=2, max_size=8),
    share=st.floats(0.1, 1),
    seed=SEEDS,
)
def test_classes_keep_their_proportions(counts, share, seed):
    """Each class gets its share of the draw, rounded up or down."""
    labels = np.repeat(np.arange(len(counts)), counts)
    n = round(share * len(labels))
    drawn, _ = subset(numbered(labels), n, seed=seed, n_classes=len(counts))

    exact = n * np.array(counts) / sum(counts)
    assert np.all(np.abs(np.bincount(drawn.labels) - exact) < 1)


def test_a_larger_draw_holds_a_smaller_one():
    """With balanced classes the same seed extends a draw: studies of two sizes share examples."""
    split = numbered(np.arange(1000) % 10)
    _, small = subset(split, 50, seed=7, n_classes=10)
    _, large = subset(split, 500, seed=7, n_classes=10)

    assert set(small) < set(large)


def test_draws_are_random_and_repeat():
    """The seed decides."""
    split = numbered(np.arange(100) % 10)

    assert np.array_equal(*(subset(split, 50, seed=1, n_classes=10)[1] for _ in range(2)))
    assert not np.array_equal(*(subset(split, 50, seed=seed, n_classes=10)[1] for seed in (1, 2)))


@pytest.mark.parametrize("n", [None, 6])
def test_all_examples_are_the_split_itself(n):
    """None and the whole number both mean every example, as stored."""
    split = numbered(np.array([1, 0, 1, 1, 0, 1]))
    drawn, index = subset(split, n, seed=0, n_classes=2)

    assert drawn is split
    assert index.tolist() == [0, 1, 2, 3, 4, 5]


def test_more_than_there_are_is_refused():
    """The message has both numbers and the option to use."""
    split = numbered(np.arange(10_000) % 10)
    with pytest.raises(
        DataError,
        match="asked for 20,000 examples, the validation split has 10,000; use --examples 10000",
    ):
        subset(split, 20_000, seed=0, n_classes=10, where="validation split")


@pytest.mark.parametrize("n", [-1, 0, 9])
def test_less_than_one_of_each_class_is_refused(n):
    """Class means need every class."""
    split = numbered(np.arange(100) % 10)
    with pytest.raises(DataError, match=f"asked for {n} examples of 10 classes"):
        subset(split, n, seed=0, n_classes=10)
