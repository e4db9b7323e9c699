"""Predictions: what a plan takes, before it is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies import run_options, tiny_study
from torch import nn

from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.checks import (
    n_undecided,
    read_pairs,
    remade_gradients,
    sample_work,
)
from distributed_stiffness.engine.job import _Totals
from distributed_stiffness.engine.prediction import CheckSeconds, Speed, predict
from distributed_stiffness.errors import StudyError
from distributed_stiffness.gradients.reference import Reference
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


def test_folding_takes_its_time() -> None:
    """A pair that is folded costs that much more, and is said apart."""
    found = predict(plan(), replicas=1, speed=Speed(gradient=1e-3, pair=1e-6, fold=2e-6))

    assert found.fold_seconds == pytest.approx(3 * 1.0)
    assert found.tile_seconds == found.seconds == pytest.approx(3 * (1 + 0.5 + 1.0))
    assert "3 s for folding" in found.describe()


def test_checks_take_their_time() -> None:
    """One for each checkpoint, and the whole matrix; a single replica does them after the tiles."""
    speed = Speed(gradient=1e-3, pair=1e-6, checks=CheckSeconds(each=10, whole=4))

    found = predict(plan(), replicas=1, speed=speed)

    assert found.check_seconds == 3 * 10 + 4
    assert found.tile_seconds == pytest.approx(4.5)
    assert found.seconds == pytest.approx(38.5)
    assert "34 s for checks" in found.describe()


def test_the_last_check_is_never_faster_with_more_replicas() -> None:
    """It begins when the last tile is done, and one replica does it."""
    speed = Speed(gradient=1e-3, pair=1e-6, checks=CheckSeconds(each=10, whole=4))

    many = predict(plan(), replicas=300, speed=speed)

    assert many.seconds is not None
    assert 14 < many.seconds < 15


def test_checks_that_are_done_are_not_predicted() -> None:
    """A continued run is told of those that are left."""
    speed = Speed(gradient=1e-3, pair=1e-6, checks=CheckSeconds(each=10, whole=4))

    assert predict(plan(), replicas=1, speed=speed, unchecked=1).check_seconds == 14
    assert predict(plan(), replicas=1, speed=speed, unchecked=0).check_seconds == 0


def test_hours_at_an_assumed_rate() -> None:
    """Operations by the rate; hosts that fold more slowly than that hold their devices up."""
    speed = Speed(gradient=1e-3, pair=1e-6, fold=2e-6, checks=CheckSeconds(each=10, whole=6))
    found = predict(plan(), replicas=4, speed=speed)

    fast, slow = found.at_rate(20e12), found.at_rate(1e6)

    assert slow.device == pytest.approx(found.operations / 1e6 / 3600)
    assert slow.replicas == pytest.approx(slow.device + 36 / 3600)
    assert fast.fold == pytest.approx(3 / 3600)
    assert fast.replicas == pytest.approx(39 / 3600)
    assert "replica-hours (GPU hours" in fast.describe()
    assert json.loads(json.dumps(fast.to_json()))["replicas"] == fast.replicas


class TestWorkOfChecks:
    """What checks compute, against counting while they compute."""

    @pytest.mark.parametrize("rows", [1, 5, 40, 96])
    def test_a_sample(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Gradients and products are those of `Reference.cosines`, which holds so many rows."""
        network, counted = nn.Linear(4, 3), []
        gradients = Reference.gradients

        def counting(self: Reference, inputs: Any, targets: Any) -> Any:
            counted.append(len(inputs))
            return gradients(self, inputs, targets)

        monkeypatch.setattr(Reference, "gradients", counting)
        made = replace(plan(), memory=rows * 8 * 15 * 4 // 3)
        true = Reference(network, "cross_entropy", ["weight", "bias"])
        true.cosines(torch.randn(96, 4), torch.arange(96) % 3, memory=made.sample_memory)

        found = sample_work(made, 15)

        assert found.gradients == sum(counted)
        assert found.pairs >= 96 * 95 / 2

    def test_what_is_read_or_made_again(self) -> None:
        """Stored pairs are read by half; where there are none, gradients are made again."""
        made = replace(plan(n=1000), tile=300)
        tiles = [(i, j) for i, j in made.tiling.upper()]
        size = made.tiling.size

        assert read_pairs(made) == sum(size(i) * size(j) for i, j in tiles)
        assert remade_gradients(made) == 0
        sums = replace(made, sums_bytes=100, batch=32)
        assert read_pairs(sums) == 0
        assert remade_gradients(sums) == 2 * 1000 + 48 * 32

    def test_undecided_signs_are_counted_once(self) -> None:
        """Zeros are none; of a diagonal tile the pairs above the diagonal count."""
        tile = np.array([[0.1, 0.0, -0.1], [0.0, 0.1, 0.9], [-0.1, 0.9, 1.0]], dtype=np.float32)

        assert n_undecided(tile, 0.5, diagonal=False) == 4
        assert n_undecided(tile, 0.5, diagonal=True) == 1


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


@pytest.mark.parametrize("keep", ["pairs", "sums"])
def test_a_run_counts_what_was_predicted(
    keep: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Operations and bytes of the replicas are those of the prediction, where all rows are held."""
    seen = []
    monkeypatch.setattr(
        _Totals, "describe", lambda totals, predicted: seen.append((totals, predicted)) or ""
    )

    run_study(tiny_study(keep=keep), run_options(tmp_path / "x.zarr"))

    ((totals, predicted),) = seen
    assert totals.gradients == 4 * 60
    assert totals.operations == pytest.approx(predicted.operations)
    # Of an example and part: four sums by 10 classes and 2 · 50 bins, 10 weighted ones, 2 squares.
    expected = 5 * 4 * 60**2 if keep == "pairs" else 8 * 452 * 60 * 3 * 4
    assert totals.bytes_written == predicted.bytes_written == expected
    assert predicted.seconds > predicted.check_seconds > 0
    assert (predicted.fold_seconds > 0) == (keep == "sums")


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
