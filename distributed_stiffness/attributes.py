"""Attributes of a store's group as every reader takes them: texts and numbers.

netCDF knows neither mappings nor booleans: what is a mapping or a list is kept as JSON text, what
is true or false as 1 or 0. Stores that were begun before kept them as they are; both are read.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

# Those that are kept as JSON text, and handed out as what they are. (`study`, `class_names` and
# `superclass_names` are JSON text for every reader, this package among them.)
STRUCTURED = frozenset(
    {"fingerprint", "plan", "weights", "versions", "whole_matrix_check", "distances"}
)


def encoded(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes as they are stored."""
    return {name: _encoded(name, value) for name, value in attributes.items()}


def decoded(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return stored attributes with their mappings and lists, whoever stored them.

    What cannot be read, in a store that somebody edited, stays text.
    """
    return {str(name): _decoded(name, value) for name, value in attributes.items()}


def _encoded(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, Mapping | list | tuple):
        assert name in STRUCTURED, f"{name} would not be read as what it is: name it above"
        return json.dumps(value)
    return value


def _decoded(name: Hashable, value: Any) -> Any:
    if name not in STRUCTURED or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
