"""Ways to damage a store, and looks at it: shared by the tests of `stiffness verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import zarr
from studies import run_options

from distributed_stiffness.verify import Verification, verify_store

Damage = Callable[[Path], None]


def look(store: Path | str, **options: object) -> Verification:
    """Verify a store in silence, on one thread."""
    return verify_store(run_options(store), **options)  # type: ignore[arg-type]


def verdict(found: Verification) -> set[tuple[str, str]]:
    """Kind and chunk of each fault."""
    return {(fault.kind, fault.chunk) for fault in found.faults}


def files(folder: Path) -> dict[str, int]:
    """When each chunk was written."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.glob("*/c/**/*")
        if p.is_file()
    }


def flip(key: str) -> Damage:
    """Change one bit of a chunk."""

    def damage(store: Path) -> None:
        content = bytearray((store / key).read_bytes())
        content[len(content) // 2] ^= 1
        (store / key).write_bytes(content)

    return damage


def cut(key: str, length: int) -> Damage:
    """Leave so many bytes of a chunk."""
    return lambda store: _write(store / key, (store / key).read_bytes()[:length])


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def remove(key: str) -> Damage:
    """Delete a chunk."""
    return lambda store: (store / key).unlink()


def copy(*pairs: tuple[str, str]) -> Damage:
    """Put chunks in the place of others, whose checksums are right."""

    def damage(store: Path) -> None:
        contents = [(store / source).read_bytes() for source, _ in pairs]
        for content, (_, target) in zip(contents, pairs, strict=True):
            (store / target).write_bytes(content)

    return damage


def put(name: str, place: tuple[int, ...], value: float) -> Damage:
    """Write one number as a writer would, with the right checksum."""

    def damage(store: Path) -> None:
        zarr.open_group(str(store), mode="r+", use_consolidated=False)[name][place] = value

    return damage


def invert(place: tuple[int | slice, ...]) -> Damage:
    """Say of examples that they are classified correctly where they are not, and so on."""

    def damage(store: Path) -> None:
        correct = zarr.open_group(str(store), mode="r+", use_consolidated=False)["correct"]
        correct[place] = ~correct[place]

    return damage


def both(*damages: Damage) -> Damage:
    """Do several."""

    def damage(store: Path) -> None:
        for one in damages:
            one(store)

    return damage
