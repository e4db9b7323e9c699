"""Networks that return more than one tensor: the loss gets what they return.

Axis letters: N examples, d features.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from field_truth import (
    FEATURES,
    assert_cosines,
    one_at_a_time_at_most,
    right_or_said,
    true_cosines,
)
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness import cosine_matrix

N = 36
LABELS = torch.arange(N) % 3


def flat() -> Tensor:
    return torch.randn(N, FEATURES)


class Two(NamedTuple):
    logits: Tensor
    hidden: Tensor


Older = collections.namedtuple("Older", "hidden logits")


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("hidden", "logits")
    hidden: Tensor
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "namedtuple": (lambda o, h: Two(o, h), lambda r: r.logits),
    "collections.namedtuple": (lambda o, h: Older(h, o), lambda r: r.logits),
    "dataclass": (lambda o, h: Result(o, h), lambda r: r.logits),
    "dataclass, one field": (lambda o, _: Result(o), lambda r: r.logits),
    "dataclass with slots": (lambda o, h: Slotted(h, o), lambda r: r.logits),
    "mapping": (lambda o, h: {"hidden": h, "logits": o}, lambda r: r["logits"]),
    "object": (lambda o, _: Plain(o), lambda r: r.logits),
    "tuple": (lambda o, h: (o, h), lambda r: r[0]),
    "list": (lambda o, h: [h, o], lambda r: r[1]),
    "nest": (lambda o, h: {"heads": (h, Result(o))}, lambda r: r["heads"][1].logits),
}


class Returns(nn.Module):
    """Outputs and a hidden layer, in a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.l, self.container = nn.Linear(FEATURES, 8), nn.Linear(8, 3), container

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).tanh()
        return self.container(self.l(h), h)


@pytest.mark.parametrize("name", OUTPUTS)
class TestOutputs:
    def test_with_a_callable(self, name):
        """The loss gets what the network returns, unless that is an object of no known kind."""
        container, part = OUTPUTS[name]
        net, x = Returns(container).eval(), flat()

        def value(wide: nn.Module, one: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(part(wide(one)), t, reduction="none")

        true = true_cosines(net, x, LABELS, value)

        def loss(returned: Any, t: Tensor) -> Tensor:
            return F.cross_entropy(part(returned), t, reduction="none")

        with one_at_a_time_at_most():
            got, said = right_or_said(lambda: cosine_matrix(net, loss, (x, LABELS)))
            if got is None:
                assert name == "object", said
                assert "Plain" in said
            else:
                assert_cosines(got, true)

    def test_by_name(self, name):
        """Cross-entropy of a part named `logits`; else refused, with how to give the part."""
        container, part = OUTPUTS[name]
        net, x = Returns(container).eval(), flat()
        got, said = right_or_said(lambda: cosine_matrix(net, "cross_entropy", (x, LABELS)))
        if name in ("tuple", "list", "nest", "object") and got is None:
            assert "logits" in said or "Plain" in said
            return

        def value(wide: nn.Module, one: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(part(wide(one)), t, reduction="none")

        assert got is not None, said
        assert_cosines(got, true_cosines(net, x, LABELS, value))
