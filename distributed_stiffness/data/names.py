"""What classes are called, in the order of their labels, from whatever a user gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from distributed_stiffness.errors import DataError


def in_label_order(given: Any, what: str) -> tuple[str, ...]:
    """Return the names of labels 0, 1, 2, …

    Args:
        given: a sequence of names; a mapping of them by label, as id2label of Hugging Face; or of
            labels by name, as class_to_idx of torchvision.
        what: for messages ("class_names of mine:load").

    Raises:
        DataError: it is something else, has no order, or not each label has a name.
    """
    if isinstance(given, Mapping):
        names: Iterable[Any] = _by_label(given, what)
    elif isinstance(given, str | bytes | set | frozenset) or not isinstance(given, Iterable):
        why = "a set has no order" if isinstance(given, set | frozenset) else "it is one value"
        raise DataError(
            f"{what} is {_shown(given)} ({why}): expected a list of names in the order of the"
            " labels, or a mapping such as {0: 'cat', 1: 'dog'}"
        )
    else:
        names = given
    return tuple(_text(name, what) for name in names)


def _by_label(given: Mapping[Any, Any], what: str) -> list[Any]:
    """Return the values of a mapping by label, or its keys by the labels that they have."""
    labels = [_label(key) for key in given]
    pairs = list(zip(labels, given.values(), strict=True))
    if None in labels:
        labels = [_label(value) for value in given.values()]
        pairs = list(zip(labels, given.keys(), strict=True))
    if None in labels or sorted(label for label in labels if label is not None) != list(
        range(len(given))
    ):
        raise DataError(
            f"{what} is {_shown(dict(given))}: expected a name for each label from 0 on, such as"
            f" {{0: 'cat', 1: 'dog'}}; here the labels are 0 to {len(given) - 1}"
        )
    by_label = dict(pairs)
    return [by_label[label] for label in range(len(given))]


def _label(value: Any) -> int | None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def _text(name: Any, what: str) -> str:
    if isinstance(name, bytes):
        return name.decode("utf-8", "replace")
    if isinstance(name, str | int | float | np.integer | np.floating):
        return str(name)
    raise DataError(f"{what} has {_shown(name)}: expected text for each class")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
