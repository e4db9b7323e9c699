"""Plans: within the budget, or refused with what helps."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distributed_stiffness.errors import StudyError
from distributed_stiffness.plan import Plan, make_plan

# Cheap enough for many examples.
thorough = settings(max_examples=200)
sizes = st.integers(1, 20_000)
rows = st.integers(1, 10**8)
# Of a row: what a pass keeps for an example (PerExampleGradients.bytes_per_example).
times = st.floats(0.01, 50)
budgets = st.integers(10**3, 10**11)
tiles = st.none() | st.integers(1, 3000)


def plan(n=1000, row=4000, making=None, memory=10**9, tile=None) -> Plan:
    return make_plan(
        n_examples=n,
        n_checkpoints=3,
        row_bytes=row,
        making_bytes=max(1, 3 * row if making is None else making),
        memory=memory,
        tile=tile,
        factored=("head.weight",),
    )


def possible(**arguments) -> Plan:
    try:
        return plan(**arguments)
    except StudyError:
        assume(False)
        raise


@thorough
@given(sizes, rows, times, budgets, tiles)
def test_within_the_budget(n, row, factor, memory, tile):
    """Rows that are held, a block of columns and a batch in work fit into the budget together."""
    making = int(factor * row)
    made = possible(n=n, row=row, making=making, memory=memory, tile=tile)

    held = max(made.panel_rows, made.block) if made.panel_rows < n else n
    assert (held + made.block) * row + made.batch * making <= memory


@thorough
@given(sizes, rows, times, budgets, tiles)
def test_blocks_tiles_and_panels_fit_each_other(n, row, factor, memory, tile):
    """A panel is whole tiles or a part of one; a block is no wider than a tile."""
    made = possible(n=n, row=row, making=int(factor * row), memory=memory, tile=tile)

    assert 1 <= made.block <= made.tile <= n
    assert made.tile == (min(tile, n) if tile else made.tile)
    assert made.block <= made.panel_rows
    assert made.panel_rows % made.tile == 0 or made.panel_rows < made.tile
    assert made.panel_chunks >= 1
    assert 1 <= made.strip <= made.tile
    assert made.holds_all == (made.panel_rows >= n)


@thorough
@given(sizes, rows, times, budgets, tiles)
def test_more_memory_is_never_worse(n, row, factor, memory, tile):
    """With twice the memory no gradient is made more often, and the tiles stay."""
    making = int(factor * row)
    little = possible(n=n, row=row, making=making, memory=memory, tile=tile)
    much = plan(n=n, row=row, making=making, memory=2 * memory, tile=tile)

    assert much.gradients_per_example <= little.gradients_per_example
    assert much.block >= little.block
    assert much.tile == little.tile


@thorough
@given(sizes, rows, times, budgets)
def test_what_the_refusal_asks_for_is_enough(n, row, factor, memory):
    """Too small a budget is refused with a size; given that size, the study fits."""
    making = int(factor * row)
    try:
        plan(n=n, row=row, making=making, memory=memory)
    except StudyError as error:
        number, unit = re.search(r"--memory ([\d.e+]+) (\w+)", str(error)).groups()
        power = ["B", "KB", "MB", "GB", "TB"].index(unit)
        plan(n=n, row=row, making=making, memory=int(float(number) * 1000**power))


def test_too_small_a_budget():
    """The message holds the budget, what is needed, and what helps."""
    with pytest.raises(StudyError, match=r"1 MB.*too small.*--memory 214 MB.*fewer replicas"):
        plan(row=4_000_000, making=12_000_000, memory=1_000_000)


def test_everything_is_held_where_it_fits():
    """Then no gradient is made twice."""
    made = plan(n=10_000, row=10_400, memory=10**9)

    assert made.holds_all
    assert made.gradients_per_example == 1


def test_asymmetric_panels():
    """With K panels each gradient is made (K + 1)/2 times (ResNet-18 in 32 GB: K = 8)."""
    made = plan(n=10_000, row=4 * 11_200_000, memory=105 * 10**9, tile=1250)

    assert made.panel_rows == 1250
    assert made.gradients_per_example == 4.5


def test_what_will_be_written():
    """Four bytes a pair, for each checkpoint and the distances."""
    assert plan(n=1000).store_bytes == 4 * 1000**2 * 4


def test_a_plan_can_be_read_and_stored():
    """One line for people, JSON for the store."""
    made = plan(n=2500)

    assert "3 checkpoints × 2,500² pairs" in made.describe()
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
