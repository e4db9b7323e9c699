"""From the text of an option to its value; a message names the option and what is expected."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from distributed_stiffness.errors import StudyError
from distributed_stiffness.paths import Location, local
from distributed_stiffness.study import Study, build_study


def read_study(file: Location) -> Study:
    """Read a study file: JSON, YAML or TOML, by its suffix; the same fields in each.

    Raises:
        StudyError: it cannot be read, or is no study.
    """
    path = local(file, "the study file")
    parse = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    try:
        fields = parse.get(path.suffix.lower(), json.loads)(path.read_text())
    except OSError as error:
        raise StudyError(f"cannot read the study file {path}: {error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise StudyError(
            f"{path} cannot be parsed: {error}. Expected JSON, or YAML or TOML where the name ends"
            " so"
        ) from error
    return build_study(lambda: Study.model_validate(fields))


def joined(values: Iterable[float]) -> str:
    """Write numbers with commas between, as `split` reads them."""
    return ",".join(map(repr, values))


def split(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Read numbers with commas between.

    Raises:
        StudyError: they are none.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise StudyError(
            f"{option} is {text!r}: expected numbers with commas between, such as 1,2 ({error})"
        ) from error


def count(text: str) -> int | None:
    """Read a number of examples; None for all.

    Raises:
        StudyError: it is neither a number nor 'all'.
    """
    if text == "all":
        return None
    if not text.isdigit():
        raise StudyError(f"--examples is {text!r}: expected a number or 'all'")
    return int(text)


def rows_range(text: str | None) -> tuple[int, int] | None:
    """Read FIRST:LAST.

    Raises:
        StudyError: it is not of that form.
    """
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise StudyError(f"--rows is {text!r}: expected FIRST:LAST, such as 0:5000")
    return int(first), int(last)


def named_values(option: str, pairs: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE, given any number of times; values are JSON, else text.

    Raises:
        StudyError: one has no "=".
    """
    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise StudyError(f"{option} is {pair!r}: expected NAME=VALUE")
        try:
            values[name] = json.loads(value)  # 3, true, [500,300]
        except ValueError:
            values[name] = value
    return values


def n_bytes(text: str | None) -> int | None:
    """Read a size such as 4GB.

    Raises:
        StudyError: it is none.
    """
    if text is None:
        return None
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}
    number = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(number) :]
    try:
        return round(float(number) * units[unit])
    except (ValueError, KeyError) as error:
        raise StudyError(f"--memory is {text!r}: expected a size such as 4GB or 800MB") from error
