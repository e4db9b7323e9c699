"""Examples and their labels, as values: one split, and a data set of two."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distributed_stiffness.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)  # arrays have no single truth value to compare by
class Split:
    """Inputs and labels of one split, in one order.

    Inputs are raw, as stored: uint8 images with channels first, (n, 1, 28, 28) or (n, 3, 32, 32),
    or arrays of floats, or of tokens, with n first. A network with several inputs has a structured
    array (n,) with a field for each, such as input_ids and attention_mask (`structured`). Labels of
    any integer type are kept as int64.

    Raises:
        DataError: lengths differ, nothing is in it, labels are not integers, or an input is not a
            finite number.
    """

    inputs: np.ndarray  # (n, ...), or (n,) structured
    labels: np.ndarray  # (n,), int64

    def __post_init__(self) -> None:
        inputs, labels = np.asarray(self.inputs), np.asarray(self.labels)
        _check_inputs(inputs)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"labels are {labels.dtype} of shape {labels.shape}: expected integers (n,)"
            )
        if len(inputs) != len(labels):
            raise DataError(
                f"a split has {len(inputs):,} inputs and {len(labels):,} labels: expected one label"
                " for each input"
            )
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledData:
    """A data set: training and validation split, and what its classes are called.

    There may be no training split: the examples are then all that there is.

    Raises:
        DataError: a label is outside the classes, there are fewer than two classes, a name comes
            twice, the splits differ in shape or dtype, or the super-classes do not fit.
    """

    name: str
    train: Split | None = None
    validation: Split
    class_names: tuple[str, ...]
    superclass_of_class: tuple[int, ...] | None = None  # index into superclass_names
    superclass_names: tuple[str, ...] | None = None
    verified: bool  # the published checksums, or data that ship in a package
    source: str  # one sentence: where the examples come from

    def __post_init__(self) -> None:
        _check_names(self.class_names, "class")
        if len(self.class_names) < 2:
            raise DataError(f"{self.name} has {len(self.class_names)} class: expected at least 2")
        for where, split in self._splits():
            _check_label_range(split.labels, len(self.class_names), f"{self.name}, {where} split")
        if self.train is not None:
            _check_same_kind(self.train.inputs, self.validation.inputs, self.name)
        _check_superclasses(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input; of the first, where there are several."""
        inputs = self.validation.inputs
        if inputs.dtype.names:
            return tuple(inputs.dtype[0].shape)
        return inputs.shape[1:]

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def content_hash(self) -> str:
        """Return SHA-256 over the bytes, shapes, dtypes and order of both splits, and the names."""
        digest = hashlib.sha256()
        for _, split in self._splits():
            for array in (split.inputs, split.labels):
                # Shape and dtype first: the same bytes read in another way are other data.
                kind = array.dtype.descr if array.dtype.names else array.dtype.str
                digest.update(f"{kind}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        names = [self.class_names, self.superclass_of_class, self.superclass_names]
        digest.update(json.dumps(names).encode())
        return digest.hexdigest()

    def _splits(self) -> Iterator[tuple[str, Split]]:
        if self.train is not None:
            yield "train", self.train
        yield "validation", self.validation


def structured(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return several inputs by name, each (n, ...), as one structured array (n,).

    Raises:
        DataError: they are not equally many.
    """
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) > 1:
        raise DataError(f"inputs by name have lengths {lengths}: expected one n for all")
    fields = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    together = np.empty(next(iter(lengths.values())), dtype=fields)
    for name, array in arrays.items():
        together[name] = array
    return together


def _check_inputs(inputs: np.ndarray) -> None:
    if inputs.dtype.names:
        for name in inputs.dtype.names:
            _check_inputs(inputs[name])
        return
    if inputs.dtype.kind not in "buif":
        raise DataError(f"inputs have dtype {inputs.dtype}: expected numbers")
    if inputs.ndim < 2 or inputs.size == 0:
        raise DataError(
            f"inputs have shape {inputs.shape}: expected (n, ...), with at least one example"
        )
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        where = np.argwhere(~np.isfinite(inputs))[0]
        value = inputs[tuple(where)]
        raise DataError(f"input {where[0]:,} holds {value}: expected finite numbers")


def _check_names(names: tuple[str, ...], what: str) -> None:
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{what} names are {names!r}: expected text")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{what} name {twice[0]!r} comes more than once: give each its own")


def _check_label_range(labels: np.ndarray, n_classes: int, where: str) -> None:
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise DataError(
            f"{where}: label {outside[0]} is outside 0 to {n_classes - 1}, and {n_classes} classes"
            " are named; name them all, or count labels from 0"
        )


def _check_same_kind(train: np.ndarray, validation: np.ndarray, name: str) -> None:
    if (train.shape[1:], train.dtype) != (validation.shape[1:], validation.dtype):
        raise DataError(
            f"{name}: a training input is {train.dtype} {train.shape[1:]}, a validation input is"
            f" {validation.dtype} {validation.shape[1:]}: expected the same"
        )


def _check_superclasses(data: LabelledData) -> None:
    above, names = data.superclass_of_class, data.superclass_names
    if above is None and names is None:
        return
    if above is None or names is None:
        raise DataError(
            f"{data.name}: superclass_of_class and superclass_names go together; give both or none"
        )
    _check_names(names, "super-class")
    if len(above) != data.n_classes or not all(0 <= k < len(names) for k in above):
        raise DataError(
            f"{data.name}: superclass_of_class is {above}: expected {data.n_classes} numbers, one a"
            f" class, from 0 to {len(names) - 1}"
        )
