"""The table of what gradients cost."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from distributed_stiffness import WholeLoss, explain
from distributed_stiffness.errors import StudyError
from distributed_stiffness.models import cnn, fully_connected, resnet20


def images(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 16, 16), torch.arange(n) % 4


class Odd(nn.Module):
    """A parameter with a rule, one without, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.idle = nn.Linear(6, 4), nn.Linear(3, 3)
        self.power = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sigmoid() ** self.power


def test_every_parameter_is_there_once():
    """The table holds all parameters in play, and shares that add up to the whole."""
    for model in (resnet20((3, 16, 16), 4), cnn((3, 16, 16), 4), fully_connected((3, 16, 16), 4)):
        found = explain(model, "cross_entropy", images(), n_examples=1000)

        named = [name for cost in found.costs for name in cost.parameters]
        assert sorted(named) == sorted(name for name, _ in model.named_parameters())
        assert sum(cost.numbers for cost in found.costs) == sum(
            p.numel() for p in model.parameters()
        )
        assert sum(cost.share for cost in found.costs) + found.pass_share == pytest.approx(1)


def test_counts_of_a_known_network():
    """Multiply-adds and bytes are those of the formulas: T·p·d to make, p·d a pair, 4·p·d held."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 256, 400))
    weight, bias, head = explain(model, "cross_entropy", images(), n_examples=100).costs

    assert (weight.form, weight.positions) == ("row", 256)
    assert (weight.making, weight.pair, weight.bytes) == (256 * 135, 135, 4 * 135)
    assert (bias.making, bias.pair) == (5 * 256, 5)
    assert (head.form, head.positions, head.making) == ("factors", 1, 0)
    assert head.parameters == ("2.weight", "2.bias")
    assert 1280 + 400 < head.pair < 1280 * 400
    assert head.bytes == 4 * (1280 + 400 + 1)


def test_what_has_no_rule_is_named():
    """torch.func's share, and parameters without a use, are told apart."""
    found = explain(Odd(), "cross_entropy", (torch.randn(5, 6), torch.arange(5) % 4))

    forms = {name: cost.form for cost in found.costs for name in cost.parameters}
    assert forms["power"] == "torch.func"
    assert forms["idle.weight"] == "unused"
    assert "pow" in next(cost.rule for cost in found.costs if cost.parameters == ("power",))


def test_more_examples_make_pairs_weigh_more():
    """Making is N, pairs are N²."""
    few, many = (explain(resnet20((3, 16, 16), 4), "cross_entropy", images(), n_examples=n)
                 for n in (100, 10_000))  # fmt: skip

    assert many.pass_share < few.pass_share
    assert many.work > 1000 * few.work


def test_a_small_budget_shows():
    """How often each gradient is made is told; too small a budget is refused."""
    model = resnet20((3, 16, 16), 4)
    found = explain(model, "cross_entropy", images(), n_examples=5000, memory=10**9)

    assert f"each made {found.plan.gradients_per_example:.1f} times" in str(found)
    with pytest.raises(StudyError, match="too small"):
        explain(model, "cross_entropy", images(), memory=1000)


def test_the_loss_head_is_told():
    """Whether the loss is differentiated in float64, and what it means where it is not."""
    examples = images()
    model = cnn((3, 16, 16), 4)

    def squares(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return model(batch[0]).square().sum(1)

    assert "float64" in str(explain(model, "cross_entropy", examples))
    assert "own precision" in str(explain(model, WholeLoss(squares), examples))


def test_for_people_and_for_machines():
    """A table with a heading and a line for each, and JSON."""
    found = explain(cnn((3, 16, 16), 4), "cross_entropy", images())
    lines = str(found).splitlines()

    assert re.sub(" +", " ", lines[0]) == "parameters numbers rule form T making pair held share"
    assert len({len(line) for line in lines[2 : 2 + len(found.costs)]}) == 1
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["costs"][0]["parameters"] == ["0.weight"]
    assert stored["multiply_adds"] == found.work
