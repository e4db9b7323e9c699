"""Archives from the network: shown while they come, checked, and landed whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO

from distributed_stiffness.progress import Progress

CHUNK = 1 << 18  # bytes between two updates of the progress
TIMEOUT = 30.0  # seconds of silence after which the next mirror is tried
Readable = IO[bytes] | gzip.GzipFile  # a GzipFile is no IO to the type checker
USER_AGENT = "distributed_stiffness"  # some servers turn away Python's own


class Unavailable(Exception):
    """No copy of an archive could be had: why, one reason for each place tried."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = tuple(reasons)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published archive: one gzip file, or a .tar.gz of several."""

    path: str  # in the data folder: a copy that lies there already is used
    urls: tuple[str, ...]  # mirrors, tried in this order
    md5: str
    files: tuple[str, ...]  # what it holds, as paths in the data folder


def md5_of(path: Path) -> str:
    """Return the MD5 of a file: against damage and mistakes, not against an attacker."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def obtain(archive: Archive, root: Path, *, download: bool, progress: Progress) -> None:
    """Unpack an archive into the folder `root`, from a copy there or from the network.

    Everything is written beside its place and moved there once it is whole and checked, so a
    killed run leaves no half file under a true name, and two runs at once do no harm.

    Raises:
        Unavailable: no copy had the published checksum, or none could be had.
        OSError: the folder cannot be written to.
    """
    reasons = []
    copy = root / archive.path
    if copy.is_file():
        found = md5_of(copy)
        if found == archive.md5:
            _unpack(copy, archive, root)
            return
        reasons.append(f"{copy}: MD5 {found}, expected {archive.md5}")
    if not download:
        raise Unavailable([*reasons, "the network: downloads are off (--no-download)"])
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        fetched = Path(folder) / copy.name
        for url in archive.urls:
            try:
                found = _fetch(url, fetched, progress)
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                reasons.append(f"{url}: {error or type(error).__name__}")
                continue
            if found == archive.md5:
                _unpack(fetched, archive, root)
                return
            reasons.append(f"{url}: MD5 {found}, expected {archive.md5}")
    raise Unavailable(reasons)


def _fetch(url: str, target: Path, progress: Progress) -> str:
    """Stream an address into a file; return the MD5 of what came."""
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    digest = _md5()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response, target.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        with closing(progress.phase(f"download {target.name}", size / 1e3, "kB")) as phase:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                phase.advance(len(chunk) / 1e3)
    return digest.hexdigest()


def _unpack(source: Path, archive: Archive, root: Path) -> None:
    """Write the files of a checked archive into `root`, each whole or not at all."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpack-") as folder:
        whole = Path(folder) / "file"
        for name, packed in _members(source, archive.files):
            with whole.open("wb") as file:
                shutil.copyfileobj(packed, file, CHUNK)
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            whole.replace(target)


def _members(source: Path, files: Sequence[str]) -> Iterator[tuple[str, Readable]]:
    """Yield name and content of the files named, in the order of the archive: one pass over it."""
    if not source.name.endswith(".tar.gz"):
        with gzip.open(source) as whole:
            yield files[0], whole
        return
    with tarfile.open(source) as tar:
        for member in tar:
            part = tar.extractfile(member) if member.name in files else None
            if part is not None:
                yield member.name, part


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
