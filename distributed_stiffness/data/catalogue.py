"""Data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distributed_stiffness.data import cifar, mnist
from distributed_stiffness.data.examples import LabelledData, Split
from distributed_stiffness.data.labels import subset
from distributed_stiffness.data.published import Published
from distributed_stiffness.errors import DataError
from distributed_stiffness.factories import import_factory
from distributed_stiffness.progress import Progress

DIRECTORY_VARIABLE = "STIFFNESS_DATA_DIR"
DEFAULT_DIRECTORY = "~/.cache/distributed_stiffness/data"

PUBLISHED: Mapping[str, Callable[[], Published]] = {
    "mnist": mnist.mnist,
    "fashion_mnist": mnist.fashion_mnist,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
}
NAMES = ("digits", *PUBLISHED)


def load(
    name: str,
    *,
    directory: str | Path | None = None,
    download: bool = True,
    accept_unverified: bool = False,
    progress: Progress | None = None,
) -> LabelledData:
    """Load a data set.

    `digits` ships with scikit-learn and needs no files. The sets in `NAMES` that are published as
    files are looked for in `directory` (by default $STIFFNESS_DATA_DIR, else
    ~/.cache/distributed_stiffness/data), laid out as torchvision lays them out, and are fetched
    when they are missing. `package.module:factory` calls a function of your own with no arguments:
    it returns a LabelledData, or a mapping with "train" and "validation" as (inputs, labels),
    "class_names", and maybe "superclass_of_class" and "superclass_names".

    >>> load("digits").train.inputs.shape
    (1297, 1, 8, 8)

    Raises:
        DataError: there is no such data set, its files are missing and cannot be had, they are
            not the published ones and that was not accepted, or they hold something else.
    """
    if name == "digits":
        return _digits()
    if name in PUBLISHED:
        return PUBLISHED[name]().load(
            name,
            data_directory(directory),
            download=download,
            accept_unverified=accept_unverified,
            progress=progress or Progress(quiet=True),
        )
    if ":" in name:
        return _from_factory(name)
    raise DataError(
        f"no data set is called {name!r}: expected {', '.join(NAMES)}, or package.module:factory"
        " for your own"
    )


def data_directory(directory: str | Path | None = None) -> Path:
    """Return the folder of the data sets: the one given, $STIFFNESS_DATA_DIR, or the default."""
    chosen = directory or os.environ.get(DIRECTORY_VARIABLE) or DEFAULT_DIRECTORY
    return Path(chosen).expanduser().absolute()


def _digits() -> LabelledData:
    """Return 1,797 handwritten digits; the split is ours, always the same."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.uint8).reshape(-1, 1, 8, 8)  # whole numbers, 0 to 16
    everything = Split(inputs=pixels, labels=labels)
    validation, index = subset(everything, 500, seed=0, n_classes=10)
    rest = np.setdiff1d(np.arange(len(everything)), index)
    return LabelledData(
        name="digits",
        train=Split(inputs=everything.inputs[rest], labels=everything.labels[rest]),
        validation=validation,
        class_names=mnist.DIGITS,
        verified=True,
        source="Optical recognition of handwritten digits (UCI), as shipped with scikit-learn;"
        " 500 of its 1,797 images drawn as validation split.",
    )


def _from_factory(name: str) -> LabelledData:
    factory = import_factory(name, "data set", DataError)
    try:
        made = factory()
    except Exception as error:  # the user's own code: any type of error
        raise DataError(f"data set {name!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(made, LabelledData):
        return replace(made, name=name, verified=False)
    if not isinstance(made, Mapping):
        raise DataError(
            f"{name} returned a {type(made).__name__}: expected a LabelledData or a mapping"
        )
    above, names = made.get("superclass_of_class"), made.get("superclass_names")
    return LabelledData(
        name=name,
        train=_split_of(made, "train", name),
        validation=_split_of(made, "validation", name),
        class_names=tuple(_value_of(made, "class_names", name)),
        superclass_of_class=None if above is None else tuple(int(k) for k in above),
        superclass_names=None if names is None else tuple(names),
        verified=False,
        source=f"Made by {name}.",
    )


def _split_of(made: Mapping[str, Any], key: str, name: str) -> Split:
    pair = _value_of(made, key, name)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"{name}: {key!r} is no pair: expected (inputs, labels)")
    return Split(inputs=pair[0], labels=pair[1])


def _value_of(made: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in made:
        raise DataError(
            f"{name} returned no {key!r}: expected 'train' and 'validation' as (inputs, labels),"
            " and 'class_names'"
        )
    return made[key]
