"""`package.module:factory`: a function of the user's, by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed_stiffness.errors import StiffnessError


def import_factory(name: str, what: str, error: type[StiffnessError]) -> Callable[..., Any]:
    """Import a factory; the working directory is looked into too, as `python -m` does.

    Args:
        name: package.module:factory.
        what: of which it is one, for the message ("model").
        error: raised when it cannot be had.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as cause:  # ValueError: an empty name
        raise error(
            f"{what} {name!r} cannot be imported ({cause}): expected package.module:factory, of a"
            " module that this Python can import"
        ) from cause
    if not callable(factory):
        raise error(f"{what} {name!r} is a {type(factory).__name__}: expected a function")
    return factory  # type: ignore[no-any-return]  # callable() tells mypy nothing
