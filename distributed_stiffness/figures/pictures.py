"""The examples of a store as pictures, where its data set is at hand."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness import data
from distributed_stiffness.errors import DataError


def pictures_of(
    attrs: Mapping[Hashable, Any], examples: xr.Dataset, *, directory: str | None = None
) -> np.ndarray | None:
    """Return the images of examples, or None where they cannot be had without asking anyone.

    A store holds the positions of its examples in their data set, not their inputs. Those of a data
    set with a name (`data.NAMES`) are read from `directory` (None: $STIFFNESS_DATA_DIR, or the
    default); nothing is downloaded, and no function of a study's is called.

    Args:
        attrs: of the store.
        examples: with the coordinates index, label and split along `example`.
        directory: of data sets.

    Returns:
        (E, height, width) or (E, height, width, 3), as stored.
    """
    name = str(attrs.get("dataset", ""))
    if name not in data.NAMES or not {"index", "label", "split"} <= set(examples.coords):
        return None
    unverified = not attrs.get("dataset_verified", True)
    try:
        labelled = data.load(
            name, directory=directory, download=False, accept_unverified=unverified
        )
    except DataError:
        return None
    of_split = {"train": labelled.train, "validation": labelled.validation}
    index, labels = examples["index"].values, examples["label"].values
    splits = examples["split"].values.astype(str)
    out: np.ndarray | None = None
    for which, split in of_split.items():
        here = splits == which
        if not here.any():
            continue
        if split is None or split.inputs.ndim != 4 or index[here].max() >= len(split):
            return None
        # Labels of training examples may have been permuted.
        if which == "validation" and not np.array_equal(split.labels[index[here]], labels[here]):
            return None
        if out is None:
            out = np.zeros((len(index), *split.inputs.shape[1:]), dtype=split.inputs.dtype)
        out[here] = split.inputs[index[here]]
    if out is None or out.shape[1] not in (1, 3):
        return None
    return out[:, 0] if out.shape[1] == 1 else np.moveaxis(out, 1, -1)
