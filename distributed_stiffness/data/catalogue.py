"""Data sets by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distributed_stiffness.data import cifar, foreign, mnist
from distributed_stiffness.data.examples import LabelledData, Split
from distributed_stiffness.data.labels import subset
from distributed_stiffness.data.published import Published
from distributed_stiffness.errors import DataError
from distributed_stiffness.factories import import_factory
from distributed_stiffness.paths import Location, local
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
    directory: Location | None = None,
    download: bool = True,
    accept_unverified: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> LabelledData:
    """Load a data set.

    `digits` ships with scikit-learn and needs no files. The sets in `NAMES` that are published as
    files are looked for in `directory` (by default $STIFFNESS_DATA_DIR, else
    ~/.cache/distributed_stiffness/data), laid out as torchvision lays them out, and are fetched
    when they are missing. `package.module:factory` calls a function of your own with `options`;
    what it may return is said at `foreign.labelled`, where `npz:FILE`, `images:FOLDER` and
    `hf:FOLDER` are too.

    >>> load("digits").train.inputs.shape
    (1297, 1, 8, 8)

    Raises:
        DataError: there is no such data set, its files are missing and cannot be had, they are
            not the published ones and that was not accepted, or they hold something else.
    """
    if ":" in name:
        return _foreign(name, dict(options or {}))
    if options:
        raise DataError(
            f"the data set {name!r} takes no options, got {', '.join(options)}: leave them out"
        )
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
    raise DataError(
        f"no data set is called {name!r}: expected {', '.join(NAMES)}; for your own,"
        " package.module:factory, npz:FILE, images:FOLDER or hf:FOLDER"
    )


def data_directory(directory: Location | None = None) -> Path:
    """Return the folder of the data sets: the one given, $STIFFNESS_DATA_DIR, or the default.

    Raises:
        DataError: it is a URL, or no path.
    """
    chosen = directory or os.environ.get(DIRECTORY_VARIABLE) or DEFAULT_DIRECTORY
    return local(chosen, "the data directory", DataError)


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


def _foreign(name: str, options: dict[str, Any]) -> LabelledData:
    """Load data of the user's, by a function or from files."""
    kind, _, where = name.partition(":")
    if kind in foreign.READERS:
        read, what = foreign.READERS[kind], f"{kind}:"
        arguments: tuple[Any, ...] = (local(where, f"the place of {kind}:", DataError),)
    else:
        read, what, arguments = import_factory(name, "data set", DataError), name, ()
    try:
        inspect.signature(read).bind(*arguments, **options)
    except TypeError as error:
        known = list(inspect.signature(read).parameters)[len(arguments) :]
        raise DataError(
            f"data set {name!r} does not take these options: {error}; {what} takes"
            f" {', '.join(known) or 'none'}"
        ) from error
    except ValueError:  # a function without a signature: it says itself what it does not take
        pass
    try:
        return foreign.labelled(read(*arguments, **options), name)
    except DataError:
        raise
    except Exception as error:  # the user's own code: any type of error
        raise DataError(f"data set {name!r} failed: {type(error).__name__}: {error}") from error
