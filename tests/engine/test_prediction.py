"""Predictions: what a plan takes, before it is run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import run_options, tiny_study

from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.job import _Totals
from distributed_stiffness.engine.prediction import Speed, predict
from distributed_stiffness.errors import StudyError
from distributed_stiffness.plan import SMALLEST_BLOCK, Plan, make_plan


def plan(n: int = 1000, memory: int = 10**9, checkpoints: int = 3) -> Plan:
    return make_plan(
        n_examples=n,
        n_checkpoints=checkpoints,
        row_bytes=40_000,
        making_bytes=80_000,
        making_work=10**6,
        pair_work=10**4,
        memory=memory,
    )


def test_one_replica_that_holds_all_rows() -> None:
    """N gradients and N²/2 pairs a checkpoint, two operations for a multiply-add."""
    found = predict(plan(), replicas=1, speed=Speed(gradient=1e-3, pair=1e-6))

    assert found.gradients == 1
    assert found.operations == 3 * 2 * (1000 * 10**6 + 1000**2 / 2 * 10**4)
    assert found.recomputed == 0
    assert found.bytes_written == 4 * 1000**2 * 4
    assert found.seconds == pytest.approx(3 * (1 + 0.5))


@given(st.integers(1, 500), st.integers(10**8, 10**10))
def test_more_replicas_are_never_slower_and_never_free(replicas: int, memory: int) -> None:
    """Time falls with replicas, by no more than their number; gradients are made more often."""
    speed = Speed(gradient=1e-3, pair=1e-7)
    made = plan(5000, memory)
    one, many = (predict(made, replicas=r, speed=speed) for r in (1, replicas))

    assert one.seconds is not None
    assert many.seconds is not None
    assert one.seconds / replicas <= many.seconds * (1 + 1e-9)
    assert many.seconds <= one.seconds * (1 + 1e-9)
    assert many.gradients >= one.gradients
    assert 0 <= many.recomputed < 1


def test_what_is_left() -> None:
    """A continued run is told what its rest takes."""
    whole, rest = (predict(plan(), replicas=2, left=left) for left in (1.0, 0.25))

    assert rest.operations == whole.operations / 4
    assert rest.bytes_written == whole.bytes_written // 4
    assert rest.seconds is None


def test_in_words() -> None:
    """One line, with the share that is made again where there is one."""
    little = predict(plan(5000, memory=10**8), replicas=1, speed=Speed(1e-3, 1e-6))

    assert "to make gradients again" in little.describe()
    assert "again" not in predict(plan(), replicas=1).describe()
    assert json.loads(json.dumps(little.to_json()))["replicas"] == 1


def test_a_run_counts_what_was_predicted(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Operations counted by the replicas are those of the prediction, where all rows are held."""
    seen = []
    monkeypatch.setattr(
        _Totals, "describe", lambda totals, predicted: seen.append((totals, predicted)) or ""
    )

    run_study(tiny_study(), run_options(tmp_path / "x.zarr"))

    ((totals, predicted),) = seen
    assert totals.gradients == 4 * 60
    assert totals.operations == pytest.approx(predicted.operations)
    assert totals.bytes_written == predicted.bytes_written == 5 * 4 * 60**2
    assert predicted.seconds > 0


def test_halving_keeps_shapes_while_whole_tiles_are_held() -> None:
    """Fewer rows are held first: no product changes its shape, and so no bit changes."""
    made = plan(10_000, memory=10**9)
    smaller = made.halved()

    assert smaller.panel_rows < made.panel_rows
    assert (smaller.block, smaller.batch, smaller.strip) == (made.block, made.batch, made.strip)
    sizes = [smaller.panel_rows * smaller.row_bytes]
    while smaller.panel_rows > smaller.tile or smaller.block >= 2 * SMALLEST_BLOCK:
        smaller = smaller.halved()
        sizes.append(smaller.panel_rows * smaller.row_bytes)
        assert 1 <= smaller.batch <= smaller.block <= smaller.panel_rows
    assert np.all(np.diff(sizes) < 0)
    with pytest.raises(StudyError, match="do not fit"):
        smaller.halved()
