"""What a notebook hands over that cannot be computed: one sentence, and no error of torch's.

Axis letters: N examples, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from field_truth import FEATURES, one_at_a_time_at_most, right_or_said
from torch import Tensor, nn

from distributed_stiffness import class_cosine_matrix, cosine_matrix, gradient_norms, layer_cosines
from distributed_stiffness.errors import StiffnessError

N = 36
LABELS = torch.arange(N) % 3


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def texts() -> nn.Module:
    """Five words, two a text."""
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)).eval()


def flat() -> Tensor:
    return torch.randn(N, FEATURES)


def ids(low: int, high: int) -> Tensor:
    return torch.arange(2 * N).view(N, 2) % (high - low) + low


class NotFinite(nn.Module):
    """Logarithms of negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x).log()


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "ids beyond the table": (
        lambda: cosine_matrix(texts(), "cross_entropy", (ids(0, 9), LABELS)),
        "index|range",
    ),
    "ids below 0": (
        lambda: cosine_matrix(texts(), "cross_entropy", (ids(-1, 4), LABELS)),
        "index|range",
    ),
    "numbers as ids": (
        lambda: cosine_matrix(texts(), "cross_entropy", (torch.rand(N, 2), LABELS)),
        "float",
    ),
    "inputs without numbers": (
        lambda: cosine_matrix(network(), "cross_entropy", (flat().to("meta"), LABELS)),
        "meta",
    ),
    "weights without numbers": (
        lambda: cosine_matrix(network().to("meta"), "cross_entropy", (flat(), LABELS)),
        "meta",
    ),
    "weights that are not made yet": (
        lambda: cosine_matrix(
            nn.Sequential(nn.LazyLinear(3)).eval(), "cross_entropy", (flat(), LABELS)
        ),
        "lazy|uninitiali[sz]ed|not made|run it",
    ),
    "a nested tensor": (
        lambda: cosine_matrix(
            network(),
            "cross_entropy",
            (
                torch.nested.nested_tensor(
                    [torch.randn(3 + i % 2, FEATURES) for i in range(N)], layout=torch.jagged
                ),
                LABELS,
            ),
        ),
        "nested|jagged|shape|length",
    ),
    "outputs that are not finite": (
        lambda: cosine_matrix(NotFinite().eval(), "cross_entropy", (flat(), LABELS)),
        "finite",
    ),
    "a loss that is not finite": (
        lambda: cosine_matrix(network(), lambda o, _: 1 / (o[:, 0] * 0), (flat(), LABELS)),
        "finite",
    ),
    "a class": (lambda: cosine_matrix(nn.Linear, "cross_entropy", (flat(), LABELS)), "Module"),
    "a function": (
        lambda: cosine_matrix(lambda x: x, "cross_entropy", (flat(), LABELS)),
        "Module",
    ),
    "memory in words": (
        lambda: cosine_matrix(network(), "cross_entropy", (flat(), LABELS), memory="1GB"),
        "memory",
    ),
    "no patterns of a group": (
        lambda: layer_cosines(network(), "cross_entropy", (flat(), LABELS), groups={"a": None}),
        "a",
    ),
    "a number for a group": (
        lambda: layer_cosines(network(), "cross_entropy", (flat(), LABELS), groups={"a": 0}),
        "a",
    ),
    "groups as pairs": (
        lambda: layer_cosines(
            network(), "cross_entropy", (flat(), LABELS), groups=[("a", ["0.*"])]
        ),
        "group",
    ),
    "classes as texts": (
        lambda: class_cosine_matrix(
            network(), "cross_entropy", (flat(), LABELS), labels=np.array(["cat"] * N)
        ),
        "label",
    ),
    "classes as anything": (
        lambda: class_cosine_matrix(
            network(), "cross_entropy", (flat(), LABELS), labels=[object()] * N
        ),
        "label",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused(name):
    """Ours, with the word that says what it is."""
    call, word = CALLS[name]
    with (
        one_at_a_time_at_most("nested"),
        pytest.raises(StiffnessError, match=f"(?i){word}") as said,
    ):
        call()
    assert "please report" not in str(said.value)


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [
            lambda y: list(y),
            lambda y: y.numpy().astype(object),
            lambda y: __import__("xarray").DataArray(y.numpy(), dims="example"),
            lambda y: __import__("pandas").Series(y.numpy(), index=range(5, N + 5)),
            lambda y: y.to(torch.int16),
        ],
        ids=["tensors of one number", "objects", "xarray", "pandas", "int16"],
    )
    def test_in_other_forms(self, labels):
        """Whole numbers, one for each example, in whatever holds them: right, or refused."""
        net, x = network(), flat()
        usual = class_cosine_matrix(net, "cross_entropy", (x, LABELS), labels=LABELS)
        got, said = right_or_said(
            lambda: class_cosine_matrix(net, "cross_entropy", (x, LABELS), labels=labels(LABELS))
        )
        if got is None:
            assert "label" in said
        else:
            np.testing.assert_allclose(got.values, usual.values, atol=1e-9)


def test_a_lazy_network_that_was_run():
    """A lazy layer that has its weights is a layer as any."""
    net, x = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)).eval(), flat()
    net(x)
    with one_at_a_time_at_most():
        assert (gradient_norms(net, "cross_entropy", (x, LABELS)).values > 0).all()
