"""Tables that say of which learning rate, seed and iteration each checkpoint is."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import fsspec
import numpy as np

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.importing.places import FIELDS, Files, distinct, field_of, place_of
from distributed_stiffness.paths import Location, as_written, is_url, located

Row = Mapping[str, Any]


@runtime_checkable
class DataFrame(Protocol):
    """A table of pandas, or one that has its methods."""

    columns: Any
    index: Any

    def __getitem__(self, name: Any) -> Any:
        """Return a column."""

    def reset_index(self) -> Any:
        """Return it with its index as a column."""


Table = Location | DataFrame | Iterable[Row] | Mapping[str, Sequence[Any]]

_DELIMITERS = ",;\t|"
_EXPECTED = "expected a CSV file, or rows, with the columns path, learning_rate, seed, iteration"


def from_table(table: Table) -> Files:
    """Place the files that a table lists.

    Args:
        table: a CSV file (or URL) with the columns path, learning_rate, seed and iteration, of
            which all but path may be missing; or such rows, columns by name, or a pandas DataFrame.
            Paths are relative to the folder of the CSV file. Its cells are told apart by commas,
            semicolons or tabs, as spreadsheets write them.

    Raises:
        CheckpointError: the table cannot be read, a file is not there, or two are of one place.
    """
    folder, where = "", "the table"
    if isinstance(table, str | bytes | os.PathLike):
        file = located(table, "table", CheckpointError)
        where = os.fsdecode(table)
        rows: Sequence[Row] = _read(file, where)
        folder = os.path.dirname(as_written(table, file))  # noqa: PTH120 (or a URL)
    else:
        rows = _rows(table)
    found, given_at = [], {}
    for number, row in enumerate(rows, 1):
        if all(_is_missing(value) for value in row.values()):
            continue  # a spreadsheet's last rows
        at = f"row {number} of {where}"
        columns = {_plain(name): value for name, value in row.items()}
        path = columns.get("path")
        if _is_missing(path):
            raise CheckpointError(f"{at} has no path: its columns are {', '.join(map(str, row))}")
        given = [
            (field, str(value).strip())
            for name, value in row.items()
            if (field := field_of(_plain(name))) and not _is_missing(value)
        ]
        given_at[at] = {field for field, _ in given}
        found.append((_there(path, folder, at), place_of(given, at)))
    if not found:
        raise CheckpointError(f"{where} has no rows: {_EXPECTED}")
    for field in FIELDS:
        without = [at for at, those in given_at.items() if field not in those]
        # 0 stands for what is not given, so that a gap beside it says the same.
        if without and any(getattr(place, field) for _, place in found):
            raise CheckpointError(
                f"{without[0]} has no {field.replace('_', ' ')}, and others have one: give it, or"
                " leave the column out"
            )
    return distinct(found, "each row needs its own learning rate, seed or iteration")


def _there(path: Any, folder: str, at: str) -> str:
    """Return the path of a row's file, relative where the table's folder is."""
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"{at} has {path!r} for the path: expected text")
    text = os.fsdecode(path)
    if not text.startswith(("~", "$", "file:")) and "://" not in text:
        text = os.path.join(folder, text)  # noqa: PTH118 (a folder may be a URL)
    where = located(text, f"the path of {at}", CheckpointError)
    if not is_url(where) and not os.path.lexists(where):
        raise CheckpointError(f"{at}: there is no file {text}")
    return as_written(text, where)


def _rows(table: Any) -> list[Row]:
    """Return the rows of a table in memory."""
    if isinstance(table, DataFrame):
        _require_columns([*table.columns, *table.index.names], "the table")
        if any(name is not None for name in getattr(table.index, "names", [])):
            table = table.reset_index()
        # Not its own rows, which widen the numbers of a column of float32.
        table = _of_columns({name: np.asarray(table[name]) for name in table.columns})
    elif hasattr(table, "to_dicts"):  # polars
        table = table.to_dicts()
    elif hasattr(table, "to_pylist"):  # pyarrow
        table = table.to_pylist()
    elif isinstance(table, Mapping):
        table = _of_columns(table)
    if not isinstance(table, Iterable):
        raise CheckpointError(f"the table is a {type(table).__name__}: {_EXPECTED}")
    rows = list(table)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise CheckpointError(
                f"row {number} of the table is a {type(row).__name__}: expected a mapping with"
                " path, learning_rate, seed and iteration"
            )
    return rows


def _require_columns(names: Sequence[Any], where: str) -> None:
    """Refuse a table that names no paths, or one column twice."""
    plain = [_plain(name) for name in names if name not in (None, "")]
    if "path" not in plain:
        raise CheckpointError(
            f"{where} has no column path, but {', '.join(map(str, names)) or 'none'}: {_EXPECTED}"
        )
    twice = [name for name in plain if plain.count(name) > 1]
    if twice:
        raise CheckpointError(f"{where} has the column {twice[0]} twice: expected it once")


def _of_columns(table: Mapping[str, Any]) -> list[Row]:
    if isinstance(table.get("path"), str | os.PathLike):
        return [table]  # a row
    try:
        columns = {name: list(column) for name, column in table.items()}
    except TypeError as error:
        raise CheckpointError(f"the table has a column that is no list: {error}") from error
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise CheckpointError(f"the table has columns of lengths {lengths}: expected one length")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, blank, or what pandas puts there."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    # NaN, NaT and pandas.NA are what is not equal to itself.
    try:
        return not isinstance(value, str | os.PathLike) and not bool(value == value)
    except (TypeError, ValueError):
        return type(value).__name__ == "NAType"


def _plain(name: Any) -> str:
    """Return the name of a column as it is looked up: "Learning Rate" is learning_rate."""
    return re.sub(r"[\s_-]+", "_", str(name).strip()).lower()


def _read(file: str, where: str) -> list[Row]:
    try:
        with fsspec.open(file, "rb") as opened:
            content: bytes = opened.read()
        text = _decoded(content, where)
        # Excel's own first line, which says what stands between cells.
        head = re.match(r"sep=(.)\n", text)
        text = text[head.end() :] if head else text
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = head[1] if head else max(_DELIMITERS, key=first.count)
        lines = csv.reader(
            io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True
        )
        cells = [line for line in lines if line]
    except (OSError, ValueError, ImportError, csv.Error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read the table {where}: {error}") from error
    if not cells:
        return []
    header = [name.strip() for name in cells[0]]
    _require_columns(header, where)
    for number, row in enumerate(cells[1:], 1):
        lacking = [name for name in header[len(row) :] if field_of(_plain(name))]
        if lacking and any(cell.strip() for cell in row):
            raise CheckpointError(
                f"row {number} of {where} has {len(row)} cells, its header {len(header)}, so that"
                f" it has no {lacking[0]}: leave its cell empty where nothing is known"
            )
        if any(cell.strip() for cell in row[len(header) :]):
            raise CheckpointError(
                f"row {number} of {where} has {len(row)} cells, its header {len(header)}: put a"
                " number with a decimal comma in quotes, or write it with a point"
            )
    return [
        {name: cell.strip() for name, cell in zip(header, row, strict=False) if name}
        for row in cells[1:]
    ]


def _decoded(content: bytes, where: str) -> str:
    """Return the text of a table: UTF-8, or what a spreadsheet writes besides."""
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise CheckpointError(f"{where} is a workbook of a spreadsheet: save it there as CSV")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252")  # Excel's, of western languages
    if "\0" in text:
        raise CheckpointError(f"{where} is no text: {_EXPECTED}")
    return text.replace("\r\n", "\n").replace("\r", "\n")
