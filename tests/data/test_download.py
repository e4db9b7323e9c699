"""Archives arrive whole and checked, or not at all."""

import gzip
import hashlib
import io
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest
from rich.console import Console

from distributed_stiffness.data.download import Archive, Unavailable, md5_of, obtain
from distributed_stiffness.progress import Progress

CONTENT = b"examples " * 100_000
PACKED = gzip.compress(CONTENT)
ARCHIVE = Archive(
    path="set/file.gz",
    urls=("https://first.invalid/file.gz", "https://second.invalid/file.gz"),
    md5=hashlib.md5(PACKED).hexdigest(),
    files=("set/file",),
)


class Response(io.BytesIO):
    """What a server answers; `fails_at` bytes the connection breaks."""

    def __init__(self, body: bytes, fails_at: int | None = None, sized: bool = True) -> None:
        super().__init__(body)
        self.headers = Message()
        if sized:
            self.headers["Content-Length"] = str(len(body))
        self._fails_at = fails_at

    def read(self, size: int | None = -1) -> bytes:
        if self._fails_at is not None and self.tell() >= self._fails_at:
            raise ConnectionResetError("connection reset")
        return super().read(size)


@pytest.fixture
def servers(monkeypatch):
    """Addresses and what they answer; the rest of the world cannot be reached."""
    answers: dict[str, Response] = {}

    def open_address(request, timeout):
        assert timeout > 0, "a silent server must not hang a run"
        try:
            return answers[request.full_url]
        except KeyError:
            raise urllib.error.URLError("unreachable") from None

    monkeypatch.setattr(urllib.request, "urlopen", open_address)
    return answers


def fetch(root: Path, progress: Progress | None = None) -> None:
    obtain(ARCHIVE, root, download=True, progress=progress or Progress(quiet=True))


def everything_in(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_md5_is_that_of_the_whole_file(tmp_path):
    """The usual hexadecimal form."""
    (tmp_path / "file").write_bytes(CONTENT)

    assert md5_of(tmp_path / "file") == hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("sized", [True, False])
def test_a_file_is_fetched_and_unpacked(tmp_path, servers, sized):
    """Whether or not the server says how much there is; only the unpacked file stays."""
    servers[ARCHIVE.urls[0]] = Response(PACKED, sized=sized)
    fetch(tmp_path)

    assert (tmp_path / "set/file").read_bytes() == CONTENT
    assert everything_in(tmp_path) == {"set", "set/file"}


@pytest.mark.parametrize(
    "first",
    [None, Response(b"a page that says sorry"), Response(PACKED[:-1]), Response(PACKED, 1)],
    ids=["unreachable", "another content", "cut short", "broken off"],
)
def test_the_next_mirror_is_tried(tmp_path, servers, first):
    """Whatever is wrong with the first, the second is as good."""
    if first is not None:
        servers[ARCHIVE.urls[0]] = first
    servers[ARCHIVE.urls[1]] = Response(PACKED)
    fetch(tmp_path)

    assert (tmp_path / "set/file").read_bytes() == CONTENT


def test_every_failure_is_told_and_nothing_is_left(tmp_path, servers):
    """One reason for each mirror, and no half file under any name."""
    servers[ARCHIVE.urls[1]] = Response(b"wrong")
    with pytest.raises(Unavailable) as failure:
        fetch(tmp_path)

    first, second = failure.value.reasons
    assert "first.invalid" in first
    assert "unreachable" in first
    assert hashlib.md5(b"wrong").hexdigest() in second
    assert everything_in(tmp_path) == set()


def test_an_interrupted_download_leaves_nothing(tmp_path, servers, monkeypatch):
    """Not even when a user stops it in the middle."""
    servers[ARCHIVE.urls[0]] = Response(PACKED)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Response, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path)

    assert everything_in(tmp_path) == set()


@pytest.mark.usefixtures("servers")
def test_a_copy_in_the_folder_is_used_and_kept(tmp_path):
    """No server is asked: none could be reached."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/file.gz").write_bytes(PACKED)
    fetch(tmp_path)

    assert (tmp_path / "set/file").read_bytes() == CONTENT
    assert everything_in(tmp_path) == {"set", "set/file", "set/file.gz"}


def test_a_wrong_copy_in_the_folder_is_passed_over_and_kept(tmp_path, servers):
    """It may be someone's own: it is neither used nor overwritten."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/file.gz").write_bytes(b"mine")
    servers[ARCHIVE.urls[0]] = Response(PACKED)
    fetch(tmp_path)

    assert (tmp_path / "set/file").read_bytes() == CONTENT
    assert (tmp_path / "set/file.gz").read_bytes() == b"mine"


def test_bytes_done_and_in_all_are_shown(tmp_path, servers):
    """A log has the name, kB done of kB in all."""
    servers[ARCHIVE.urls[0]] = Response(PACKED)
    log = io.StringIO()
    fetch(tmp_path, Progress(console=Console(file=log, width=200)))
    size = f"{len(PACKED) / 1e3:,.0f}"

    assert f"download file.gz: 0/{size} kB" in log.getvalue()
    assert f"download file.gz: {size}/{size} kB (100%)" in log.getvalue()
