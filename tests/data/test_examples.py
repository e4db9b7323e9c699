"""Splits and data sets hold what they say, or are not built."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_stiffness.data import LabelledData, Split
from distributed_stiffness.errors import DataError


def images(n: int, shape: tuple[int, ...] = (1, 4, 4), dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(n).integers(0, 255, (n, *shape)).astype(dtype)


def pets(**changes: object) -> LabelledData:
    fields = {
        "name": "pets",
        "train": Split(inputs=images(6), labels=np.array([0, 1, 2, 0, 1, 2])),
        "validation": Split(inputs=images(3), labels=np.array([2, 1, 0])),
        "class_names": ("cat", "dog", "fish"),
        "superclass_of_class": (0, 0, 1),
        "superclass_names": ("furry", "scaly"),
        "verified": True,
        "source": "Made up.",
    }
    return LabelledData(**{**fields, **changes})


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16"])
def test_labels_of_any_integer_type_are_kept_as_int64(dtype):
    """Whatever integers the labels were, they are int64 afterwards, with the same values."""
    split = Split(inputs=images(3), labels=np.array([2, 0, 1], dtype=dtype))

    assert split.labels.dtype == np.int64
    assert split.labels.tolist() == [2, 0, 1]
    assert len(split) == 3


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (images(3), np.array([0, 1]), "3 inputs and 2 labels"),
        (images(3), np.array([0.0, 1.0, 2.0]), "labels are float64"),
        (images(3), np.array([[0], [1], [2]]), r"shape \(3, 1\)"),
        (images(0), np.array([], dtype=int), "at least one example"),
        (np.arange(3), np.array([0, 1, 2]), r"shape \(3,\)"),
        (np.array([["a"], ["b"]]), np.array([0, 1]), "expected numbers"),
        (np.array([[0.0], [np.nan]]), np.array([0, 1]), "input 1 holds nan"),
        (np.array([[np.inf], [1.0]]), np.array([0, 1]), "input 0 holds inf"),
    ],
)
def test_a_broken_split_is_not_built(inputs, labels, message):
    """Lengths, shapes, dtypes and non-finite numbers are refused, with what was found."""
    with pytest.raises(DataError, match=message):
        Split(inputs=inputs, labels=labels)


def test_a_split_cannot_be_changed():
    """Splits are values: a changed one is a new one."""
    split = Split(inputs=images(2), labels=np.array([0, 1]))

    with pytest.raises(FrozenInstanceError):
        split.labels = np.array([1, 0])


def test_shape_and_number_of_classes_are_read_off_the_data():
    """The shape of one input leaves n out; there are as many classes as names."""
    assert pets().input_shape == (1, 4, 4)
    assert pets().n_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": Split(inputs=images(2), labels=np.array([0, 3]))},
            "train split: label 3 is outside 0 to 2",
        ),
        (
            {"validation": Split(inputs=images(2), labels=np.array([-1, 0]))},
            "validation split: label -1 is outside",
        ),
        ({"class_names": ("cat",)}, "expected at least 2"),
        ({"class_names": ("cat", "dog", "cat")}, "'cat' comes more than once"),
        ({"class_names": (0, 1, 2)}, "expected text"),
        (
            {"validation": Split(inputs=images(2, (1, 5, 4)), labels=np.array([0, 1]))},
            r"uint8 \(1, 5, 4\)",
        ),
        (
            {"validation": Split(inputs=images(2, dtype="float32"), labels=np.array([0, 1]))},
            "float32",
        ),
        ({"superclass_names": None}, "both or none"),
        ({"superclass_of_class": None}, "both or none"),
        ({"superclass_of_class": (0, 1)}, "expected 3 numbers"),
        ({"superclass_of_class": (0, 1, 2)}, "from 0 to 1"),
        ({"superclass_names": ("furry", "furry")}, "more than once"),
    ],
)
def test_a_data_set_that_contradicts_itself_is_not_built(changes, message):
    """Labels, names, shapes and super-classes have to fit each other."""
    with pytest.raises(DataError, match=message):
        pets(**changes)


def test_super_classes_may_be_left_out():
    """Most data sets have none."""
    data = pets(superclass_of_class=None, superclass_names=None)

    assert data.superclass_names is None


def test_content_hash_repeats_and_leaves_out_where_the_data_came_from():
    """The same examples have the same hash, however they were found."""
    other = pets(name="animals", source="Elsewhere.", verified=False)

    assert pets().content_hash() == pets().content_hash() == other.content_hash()


@given(order=st.permutations(range(6)))
def test_content_hash_sees_the_order(order):
    """Two orders of the same examples are two contents: a store's rows follow the order."""
    data = pets()
    shuffled = Split(inputs=data.train.inputs[order], labels=data.train.labels[order])
    same = replace(data, train=shuffled).content_hash() == data.content_hash()

    assert same == (list(order) == sorted(order))


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": ("cat", "dog", "bird")},
        {"superclass_names": ("furry", "wet")},
        {"superclass_of_class": (0, 1, 1)},
        {"train": Split(inputs=images(6), labels=np.array([0, 1, 2, 0, 2, 1]))},
        {
            "train": Split(inputs=images(6).astype("int8"), labels=np.array([0, 1, 2, 0, 1, 2])),
            "validation": Split(inputs=images(3).astype("int8"), labels=np.array([2, 1, 0])),
        },
        {
            "train": Split(
                inputs=images(6).reshape(6, 1, 2, 8), labels=np.array([0, 1, 2, 0, 1, 2])
            ),
            "validation": Split(inputs=images(3).reshape(3, 1, 2, 8), labels=np.array([2, 1, 0])),
        },
    ],
    ids=["class name", "super-class name", "tree", "label", "dtype", "shape"],
)
def test_content_hash_sees_every_change(changes):
    """Names, labels, and the same bytes under another dtype or shape all change the hash."""
    assert pets(**changes).content_hash() != pets().content_hash()


def test_content_hash_does_not_depend_on_memory_layout():
    """A transposed view has the hash of its contiguous copy."""
    data = pets()
    strided = np.asfortranarray(data.train.inputs)
    again = replace(data, train=replace(data.train, inputs=strided))

    assert again.content_hash() == data.content_hash()
