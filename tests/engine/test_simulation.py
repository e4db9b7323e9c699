"""Simulated replicas (benchmarks/simulation.py) on the real scheduler: busy, and done whatever."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from distributed_stiffness.plan import Plan, make_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    """The benchmark's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("simulation")


def resnet20(tile: int) -> Plan:
    """Four checkpoints; a replica holds 1,250 to 2,000 rows."""
    return make_plan(
        n_examples=10_000,
        n_checkpoints=4,
        row_bytes=1_084_460,
        making_bytes=4_907_680,
        memory=4 * 10**9,
        tile=tile,
    )


def times(simulation: ModuleType):
    return simulation.Times(gradient=3.6e-3, pair=3.4e-6, tile=0.02, load=0.015, check=2.8)


class TestSimulation:
    def test_one_replica_is_never_idle(self, simulation) -> None:
        """It makes gradients as often as the plan says, and no more."""
        plan = resnet20(1250)
        found = simulation.simulate(plan, times(simulation), simulation.Cluster(1, noise=0.0))

        assert found.busy_share > 0.99
        assert found.making / found.making_once == pytest.approx(plan.gradients_per_example)

    @pytest.mark.parametrize("replicas", [4, 16, 32])
    def test_replicas_are_busy_to_the_end(self, simulation, replicas) -> None:
        """With 17 tiles and more for each replica, less than a tenth of its time is idle."""
        found = simulation.simulate(
            resnet20(625), times(simulation), simulation.Cluster(replicas), checks=False
        )

        assert found.all_done
        assert found.busy_share > 0.9

    def test_whatever_happens_all_is_done(self, simulation) -> None:
        """Replicas come late, are slow, and are lost every two minutes."""
        rough = simulation.Cluster(16, arrive_over=30, lost_each=120, away=20, slow_share=0.2)
        found = simulation.simulate(resnet20(1250), times(simulation), rough)

        assert found.lost > 10
        assert found.all_done

    def test_a_decision_takes_less_than_a_millisecond(self, simulation) -> None:
        """With 512 replicas too: their driver has other things to do."""
        found = simulation.simulate(
            resnet20(500), times(simulation), simulation.Cluster(512), checks=False
        )

        assert found.decision < 1e-3
