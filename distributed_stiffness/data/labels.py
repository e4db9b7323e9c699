"""Which labels, and which examples: permuted labels, and draws that keep the classes balanced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distributed_stiffness.data.examples import Split
from distributed_stiffness.errors import DataError


def permute_labels(labels: np.ndarray, *, seed: int, share: float = 1.0) -> np.ndarray:
    """Return the labels with a random share of them permuted among themselves.

    The counts of the classes stay what they were, so that a network cannot tell permuted labels
    from true ones by their frequency. With C balanced classes about 1/C of the permuted labels
    are right by chance.

    Raises:
        DataError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of permuted labels is {share}: expected 0 to 1")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    permuted = labels.copy()
    # `chosen` is in random order and its sorted twin is not: together they are the permutation.
    permuted[np.sort(chosen)] = labels[chosen]
    return permuted


def require_every_class(labels: np.ndarray, class_names: Sequence[str], where: str) -> None:
    """Check that every class has an example.

    Raises:
        DataError: a class has none; its mean stiffness would be a mean over nothing.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    absent = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if absent:
        also = f" (nor of {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise DataError(
            f"no example of class {absent[0]!r}{also} in the {where}, {len(labels):,} in all;"
            " expected at least one of each class: take more examples, or name only classes that"
            " have some"
        )


def subset(
    split: Split,
    n: int | None,
    *,
    seed: int,
    n_classes: int,
    every_class: bool = True,
    where: str = "split",
    option: str = "--examples",
) -> tuple[Split, np.ndarray]:
    """Draw n examples at random, with the classes in the proportions of the split.

    A class gets its share rounded up or down, but at least one example where the split has one.
    Returns the examples in the order of the split, and their int64 positions in it. With n None,
    all. Without `every_class`, n may be less than the classes, and then not every class gets one.
    With equally large classes, the same seed and multiples of their number, a smaller draw
    is part of a larger one.

    Raises:
        DataError: n is more than the split has, or less than one for each class.
    """
    labels = split.labels
    n = len(labels) if n is None else n
    if n > len(labels):
        raise DataError(
            f"asked for {n:,} examples, the {where} has {len(labels):,}; use {option}"
            f" {len(labels)} or less"
        )
    if n < n_classes and every_class:
        raise DataError(
            f"asked for {n:,} examples of {n_classes} classes: expected at least one of each; use"
            f" {option} {n_classes} or more"
        )
    if n == len(labels):
        return split, np.arange(n, dtype=np.int64)
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=n_classes)
    if n < np.count_nonzero(counts):
        index = np.sort(rng.permutation(len(labels))[:n]).astype(np.int64)
        return Split(inputs=split.inputs[index], labels=labels[index]), index
    # Every class is shuffled whole, so that what is drawn from one does not depend on how many.
    drawn = [
        rng.permutation(np.flatnonzero(labels == k))[:wanted]
        for k, wanted in enumerate(_proportional(counts, n))
    ]
    index = np.sort(np.concatenate(drawn)).astype(np.int64)
    return Split(inputs=split.inputs[index], labels=labels[index]), index


def _proportional(counts: np.ndarray, n: int) -> np.ndarray:
    """Return n places shared out over the classes: largest remainders, one for each at least."""
    share = n * counts / counts.sum()
    places: np.ndarray = np.maximum(np.floor(share).astype(np.int64), counts > 0)
    while places.sum() < n:
        places[np.argmax(share - places)] += 1
    while places.sum() > n:  # small classes were lifted to one place: the largest excess pays
        places[np.argmax(np.where(places > 1, places - share, -np.inf))] -= 1
    return places
