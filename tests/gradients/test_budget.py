"""Which weights stay factors, by the work of the whole matrix within a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from distributed_stiffness.gradients import PerExampleGradients
from distributed_stiffness.gradients.budget import choose_factored, fit
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.recipe import Layer


def layer(name: str, positions: int, d: int, p: int) -> Layer:
    return Layer(name, None, positions, d, p, d * p)


layers_ = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=5
).map(lambda sizes: {f"{i}": layer(f"{i}", *size) for i, size in enumerate(sizes)})


def chosen(layers, n, room):
    cheap = tuple(w for w, one in layers.items() if one.factors_are_cheaper)
    numbers = sum(one.factored_numbers if w in cheap else one.numbers for w, one in layers.items())
    found = choose_factored(layers, cheap, n_examples=n, row_numbers=numbers, room=room)
    return cheap, found


@given(layers_)
def test_with_room_for_very_many_examples_the_pair_rule_decides(layers):
    """Where nothing is made twice, and pairs are all the work, a pair's multiply-adds count."""
    assume(all(one.factored_work != one.numbers for one in layers.values()))
    cheap, found = chosen(layers, 10**12, room=10**30)

    assert found == cheap


def test_of_few_examples_the_making_counts():
    """Factors that cost a pair more, but need no making, are cheaper for a handful of examples."""
    layers = {"conv": layer("conv", 24, 4608, 512)}

    assert chosen(layers, 10, room=10**12)[1] == ("conv",)
    assert chosen(layers, 10_000, room=10**12)[1] == ()


@given(layers_, st.integers(10, 10_000), st.integers(10**3, 10**9))
def test_what_is_cheaper_for_a_pair_stays(layers, n, room):
    """Little room adds factors, and takes none away."""
    cheap, found = chosen(layers, n, room)

    assert set(cheap) <= set(found)
    assert all(layers[w].is_shorter for w in set(found) - set(cheap))


def test_little_room_makes_factors_of_what_would_be_made_many_times():
    """Factors that cost a pair a little more save making each gradient again and again."""
    layers = {"conv": layer("conv", 24, 4608, 512)}
    assert not layers["conv"].factors_are_cheaper
    n = 10_000

    assert chosen(layers, n, room=n * 4608 * 512)[1] == ()
    assert chosen(layers, n, room=n * 4608 * 512 // 400)[1] == ("conv",)


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_the_choice_changes_no_cosine(share):
    """The plan holds the choice, and the matrix is the same."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Flatten(), nn.Linear(1800, 3))
    x, y = torch.randn(40, 6, 300), torch.arange(40) % 3
    gradients = PerExampleGradients(model, "cross_entropy", (x, y), factored=())
    whole = 40 * 4 * (300 * 300 + 1800 * 3)

    fitted, plan = fit(gradients, n_examples=40, memory=int(share * whole / 0.6) + 10**7)
    assert fitted.recipe.factored == plan.factored
    rows, expected = fitted.rows(x, y), gradients.rows(x, y)
    assert abs(cosine(rows, rows) - cosine(expected, expected)).max() <= 2e-6
