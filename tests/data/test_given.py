"""Data as a user's function returns them: what is taken, and what is refused by its kind."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from distributed_stiffness.data.foreign import labelled
from distributed_stiffness.errors import DataError
from distributed_stiffness.watching.sample import load_sample

N = 12
X, Y = torch.arange(N * 4.0).reshape(N, 4), torch.arange(N) % 3


def of(inputs: Any, labels: Any = Y) -> Any:
    """The data set of a pair."""
    return labelled((inputs, labels), "mine:load")


class Examples(Dataset[Any]):
    """One by one, as a function makes them."""

    classes: Any = ("a", "b", "c")

    def __init__(self, item: Any = None) -> None:
        self.item = item or (lambda i: (X[i], int(Y[i])))

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


class TestClassNames:
    @pytest.mark.parametrize(
        "names",
        [
            ["cat", "dog", "eel"],
            ("cat", "dog", "eel"),
            {0: "cat", 1: "dog", 2: "eel"},
            {2: "eel", 0: "cat", 1: "dog"},
            {"2": "eel", "0": "cat", "1": "dog"},  # id2label, by way of JSON
            {"cat": 0, "eel": 2, "dog": 1},  # class_to_idx
            {np.int64(0): "cat", np.int64(1): "dog", np.int64(2): "eel"},
            OrderedDict([("1", "dog"), ("0", "cat"), ("2", "eel")]),
            {0: "cat", 1: "dog", 2: "eel"}.values(),
            (name for name in ("cat", "dog", "eel")),
            np.array(["cat", "dog", "eel"]),
            np.array([b"cat", b"dog", b"eel"]),
            pd.Series(["cat", "dog", "eel"]),
        ],
    )
    def test_in_the_order_of_the_labels(self, names: Any) -> None:
        """
        Lists as they are, mappings by their labels, whichever side these are on.
        """
        found = labelled({"validation": (X, Y), "class_names": names}, "mine:load")

        assert found.class_names == ("cat", "dog", "eel")

    def test_eleven_labels_as_text(self) -> None:
        """
        "10" comes after "9", and not after "1".
        """
        names = {str(k): f"class {k}" for k in reversed(range(11))}
        found = labelled({"validation": (X, Y), "class_names": names}, "mine:load")

        assert found.class_names == tuple(f"class {k}" for k in range(11))

    def test_folders_called_by_numbers(self) -> None:
        """
        Their class_to_idx: whole numbers are labels, and text is names.
        """
        names = {name: label for label, name in enumerate(["0", "10", "2"])}
        found = labelled({"validation": (X, Y), "class_names": names}, "mine:load")

        assert found.class_names == ("0", "10", "2")

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            ({0: 2, 1: 0, 2: 1}, "may be names by label or labels by name"),
            (["a\0", "a", "b"], "with a character of code 0"),
            ({"cat", "dog", "eel"}, "a set has no order"),
            (frozenset(["a", "b", "c"]), "a set has no order"),
            ("abc", r"class_names of mine:load is 'abc' \(it is one value\): expected a list"),
            (b"abc", "it is one value"),
            (3, "it is one value"),
            (
                {1: "a", 2: "b", 3: "c"},
                "a name for each label from 0 on.*here the labels are 0 to 2",
            ),
            ({0: "a", 1: "b", 3: "c"}, "a name for each label from 0 on"),
            ({0: "a", "0": "b", 1: "c"}, "a name for each label from 0 on"),
            ({0.0: "a", 1.0: "b", 2.0: "c"}, "a name for each label from 0 on"),
            ({False: "a", True: "b"}, "a name for each label from 0 on"),
            (["a", "b"], "label 2 is outside 0 to 1, and 2 classes are named"),
            ({0: "a", 1: "b"}, "label 2 is outside 0 to 1"),
            (["a", "a", "b"], "'a' comes more than once"),
            (["a", None, "c"], "has None: expected text"),
            ({0: ["a"], 1: ["b"], 2: ["c"]}, r"has \['a'\]: expected text"),
            (torch.arange(3), r"has tensor\(0\): expected text"),
            (np.array([["a", "b"]]), "expected text"),
            ([], "0 class: expected at least 2"),
        ],
    )
    def test_what_names_no_classes(self, names: Any, said: str) -> None:
        """
        Is refused: the order of a set is chance, and text is letters.
        """
        with pytest.raises(DataError, match=said):
            labelled({"validation": (X, Y), "class_names": names}, "mine:load")

    def test_names_of_a_sample_that_is_watched(self) -> None:
        """
        The same there.
        """
        sample = load_sample((X, Y), None, {2: "eel", 0: "cat", 1: "dog"})  # type: ignore[arg-type]

        assert sample.labelled.class_names == ("cat", "dog", "eel")
        with pytest.raises(DataError, match="it is one value"):
            load_sample((X, Y), None, "abc")

    @pytest.mark.parametrize(
        "names",
        [["a", "b", "c"], ("a", "b", "c"), np.array(["a", "b", "c"]), {0: "a", 1: "b", 2: "c"}],
    )
    def test_the_third_of_three_values(self, names: Any) -> None:
        """
        Names of classes after inputs and labels, alone or within a mapping.
        """
        for made in ((X, Y, names), [X, Y, names], {"validation": (X, Y, names)}):
            assert labelled(made, "mine:load").class_names == ("a", "b", "c")

    @pytest.mark.parametrize(
        ("third", "said"),
        [
            (
                [f"example {i}" for i in range(N)],
                "12 names for 12 labels, which may be those of the",
            ),
            (["a", "b"], "label 2 is outside 0 to 1"),
            (torch.ones(N), "there are 3 values: expected"),
            (None, "there are 3 values"),
            ("abc", "there are 3 values"),
        ],
    )
    def test_a_third_value_that_is_none(self, third: Any, said: str) -> None:
        """
        A name for each example is no name of a class; weights are no names.
        """
        with pytest.raises(DataError, match=said):
            labelled((X, Y, third), "mine:load")

    @pytest.mark.parametrize(
        ("above", "names", "expected"),
        [
            ([0, 0, 1], ["p", "q"], (0, 0, 1)),
            ({0: 0, 1: 0, 2: 1}, {1: "q", 0: "p"}, (0, 0, 1)),
            (["p", "p", "q"], ["p", "q"], None),
            ({2: 0, 1: 0, 0: 1}, ["p", "q"], None),
            ([0.5, 0, 1], ["p", "q"], None),
            (3, ["p"], None),
        ],
    )
    def test_super_classes(self, above: Any, names: Any, expected: Any) -> None:
        """
        The number of each class's super-class, in the order of the labels.
        """
        made = {"validation": (X, Y), "class_names": ["a", "b", "c"]}
        made |= {"superclass_of_class": above, "superclass_names": names}

        if expected is None:
            with pytest.raises(DataError, match="expected the number of a super-class"):
                labelled(made, "mine:load")
        else:
            found = labelled(made, "mine:load")
            assert found.superclass_of_class == expected
            assert found.superclass_names == ("p", "q")


class TestDatasets:
    @pytest.mark.parametrize(
        ("made", "n", "names"),
        [
            (Examples(), N, ("a", "b", "c")),
            (Subset(Examples(), range(6)), 6, ("a", "b", "c")),
            (Subset(Subset(Examples(), range(9)), range(6)), 6, ("a", "b", "c")),
            (TensorDataset(X, Y), N, ("0", "1", "2")),
            (Examples(lambda i: (X[i].requires_grad_(), Y[i])), N, ("a", "b", "c")),
            ([(X[0], 0), (X[1], 1), (X[2], 2)], 3, ("0", "1", "2")),
        ],
    )
    def test_names_come_with_them(self, made: Any, n: int, names: tuple[str, ...]) -> None:
        """
        `classes` of a data set, and of the one that it is a part of.
        """
        found = labelled(made, "mine:load")

        assert len(found.validation) == n
        assert found.class_names == names

    @pytest.mark.parametrize("classes", [3, None, []])
    def test_classes_that_are_no_names(self, classes: Any) -> None:
        """
        Some data sets count them: then they are numbered.
        """
        made = Examples()
        made.classes = classes

        assert labelled(made, "mine:load").class_names == ("0", "1", "2")

    @pytest.mark.parametrize(
        ("item", "said"),
        [
            (lambda i: (X[i], float(Y[i]) + 0.5), "labels are float64.*expected integers"),
            (lambda i: (X[i], torch.eye(3)[Y[i]]), r"labels are float32 of shape \(12, 3\)"),
            (lambda i: (X[i], "cat"), "labels are <U3"),
            (lambda i: (X[i], int(Y[i]), i), "no pairs .* but tuple"),
            (lambda i: {"x": X[i], "y": int(Y[i])}, "no pairs .* but dict"),
            (lambda i: ((X[i], X[i]), int(Y[i])), "several inputs without names: give a mapping"),
            (lambda i: ([X[i], X[i]], int(Y[i])), "several inputs without names"),
            (
                lambda i: (X[i, : 3 + i % 2], int(Y[i])),
                r"several shapes, such as \(3,\) and \(4,\)",
            ),
            (lambda i: ({"a": X[i]} if i else {}, 0), "the first has none by name"),
            (lambda i: ({"a": X[i]} | ({"b": X[i]} if i else {}), 0), "the first has a by name"),
            (lambda i: (X[i] if i else {"a": X[i]}, 0), "the first has a by name"),
            (lambda i: (Image.new("RGB", (4, 4)), int(Y[i])), "inputs are images of PIL"),
            (lambda i: (X[i].to_sparse(), int(Y[i])), "that is sparse_coo: expected a dense one"),
        ],
    )
    def test_items_of_another_kind(self, item: Any, said: str) -> None:
        """
        Nothing is rounded, stacked or left out to make them fit.
        """
        with pytest.raises(DataError, match=said):
            labelled(Examples(item), "mine:load")

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            (((X, Y), (X, Y)), "there are 2 splits: return {'train'"),
            (((X, Y), (X, Y), (X, Y)), "there are 3 splits"),
            (tuple(random_split(Examples(), [6, 6])), "there are 2 splits"),
            (random_split(Examples(), [6, 6]), "there are 2 splits"),
            ((X, Y, X, Y), "there are 4 values"),
            (X, "no pairs .* but Tensor"),
            (DataLoader(Examples(), 4), "it is a DataLoader: expected"),
            (None, "it is a NoneType"),
            ("mnist", "it is a str"),
            (iter([X]), "it is a list_iterator"),
        ],
    )
    def test_what_is_no_data_set(self, made: Any, said: str) -> None:
        """
        Splits side by side, batches, and what is no data at all.
        """
        with pytest.raises(DataError, match=said):
            labelled(made, "mine:load")


class TestInputs:
    @pytest.mark.parametrize(
        "inputs",
        [
            X,
            X.numpy(),
            X.clone().requires_grad_(),
            torch.nn.Parameter(X),
            X.bfloat16(),  # exact, for these numbers
            X.half(),
            X.double(),
            list(X),
            tuple(X),
            X.tolist(),
            [x.numpy() for x in X],
            pd.DataFrame(X.numpy()),
            X.numpy().astype(">f4"),
            np.asfortranarray(X.numpy()),
            X.numpy()[::-1][::-1],
            torch.complex(torch.zeros_like(X), -X).conj().imag,
            np.ma.masked_array(X.numpy(), mask=False),
        ],
    )
    def test_arrays_of_any_kind(self, inputs: Any) -> None:
        """
        On whatever device, in whatever order of bytes: the same numbers, which torch takes.
        """
        found = of(inputs).validation.inputs

        np.testing.assert_array_equal(found, X)
        torch.from_numpy(found)

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            (X.to_sparse(), "that is sparse_coo: expected a dense one"),
            (scipy.sparse.csr_matrix(X.numpy()), r"inputs are sparse \(csr_matrix\).*toarray"),
            (scipy.sparse.coo_array(X.numpy()), r"inputs are sparse \(coo_array\)"),
            ([torch.ones(3 + i % 2) for i in range(N)], r"several shapes.*pad or crop"),
            ([[1.0] * (3 + i % 2) for i in range(N)], "cannot be made one array.*pad"),
            (
                np.array([np.ones(3 + i % 2) for i in range(N)], dtype=object),
                "several shapes.*pad or crop",
            ),
            ([Image.new("L", (4, 4))] * N, "inputs are images of PIL"),
            (Image.new("L", (4, 4)), "inputs are images of PIL"),
            (X.to("meta"), "on the meta device"),
            (X.to(torch.complex64), "dtype complex64: expected numbers"),
            (np.array(["a"] * N), "dtype <U1: expected numbers"),
            (np.ma.masked_array(X.numpy(), mask=X.numpy() > 3), "have masked values"),
            ((X, X), "several inputs without names"),
            ([X, X], "several inputs without names"),
            ({"a": X, "b": X[:3]}, "expected one n for all"),
            ({"a": X, "b": 3}, "inputs 'b' are a int"),
            ({"a": X, "b": torch.tensor(3)}, "inputs 'b' are one value"),
            (5, "inputs are a int: expected an array"),
            (iter(X), "expected an array, tensor or list"),
            (X[:0], "at least one example"),
        ],
    )
    def test_what_is_no_array(self, inputs: Any, said: str) -> None:
        """
        Is said as what it is.
        """
        with pytest.raises(DataError, match=said):
            of(inputs)

    def test_nested_tensors(self) -> None:
        """
        Of several lengths in one: no array either.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(4)] * 6)

        with pytest.raises(DataError, match="a tensor that is nested"):
            of(nested)

    def test_bytes_of_images(self) -> None:
        """
        Whole numbers stay what they are: a network that scales them itself takes them.
        """
        assert of((X * 4).byte()).validation.inputs.dtype == np.uint8
