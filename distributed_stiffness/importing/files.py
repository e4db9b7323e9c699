"""Which files and folders a user means: paths, patterns, URLs."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import fsspec

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.paths import Location, as_written, is_url, located

Paths = Location | Iterable[Location]


def find(checkpoints: Paths) -> list[str]:
    """Return the files and folders of paths, URLs and patterns such as 'runs/*/step-*.pt'.

    A path that is there is that file, whatever characters it has. What was relative stays so.

    Raises:
        CheckpointError: one matches nothing, or could mean several.
    """
    found: dict[str, None] = {}
    for pattern in _listed(checkpoints):
        where = located(pattern, "a checkpoint", CheckpointError)
        matches = _matches(pattern, where)
        if not matches:
            raise CheckpointError(
                f"no file matches {os.fsdecode(pattern)!r} (looked for as {where}): expected paths"
                " of checkpoints, where * stands for anything within a name and ** for any folders;"
                " put them in quotes, so that the shell leaves the * alone"
            )
        found |= dict.fromkeys(matches)
    if not found:
        raise CheckpointError("the list of checkpoints is empty: expected a path or a pattern")
    return list(found)


def _listed(checkpoints: Paths) -> Iterator[Location]:
    if isinstance(checkpoints, str | bytes | os.PathLike):
        yield checkpoints
    elif isinstance(checkpoints, Iterable) and not isinstance(checkpoints, Mapping):
        yield from checkpoints
    else:
        raise CheckpointError(
            f"checkpoints is a {type(checkpoints).__name__}: expected a path, a pattern, a URL or a"
            " list of these; what lies in memory has to be saved first, with"
            " torch.save(model.state_dict(), 'weights.pt')"
        )


def _matches(given: Location, where: str) -> list[str]:
    if not is_url(where):
        return _read(as_written(given, where), os.path.lexists, _glob)
    try:
        filesystem, pattern = fsspec.core.url_to_fs(where)
        found = _read(pattern, filesystem.exists, filesystem.glob)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot look into {where}: {error}") from error
    return sorted(filesystem.unstrip_protocol(match) for match in found)


def _read(
    pattern: str, is_there: Callable[[str], bool], expand: Callable[[str], list[str]]
) -> list[str]:
    """Return what a pattern matches, whose brackets may be those of a name."""
    if is_there(pattern):
        return [pattern]
    different = {tuple(found) for reading in _readings(pattern) if (found := expand(reading))}
    if len(different) > 1:
        one, other, *_ = sorted(found[0] for found in different)
        raise CheckpointError(
            f"{pattern!r} matches {one} and {other}: its brackets may be a choice of characters or"
            " stand for themselves. Write [[] for a bracket that stands for itself, or list the"
            " paths"
        )
    return list(*different)


def _readings(pattern: str) -> Iterator[str]:
    """Yield what a pattern may mean: in each of its names [1] is a choice, or stands for itself."""
    choices = [
        {part, part.replace("[", "[[]")} if "[" in part.replace("[[]", "") else {part}
        for part in pattern.split("/")
    ]
    for parts in itertools.islice(itertools.product(*choices), 64):
        yield "/".join(parts)


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute or not)
