"""Published data sets as files: are they there, are they the ones, and what if not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from distributed_stiffness.data.download import Archive, Unavailable, md5_of, obtain
from distributed_stiffness.data.examples import LabelledData, Split
from distributed_stiffness.data.labels import require_every_class
from distributed_stiffness.errors import DataError
from distributed_stiffness.progress import Progress


class Contents(TypedDict):
    """What the files of a data set say."""

    train: Split
    validation: Split
    class_names: tuple[str, ...]
    superclass_of_class: tuple[int, ...] | None
    superclass_names: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set that anyone can fetch, and how its files are read."""

    title: str
    checksums: Mapping[str, str]  # MD5 of each file, by its path in the data folder
    archives: tuple[Archive, ...]
    read: Callable[[Path, bool], Contents]  # data folder, are the checksums right

    def load(
        self, name: str, root: Path, *, download: bool, accept_unverified: bool, progress: Progress
    ) -> LabelledData:
        """Find, fetch, check and read the files.

        Raises:
            DataError: files are missing and cannot be had; their checksums are not the published
                ones and that was not accepted; or what they hold is not this data set.
        """
        try:
            altered = self._complete(
                root, download=download, accept_unverified=accept_unverified, progress=progress
            )
            contents = self.read(root, not altered)
        except OSError as error:
            raise DataError(
                f"{self.title} in {root} cannot be read or written: {error}; name another folder"
                " with --data-dir"
            ) from error
        data = LabelledData(
            name=name, verified=not altered, source=self._source(altered), **contents
        )
        if altered:
            check_unverified(data)
        return data

    def _complete(
        self, root: Path, *, download: bool, accept_unverified: bool, progress: Progress
    ) -> dict[str, str]:
        """Have every file in the folder; return the MD5 of those that are not as published."""
        altered = self._altered(root)
        if altered and not accept_unverified:
            raise DataError(self._refusal(root, altered))
        missing = [file for file in self.checksums if not (root / file).is_file()]
        if missing and altered:
            # Published files beside altered ones would be a data set that nobody has.
            kept = f"the network: not asked, since {', '.join(altered)} differ from the published"
            raise DataError(self._absence(root, missing, [kept]))
        try:
            for archive in self.archives:
                if set(archive.files) & set(missing):
                    obtain(archive, root, download=download, progress=progress)
        except Unavailable as unavailable:
            raise DataError(self._absence(root, missing, unavailable.reasons)) from unavailable
        return altered

    def _altered(self, root: Path) -> dict[str, str]:
        """Return the MD5 found for each file that is there and is not the published one."""
        found = {file: md5_of(root / file) for file in self.checksums if (root / file).is_file()}
        return {file: md5 for file, md5 in found.items() if md5 != self.checksums[file]}

    def _absence(self, root: Path, missing: Iterable[str], reasons: Iterable[str]) -> str:
        return "\n".join(
            [
                f"{self.title} is not in {root}. Expected there, and missing:",
                *(f"  {file}" for file in missing),
                "Tried:",
                *(f"  {reason}" for reason in reasons),
                "Put the files there, or name the folder that holds them with --data-dir; or run"
                " once where there is a network, without --no-download. Files whose checksums are"
                " not the published ones need --accept-unverified-data as well.",
            ]
        )

    def _refusal(self, root: Path, altered: Mapping[str, str]) -> str:
        return "\n".join(
            [
                f"{self.title} in {root} is not as published:",
                *(
                    f"  {file}: MD5 {found}, expected {self.checksums[file]}"
                    for file, found in altered.items()
                ),
                "Remove these files to have the published ones fetched, or read them as they are"
                " with --accept-unverified-data: their contents are then checked, and the results"
                " say that the data are unverified.",
            ]
        )

    def _source(self, altered: Mapping[str, str]) -> str:
        if not altered:
            return f"{self.title}, files with the published checksums."
        return (
            f"Files laid out as {self.title}; unverified, since these checksums are not the"
            f" published ones: {', '.join(f'{file} (MD5 {md5})' for file, md5 in altered.items())}."
        )


def check_unverified(data: LabelledData) -> None:
    """Check what the right checksums would have told: every class is there, pixels are pixels.

    Raises:
        DataError: a class has no example in a split, or images are blank or not from 0 to 255.
    """
    for where, split in (("training", data.train), ("validation", data.validation)):
        if split is None:
            continue
        require_every_class(split.labels, data.class_names, f"{where} split of {data.name}")
        low, high = int(np.min(split.inputs)), int(np.max(split.inputs))
        if low == high or high <= 1:
            raise DataError(
                f"{data.name}: pixels of the {where} split lie between {low} and {high}: expected"
                " 0 to 255"
            )
