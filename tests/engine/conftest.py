"""What tests of the engine share: the undisturbed store, and a look at what is left of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import MARK, long_study, require_nothing_left
from studies import run_options

from distributed_stiffness.engine import run_study


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long study, computed in one process."""
    store = tmp_path_factory.mktemp("serial") / "long.zarr"
    run_study(long_study(), run_options(store))
    return store


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A word in the environment of all that a test starts; nothing may be left of it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    require_nothing_left(mark)
