"""Which learning rate, seed and iteration a file is of: from its path, a pattern, or a table. Pure
but for looking for files.
"""

from __future__ import annotations

import csv
import glob
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.study import NOT_GIVEN, rate_in_words

FIELDS = ("learning_rate", "seed", "iteration")
_FIELD_OF = {
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "seed": "seed",
    "iteration": "iteration",
    "step": "iteration",
    "global_step": "iteration",
    "epoch": "iteration",
}
# Words before a number in a path; of an iteration's, the first line that finds one counts.
_WORDS: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("learning_?rate|lr",),
    "seed": ("seed",),
    "iteration": ("iterations?|iter|steps?|checkpoint|ckpt", "epochs?|ep"),
}
_REAL = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_WHOLE = r"\d+"
_LISTED = 20  # files that are listed one by one


@dataclass(frozen=True, order=True)
class Place:
    """Where a checkpoint belongs in a study."""

    learning_rate: float = NOT_GIVEN
    seed: int = 0
    iteration: int = 0

    def __str__(self) -> str:
        rate = rate_in_words(self.learning_rate)
        return f"learning rate {rate}, seed {self.seed}, iteration {self.iteration}"


Files = Mapping[Place, str]  # path or URL by place


def find(checkpoints: str | Sequence[str]) -> list[str]:
    """Return the files and folders that patterns such as 'runs/*/step-*.pt' match.

    Raises:
        CheckpointError: one matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in [checkpoints] if isinstance(checkpoints, str) else checkpoints:
        matches = _matches(str(pattern))
        if not matches:
            raise CheckpointError(
                f"no file matches {str(pattern)!r} (looked for in {Path.cwd()}): expected paths of"
                " checkpoints, where * stands for anything within a name and ** for any folders;"
                " put them in quotes, so that the shell leaves the * alone"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _matches(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"cannot look into {pattern}: {error}") from error


def placed(paths: Iterable[str], pattern: str | None = None) -> Files:
    """Place every file on the grid.

    Args:
        paths: of checkpoints.
        pattern: how the ends of the paths look, such as 'lr{learning_rate}/seed{seed}/
            step-{iteration}'; None: numbers after words such as lr, seed, step are looked for.

    Raises:
        CheckpointError: a path does not fit, or two files are of one place.
    """
    paths = list(paths)
    read = _read_by_words(paths) if pattern is None else _read_by_pattern(paths, pattern)
    return _distinct(read, "name what tells them apart with --pattern, or give a --table")


def from_table(table: str | Path | Sequence[Mapping[str, Any]]) -> Files:
    """Place the files that a table lists.

    Args:
        table: a CSV file with the columns path, learning_rate, seed and iteration, of which all but
            path may be missing, or such rows. Paths are relative to the folder of the CSV file.

    Raises:
        CheckpointError: the table cannot be read, a file is not there, or two are of one place.
    """
    folder = Path()
    if isinstance(table, str | Path):
        where, folder = str(table), Path(table).parent
        try:
            with Path(table).open(newline="") as file:
                rows: Sequence[Mapping[str, Any]] = list(csv.DictReader(file, strict=True))
        except (OSError, ValueError, csv.Error) as error:
            raise CheckpointError(f"cannot read the table {table}: {error}") from error
    else:
        where, rows = "the table", table
    if not rows:
        raise CheckpointError(f"{where} has no rows: expected one for each checkpoint")
    found = []
    for number, row in enumerate(rows, 1):
        at = f"row {number} of {where}"
        path = row.get("path")
        if not path:
            raise CheckpointError(f"{at} has no path: its columns are {', '.join(map(str, row))}")
        if "://" not in str(path):
            path = str(folder / str(path))
            if not Path(path).exists():
                raise CheckpointError(f"{at}: there is no file {path}")
        given = [
            (_FIELD_OF[k.strip()], str(v).strip())
            for k, v in row.items()
            if isinstance(k, str) and k.strip() in _FIELD_OF and v not in (None, "")
        ]
        found.append((str(path), _place(given, at)))
    return _distinct(found, "each row needs its own learning rate, seed or iteration")


def grid(files: Files, iterations: Sequence[int] | None = None) -> Files:
    """Return the files of the iterations wanted, if they fill a grid.

    Raises:
        CheckpointError: there are holes; names them and what to leave out.
    """
    by_run: defaultdict[tuple[float, int], set[int]] = defaultdict(set)
    for place in files:
        by_run[place.learning_rate, place.seed].add(place.iteration)
    if iterations is not None:
        unknown = sorted(set(iterations) - set().union(*by_run.values()))
        if unknown:
            raise CheckpointError(
                f"no checkpoint is of iteration {', '.join(map(str, unknown))}: there are"
                f" {_numbers(set().union(*by_run.values()))}"
            )
        files = {place: path for place, path in files.items() if place.iteration in iterations}
    axes = [sorted({getattr(place, field) for place in files}) for field in FIELDS]
    holes = [p for p in itertools.starmap(Place, itertools.product(*axes)) if p not in files]
    if holes:
        raise CheckpointError(_holes(files, holes, axes))
    return dict(sorted(files.items()))


def describe(files: Files) -> list[str]:
    """Return the table of what was understood, a line each."""
    cells = [("learning rate", "seed", "iteration", "checkpoint")]
    cells += [
        (rate_in_words(p.learning_rate), str(p.seed), f"{p.iteration:,}", path)
        for p, path in files.items()
    ]
    if len(files) > _LISTED:
        half = _LISTED // 2
        dots = ("…", "…", "…", f"({len(files) - _LISTED:,} more)")
        cells = [*cells[: half + 1], dots, *cells[-half:]]
    widths = [max(len(row[k]) for row in cells) for k in range(3)]
    return [
        "  ".join([*(cell.rjust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]])
        for row in cells
    ]


# Reading paths


def _read_by_words(paths: Sequence[str]) -> list[tuple[str, Place]]:
    """Take the numbers after known words."""
    found, lines = [], {}
    for path in paths:
        given = []
        for field, words in _WORDS.items():
            for line in words:
                values = _after(line, _REAL if field == "learning_rate" else _WHOLE, path)
                if len({float(value) for value in values}) > 1:
                    raise CheckpointError(
                        f"{path} names more than one {_words(field)} ({', '.join(values)}): say"
                        f" which counts with --pattern, such as '*-{{{field}}}', or give a --table"
                    )
                if values:
                    given.append((field, values[0]))
                    if field == "iteration":
                        lines[path] = line
                    break
        found.append((path, _place(given, path)))
    without = [path for path in paths if path not in lines]
    if without and len(paths) > 1:
        raise CheckpointError(
            f"no iteration was found in {_some(without)}: expected a number after step, iteration,"
            " checkpoint or epoch. Narrow --checkpoints, or say where it is with --pattern, such as"
            " 'lr{learning_rate}/seed{seed}/*_{iteration}', or give a --table"
        )
    if len(set(lines.values())) > 1:
        one = {line: path for path, line in lines.items()}
        raise CheckpointError(
            f"{' and '.join(one.values())} count iterations in different words (steps and epochs?):"
            " narrow --checkpoints, or give a --table"
        )
    return found


def _after(words: str, number: str, path: str) -> list[str]:
    return re.findall(
        rf"(?<![A-Za-z0-9])(?:global_?)?(?:{words})[=_-]?({number})(?![A-Za-z0-9])",
        path,
        re.IGNORECASE,
    )


def _read_by_pattern(paths: Sequence[str], pattern: str) -> list[tuple[str, Place]]:
    expression, fields = _expression(pattern)
    found = []
    for path in paths:
        match = expression.search(path.rstrip("/"))
        if match is None:
            raise CheckpointError(
                f"{path} does not end like --pattern {pattern!r}, with numbers in the braces and"
                " maybe a suffix after it: mend the pattern, or narrow --checkpoints"
            )
        found.append((path, _place(list(zip(fields, match.groups(), strict=True)), path)))
    return found


def _expression(pattern: str) -> tuple[re.Pattern[str], list[str]]:
    """Translate 'lr{learning_rate}/*/step-{iteration}'."""
    parts, fields = [], []
    for literal, field in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        if literal:
            parts.append(re.escape(literal).replace(r"\*", "[^/]*"))
        elif field in _FIELD_OF:
            fields.append(_FIELD_OF[field])
            parts.append(f"({_REAL if fields[-1] == 'learning_rate' else _WHOLE})")
        else:
            raise CheckpointError(
                f"--pattern {pattern!r} has {{{field}}}: expected {{learning_rate}}, {{seed}} and"
                " {iteration} (or {epoch}), and * for anything else"
            )
    if not fields or len(set(fields)) < len(fields):
        raise CheckpointError(
            f"--pattern {pattern!r} has {fields or 'no fields'}: expected"
            " {learning_rate}, {seed} and {iteration} once each at most, one of them at least; *"
            " stands for a number that does not count"
        )
    return re.compile(rf"(?:^|/){''.join(parts)}(?:\.[A-Za-z]\w*)*$"), fields


def _place(given: Sequence[tuple[str, str]], where: str) -> Place:
    values: dict[str, Any] = {}
    for field, text in given:
        if field in values:
            raise CheckpointError(f"{where} gives the {_words(field)} twice: give it once")
        try:
            number = float(text)
            values[field] = number if field == "learning_rate" else int(number)
            fits = 0 <= number < 2**63 and (field == "learning_rate" or number == int(number))
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            kind = "a number" if field == "learning_rate" else "a whole number"
            raise CheckpointError(
                f"{where} has {text!r} for the {_words(field)}: expected {kind}, 0 or more"
            )
    return Place(**values)


# Grids


def _distinct(found: Iterable[tuple[str, Place]], remedy: str) -> Files:
    files: dict[Place, str] = {}
    for path, place in found:
        if place in files:
            raise CheckpointError(f"{files[place]} and {path} are both of {place}: {remedy}")
        files[place] = path
    return files


def _holes(files: Files, holes: Sequence[Place], axes: Sequence[Sequence[Any]]) -> str:
    missing: defaultdict[tuple[float, int], list[int]] = defaultdict(list)
    for hole in holes:
        missing[hole.learning_rate, hole.seed].append(hole.iteration)
    lines = [
        f"learning rate {rate_in_words(rate)}, seed {seed}: iterations {_numbers(steps)}"
        for (rate, seed), steps in missing.items()
    ]
    runs = list(itertools.product(*axes[:2]))
    common = [i for i in axes[2] if all(Place(rate, seed, i) in files for rate, seed in runs)]
    remedy = (
        f"give --iterations {','.join(map(str, common))}, which all have, or narrow --checkpoints"
        if common
        else "narrow --checkpoints to runs that have the same iterations, and to rates that have"
        " the same seeds"
    )
    sizes = [f"{len(a)} {_words(f)}{'s' * (len(a) > 1)}" for a, f in zip(axes, FIELDS, strict=True)]
    return (
        f"the checkpoints do not fill a grid of {' × '.join(sizes)}. Missing: {_some(lines, '; ')}."
        f" Add these, or {remedy}"
    )


def _some(items: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(items) - 4} more" if len(items) > 4 else ""
    return between.join(items[:4]) + more


def _numbers(values: Iterable[int]) -> str:
    return _some([str(value) for value in sorted(values)])


def _words(field: str) -> str:
    return field.replace("_", " ")
