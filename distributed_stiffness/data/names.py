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
    keys, values = list(given.keys()), list(given.values())
    readings = [(_labels(keys), values), (_labels(values), keys)]
    fitting = [dict(zip(labels, names, strict=True)) for labels, names in readings if labels]
    if len(fitting) > 1 and fitting[0] != fitting[1]:
        # Numbers on both sides: names are text, where labels are whole numbers.
        texts = [all(isinstance(name, str) for name in names) for names in (values, keys)]
        fitting = fitting[:1] if texts[0] else fitting[1:]
        if texts[0] == texts[1]:
            raise DataError(
                f"{what} is {_shown(dict(given))}, which may be names by label or labels by name:"
                " give a list of names in the order of the labels"
            )
    if not given:
        raise DataError(f"{what} is an empty mapping: expected a name for each label")
    if not fitting:
        raise DataError(
            f"{what} is {_shown(dict(given))}: expected a name for each label from 0 on, such as"
            f" {{0: 'cat', 1: 'dog'}}; here the labels are 0 to {len(given) - 1}"
        )
    return [fitting[0][label] for label in range(len(given))]


def _labels(values: list[Any]) -> list[int] | None:
    """Return values as labels; None: they are not 0, 1, 2, … in some order."""
    labels = [_label(value) for value in values]
    known = sorted(label for label in labels if label is not None)
    return [int(label or 0) for label in labels] if known == list(range(len(values))) else None


def _label(value: Any) -> int | None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def _text(name: Any, what: str) -> str:
    if isinstance(name, bytes):
        return name.decode("utf-8", "replace")
    if isinstance(name, str) and "\0" in name:
        raise DataError(f"{what} has {_shown(name)}, with a character of code 0: expected text")
    if isinstance(name, str | int | float | np.integer | np.floating):
        return str(name)
    raise DataError(f"{what} has {_shown(name)}: expected text for each class")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
