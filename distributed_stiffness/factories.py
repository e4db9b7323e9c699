"""`package.module:factory`: a function of the user's, by name; and the name of such a function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed_stiffness.errors import StiffnessError, StudyError


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
            f" file or package in {here}, installed in this Python, or on PYTHONPATH"
        ) from cause
    if not callable(factory):
        raise error(f"{what} {name!r} is a {type(factory).__name__}: expected a function")
    return factory  # type: ignore[no-any-return]  # callable() tells mypy nothing


def import_loss(name: str) -> Callable[..., Any] | str:
    """Return the loss of a study: "cross_entropy", or the function that the name stands for.

    Raises:
        StudyError: there is no such function.
    """
    return name if name == "cross_entropy" else import_factory(name, "loss", StudyError)


def name_of(function: str | Callable[..., Any], what: str) -> str:
    """Return the name by which every process can import a function; a name stays.

    Raises:
        StudyError: it has none, being defined in a notebook, a script or another function.
    """
    if isinstance(function, str):
        return function
    if isinstance(function, os.PathLike):
        raise StudyError(
            f"{what} is the path {os.fspath(function)!r}: expected text that says what is there,"
            " such as 'npz:FILE', 'images:FOLDER' or 'hf:FOLDER', or 'module:function'"
        )
    module, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not qualified or "<" in qualified or "." in qualified:
        raise StudyError(
            f"{what} is {function!r}, which other processes cannot import: put it into a module"
            f" (a file beside this one) and give its name, {what}='module:function'"
        )
    return f"{module}:{qualified}"
