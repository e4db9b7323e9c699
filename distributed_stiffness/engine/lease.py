"""Who is computing a store: a small file beside it, renewed every few seconds.

It keeps a second run away from a store that is being written, whose unfinished files it would sweep
and whose tiles it would compute again, and it tells `stiffness status` what is going on. No clocks
are compared: a file of another machine that changes belongs to a run that lives, one that does not
change for a while is left by one that died.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
import psutil

from distributed_stiffness.checkpoints import write_whole
from distributed_stiffness.errors import StoreError
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import STORAGE_ERRORS, now

BEAT_SECONDS = 5.0
EXPIRES_SECONDS = 30.0


def lease_url(store: str) -> str:
    """Return the file's place: STORE without .zarr, plus .run.json."""
    return f"{store.rstrip('/').removesuffix('.zarr')}.run.json"


def read_lease(store: str) -> dict[str, Any] | None:
    """Return what the run that computes a store last said of itself; None: nobody does."""
    filesystem, path = fsspec.core.url_to_fs(lease_url(store))
    filesystem.invalidate_cache()
    try:
        said: dict[str, Any] = json.loads(filesystem.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}  # half of a file: somebody is there
    return said


def is_alive(said: Mapping[str, Any]) -> bool | None:
    """Whether the run that said this lives; None where it is on another machine."""
    if said.get("host") != _host():
        return None
    try:
        process = psutil.Process(said["pid"])
        return bool(
            process.create_time() == said["process_began"]
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False


class Lease:
    """Held by the run that computes a store."""

    def __init__(self, store: str) -> None:
        self.store, self.status = store, dict[str, Any]()
        self.lost_to: str | None = None
        self._me = {
            "owner": uuid.uuid4().hex,
            "host": _host(),
            "pid": os.getpid(),
            "process_began": psutil.Process().create_time(),
            "began": now(),
        }
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    @contextlib.contextmanager
    def held(self, progress: Progress) -> Iterator[Lease]:
        """Take the lease, renew it in the background, and give it back at the end.

        Raises:
            StoreError: another run computes this store, or the file cannot be written.
        """
        self._take(progress)
        self._thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._thread.join()
            self._give_back()

    def require(self) -> None:
        """Check that no other run has taken the store meanwhile.

        Raises:
            StoreError: one has.
        """
        if self.lost_to is not None:
            raise StoreError(
                f"another run ({self.lost_to}) has taken {self.store} over, because this one was"
                " not heard of for a while; what was computed is kept"
            )

    def _take(self, progress: Progress) -> None:
        try:
            said = read_lease(self.store)
            if said is not None:
                self._wait_for_its_end(said, progress)
            self._write()
        except STORAGE_ERRORS as error:
            raise StoreError(
                f"cannot write {lease_url(self.store)}: {error}. Give a --store that can be"
                " written, with its credentials in the environment"
            ) from error

    def _wait_for_its_end(self, said: Mapping[str, Any], progress: Progress) -> None:
        alive, deadline = is_alive(said), time.monotonic() + EXPIRES_SECONDS
        if alive is None:
            progress.say(
                f"{_named(said)} has computed this store; waiting up to {EXPIRES_SECONDS:.0f} s to"
                " see whether it lives"
            )
        while alive is None and time.monotonic() < deadline:
            time.sleep(1.0)
            again = read_lease(self.store)
            if again is None:
                return
            alive = True if again != said else None
        if alive:
            raise StoreError(
                f"{_named(said)} is computing {self.store} since {said.get('began')}: wait for it"
                " (`stiffness status` tells how far it is), stop it, or give another --store"
            )

    def _renew(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            # A store that does not answer for a moment is no reason to end a run.
            with contextlib.suppress(*STORAGE_ERRORS):
                said = read_lease(self.store)
                if said and said.get("owner") != self._me["owner"]:
                    self.lost_to = _named(said)
                    return
                self._write()

    def _write(self) -> None:
        self._beats += 1
        filesystem, path = fsspec.core.url_to_fs(lease_url(self.store))
        said = {**self._me, "beats": self._beats, "at": now(), **self.status}
        write_whole(filesystem, path, json.dumps(said, indent=1).encode())

    def _give_back(self) -> None:
        with contextlib.suppress(*STORAGE_ERRORS):
            said = read_lease(self.store)
            if said and said.get("owner") == self._me["owner"]:
                filesystem, path = fsspec.core.url_to_fs(lease_url(self.store))
                filesystem.rm_file(path)


def _named(said: Mapping[str, Any]) -> str:
    return f"process {said.get('pid', '?')} on {said.get('host', 'an unknown host')}"


def _host() -> str:
    return socket.gethostname()
