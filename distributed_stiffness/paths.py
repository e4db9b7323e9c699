"""Places that a user gives, as the absolute path or the URL that they mean. Decided here alone."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote

import fsspec

from distributed_stiffness.errors import StiffnessError, StudyError

Location = str | os.PathLike[str]

_LOCAL = ("file", "local")  # schemes of fsspec for this machine's files
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{\w+\})")


def located(given: Location, what: str, error: type[StiffnessError] = StudyError) -> str:
    """Return the absolute path, or the URL, of a place that a user gives.

    `~` is a home folder, `$NAME` a variable of the environment, `file:///…` a path; what is
    relative begins at the working directory. Nothing need be there yet.

    Args:
        given: text, a `pathlib.Path` or any other path.
        what: that lies there, for messages ("store").
        error: raised when no place is meant.
    """
    try:
        text = os.fsdecode(given)
    except TypeError as cause:
        raise error(
            f"{what} is {given!r}: expected a path or a URL, as text or a pathlib.Path"
        ) from cause
    if not text.strip() or "\0" in text:
        raise error(f"{what} is {text!r}: expected a path or a URL")
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() not in _LOCAL:
        rest = _with_variables(rest, text, what, error)
        return f"{scheme.lower()}://{rest.rstrip('/') or rest}"
    path = _of_file_url(text)
    if path == text:
        _refuse_half_a_url(text, what, error)
    if not os.path.lexists(path):
        path = _with_variables(path, text, what, error)
    try:
        is_home = path == "~" or path.startswith("~/")
        here = Path(path).expanduser() if is_home or not os.path.lexists(path) else Path(path)
    except RuntimeError as cause:
        raise error(
            f"{what} is {text!r}, and {path.partition('/')[0]} is the home of no user; for a folder"
            f" that is called so write './{path}'"
        ) from cause
    return str(here.resolve() if here.name == ".." else here.absolute())


def local(given: Location, what: str, error: type[StiffnessError] = StudyError) -> Path:
    """Return the absolute path of a place that must be on this machine; arguments of `located`."""
    path = located(given, what, error)
    if is_url(path):
        raise error(f"{what} is {path}: expected a folder or file of this machine, not a URL")
    return Path(path)


def as_written(given: Location, where: str) -> str:
    """Return `where`, what `located` made of `given`; relative, where that is how it was given."""
    path = Path(os.fsdecode(given))
    is_relative = not path.is_absolute() and str(path.absolute()) == where
    return str(path) if is_relative else where


def is_url(place: str) -> bool:
    """Whether a place, as `located` returns it, is a URL."""
    return "://" in place


def require_writable(
    folder: Path, what: str, remedy: str, error: type[StiffnessError] = StudyError
) -> None:
    """Refuse a folder that cannot be written or made. Tries it, and leaves nothing behind.

    Args:
        folder: absolute; need not be there.
        what: would be written, for the message ("figures").
        remedy: where else to write.
        error: raised when it cannot.
    """
    there = folder
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            kind = "a file" if there.is_file() else "no folder"
            raise NotADirectoryError(f"{there} is {kind}")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as cause:
        why = cause.strerror or str(cause)
        where = f" in {there}" if there != folder and cause.strerror else ""
        raise error(f"cannot write {what} to {folder}: {why}{where}; {remedy}") from cause


def _of_file_url(text: str) -> str:
    """Return the path of a file:// URL; other text as it is."""
    match = re.match(r"(?:file|local)://|file:(?=/)", text, re.IGNORECASE)
    if match is None:
        return text
    path = text[match.end() :]
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    # Path.as_uri() writes a blank as %20, fsspec and xarray take it as it stands.
    return path if os.path.lexists(path) else unquote(path)


def _refuse_half_a_url(text: str, what: str, error: type[StiffnessError]) -> None:
    """Refuse what a URL becomes in a pathlib.Path: s3:/bucket."""
    scheme, colon, rest = text.partition(":/")
    if colon and scheme.lower() in fsspec.available_protocols() and not os.path.lexists(scheme):
        raise error(
            f"{what} is {text!r}, which is no URL: expected {scheme}://{rest.lstrip('/')}, as text,"
            " for a pathlib.Path drops a slash"
        )


def _with_variables(path: str, text: str, what: str, error: type[StiffnessError]) -> str:
    expanded = os.path.expandvars(path)
    unknown = _VARIABLE.search(expanded)
    if unknown:
        raise error(
            f"{what} is {text!r}, and the environment has no {unknown[0]}: set it, or write out"
            " what it stands for"
        )
    return expanded
