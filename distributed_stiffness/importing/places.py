"""Which learning rate, seed and iteration a file is of: from its path, or by a pattern. Pure."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.importing.numerals import (
    NOT_WITHIN,
    REAL,
    WHOLE,
    WHOLE_OR_GROUPS,
    after,
    real,
    whole,
)
from distributed_stiffness.study import NOT_GIVEN, rate_in_words

FIELDS = ("learning_rate", "seed", "iteration")
_FIELD_OF = {
    "learning_rate": "learning_rate",
    "learningrate": "learning_rate",
    "lr": "learning_rate",
    "seed": "seed",
    "iteration": "iteration",
    "iterations": "iteration",
    "step": "iteration",
    "steps": "iteration",
    "global_step": "iteration",
    "epoch": "iteration",
    "epochs": "iteration",
}
# Words before a number in a path; of an iteration's, the first line that finds one counts.
_WORDS: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("learning[_ .-]?rate|lr",),
    "seed": ("seed",),
    "iteration": ("iterations?|iter|steps?|checkpoint|ckpt", "epochs?|ep"),
}
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
    return distinct(read, "name what tells them apart with --pattern, or give a --table")


def field_of(name: str) -> str | None:
    """Return the field that a column or a brace stands for; None: it is no such name."""
    return _FIELD_OF.get(name)


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
                is_rate = field == "learning_rate"
                values = list(after(line, path, is_rate=is_rate, field=_words(field)))
                if len({real(value) if is_rate else whole(value) for value in values}) > 1:
                    raise CheckpointError(
                        f"{path} names more than one {_words(field)} ({', '.join(values)}): say"
                        f" which counts with --pattern, such as '*-{{{field}}}', or give a --table"
                    )
                if values:
                    given.append((field, values[0]))
                    if field == "iteration":
                        lines[path] = line
                    break
        found.append((path, place_of(given, path)))
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


def _read_by_pattern(paths: Sequence[str], pattern: str) -> list[tuple[str, Place]]:
    expression, fields = _expression(pattern, WHOLE)
    # A number may end before the next sign, and a * take less.
    others = [_expression(pattern, WHOLE_OR_GROUPS), _expression(pattern, WHOLE, "[^/]*?")]
    found = []
    for path in paths:
        match, *readings = (e.search(path.rstrip("/")) for e, _ in ((expression, fields), *others))
        for otherwise in readings:
            if match and otherwise and match.groups() != otherwise.groups():
                raise CheckpointError(
                    f"{path} fits --pattern {pattern!r} with {' and '.join(match.groups())}, or"
                    f" with {' and '.join(otherwise.groups())}: give a --table"
                )
        if match is None:
            raise CheckpointError(
                f"{path} does not end like --pattern {pattern!r}, with numbers in the braces and"
                " maybe a suffix after it: mend the pattern, or narrow --checkpoints"
            )
        found.append((path, place_of(list(zip(fields, match.groups(), strict=True)), path)))
    return found


def _expression(
    pattern: str, whole_number: str, star: str = "[^/]*"
) -> tuple[re.Pattern[str], list[str]]:
    """Translate 'lr{learning_rate}/*/step-{iteration}', with what a number and a * stand for."""
    if "}{" in pattern:
        raise CheckpointError(f"--pattern {pattern!r} has two numbers with nothing between them")
    parts, fields, after_star = [], [], False
    for literal, field in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        if literal:
            parts.append(re.escape(literal).replace(r"\*", star))
            after_star = literal.endswith("*")
        elif field in _FIELD_OF:
            fields.append(_FIELD_OF[field])
            number = REAL if fields[-1] == "learning_rate" else whole_number
            # A * before it takes no part of the number.
            begins = NOT_WITHIN[0] + (r"(?<![0-9.,^])(?<!\^-)" if after_star else "")
            parts.append(f"{begins}({number}){NOT_WITHIN[1]}")
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


def place_of(given: Sequence[tuple[str, str]], where: str) -> Place:
    """Return the place that fields and the text of their numbers name.

    Raises:
        CheckpointError: a field comes twice, or its text is no such number.
    """
    values: dict[str, Any] = {}
    for field, text in given:
        if field in values:
            raise CheckpointError(f"{where} gives the {_words(field)} twice: give it once")
        is_rate = field == "learning_rate"
        number = real(text) if is_rate else whole(text)
        if number is None or not number < 2**63:
            kind = "a number such as 0.001" if is_rate else "a whole number"
            raise CheckpointError(
                f"{where} has {text!r} for the {_words(field)}: expected {kind}, 0 or more"
            )
        if is_rate and number == NOT_GIVEN:
            raise CheckpointError(
                f"{where} has a learning rate of {text}, which stands for 'not given': leave it"
                " out, or give the rate"
            )
        values[field] = number
    return Place(**values)


# Grids


def distinct(found: Iterable[tuple[str, Place]], remedy: str) -> Files:
    """Return the files by their places.

    Raises:
        CheckpointError: two are of one place.
    """
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
