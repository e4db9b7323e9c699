"""Examples whose gradient is 0 are nobody's evidence; where all are 0, it is said.

Axis letters: N examples, P parameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from field_networks import LAYOUTS, TimeFirst, Trims, Video, Windows
from field_truth import (
    FEATURES,
    assert_cosines,
    features,
    images,
    one_at_a_time_at_most,
    text,
    true_cosines,
    true_rows,
)
from torch import Tensor, nn

from distributed_stiffness import (
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.errors import StiffnessError

N = 40
FUNCTIONS = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]
named = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "time first": (TimeFirst, lambda: features(N, 5)),
    "frames, time first": (lambda: Video(True), lambda: images(N, 3)),
    "windows before examples": (lambda: Windows(True), lambda: features(N, 6)),
    "padding trimmed": (Trims, lambda: text(N, 7)),
    "packed": (LAYOUTS["packed LSTM"].network, lambda: text(N, 7)),
    "unpadded": (LAYOUTS["unpadded"].network, lambda: text(N, 7)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> tuple[nn.Module, Any, Tensor]:
    network, inputs = NETWORKS[name]
    return network().eval(), inputs(), torch.arange(N) % 3


class Dead(nn.Module):
    """Units that are shut for all but the examples whose last feature is above `opens`."""

    def __init__(self, opens: float) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, 8, bias=False)
        self.o = nn.Linear(8, 3, bias=False)
        self.opens = opens

    def forward(self, x: Tensor) -> Tensor:
        shut = -100.0 * (x[:, -1:] <= self.opens)
        return self.o(torch.relu(self.a(x) + shut))


@networks
class TestIgnoredLabels:
    """A label of −100 has no loss."""

    def test_the_first_eight(self, name):
        """The others are right, and a gradient of 0 has the cosine 0 with itself too."""
        net, x, y = made(name)
        y[:8] = -100
        with one_at_a_time_at_most():
            got = cosine_matrix(net, reference.cross_entropy, (x, y))
            assert_cosines(got, true_cosines(net, x, y))
        assert (got.values[:8] == 0).all()

    @pytest.mark.parametrize("labelled", [(37, 38, 39), (3, 20, 34)])
    def test_all_but_three(self, name, labelled):
        """Wherever the three stand."""
        net, x, y = made(name)
        y = torch.full_like(y, -100).index_put((torch.tensor(labelled),), torch.tensor([0, 1, 2]))
        with one_at_a_time_at_most():
            got = cosine_matrix(net, reference.cross_entropy, (x, y))
            assert_cosines(got, true_cosines(net, x, y))

    def test_all_but_one(self, name):
        """One gradient is left: its cosine with itself is 1, and all others are 0."""
        net, x, y = made(name)
        y = torch.full_like(y, -100)
        y[29] = 1
        with one_at_a_time_at_most("0"):  # it may be said that nearly all are 0
            got = cosine_matrix(net, reference.cross_entropy, (x, y))
            assert_cosines(got, true_cosines(net, x, y))

    def test_norms(self, name):
        """Lengths at true scale, 0 where there is no loss."""
        net, x, y = made(name)
        y[:8] = -100
        with one_at_a_time_at_most():
            got = gradient_norms(net, reference.cross_entropy, (x, y)).values
            true = true_rows(net, x, y).norm(dim=1).numpy()
            np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-12)
        assert (got[:8] == 0).all()

    def test_class_means(self, name):
        """Means over the pairs of two classes; those of a zero gradient are in no cosine mean."""
        net, x, y = made(name)
        labels = y.clone()
        y[:8] = -100
        with one_at_a_time_at_most():
            got = class_cosine_matrix(net, reference.cross_entropy, (x, y), labels=labels)
        cosine = true_cosines(net, x, y)
        counted = (y[:, None] >= 0) & (y >= 0) & ~torch.eye(N, dtype=torch.bool)
        for a in range(3):
            for b in range(3):
                pairs = (labels[:, None] == a) & (labels == b) & counted
                assert float(got[a, b]) == pytest.approx(float(cosine[pairs].mean()), abs=1e-6)


def said_of(call: Callable[[], Any]) -> tuple[str, Any]:
    """What a call says, as an error or as warnings, and what it returns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except StiffnessError as error:
            return str(error), None
    return " ".join(str(w.message) for w in caught), result


class TestAllAreZero:
    """A matrix of zeros is no finding: an error or a warning says where it comes from."""

    @named
    def test_all_labels_are_ignored(self, function):
        """All losses are 0, whatever the network does."""
        net, x, y = made("time first")
        y[:] = -100
        labels = {"labels": torch.arange(N) % 3} if function is class_cosine_matrix else {}
        said, got = said_of(lambda: function(net, reference.cross_entropy, (x, y), **labels))
        assert re.search(r"\b0\b", said)
        assert "gradient" in said
        assert got is None or not np.nan_to_num(got.values).any()

    @named
    def test_all_units_are_dead(self, function):
        """Losses are not 0, and gradients are."""
        x, y = torch.randn(N, FEATURES), torch.arange(N) % 3
        said, got = said_of(lambda: function(Dead(1e9).eval(), "cross_entropy", (x, y)))
        assert re.search(r"\b0\b", said)
        assert "gradient" in said
        assert got is None or not np.nan_to_num(got.values).any()

    def test_of_a_network_that_detaches_its_outputs(self):
        """No gradient reaches a parameter."""

        class Detached(Dead):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).detach()

        x, y = torch.randn(N, FEATURES), torch.arange(N) % 3
        said, got = said_of(lambda: cosine_matrix(Detached(-9.0).eval(), "cross_entropy", (x, y)))
        assert "gradient" in said
        assert got is None or not got.values.any()

    def test_of_rows_alone(self):
        """Examples without a gradient against others that have one."""
        net, x, y = made("time first")
        nothing = torch.full_like(y, -100)
        said, got = said_of(
            lambda: cosine_matrix(net, reference.cross_entropy, (x, nothing), others=(x, y))
        )
        assert re.search(r"\b0\b", said)
        assert "gradient" in said
        assert got is None or not got.values.any()


class TestDeadUnits:
    def test_the_first_eight_are_dead(self):
        """The first eight open no unit; the others are right."""
        net, x, y = Dead(0.0).eval(), torch.randn(N, FEATURES), torch.arange(N) % 3
        x = x[x[:, -1].argsort()]
        assert (x[:8, -1] < 0).all()
        with one_at_a_time_at_most():
            assert_cosines(cosine_matrix(net, "cross_entropy", (x, y)), true_cosines(net, x, y))

    def test_three_live(self):
        """Three of forty open units."""
        net, x, y = Dead(5.0).eval(), torch.randn(N, FEATURES), torch.arange(N) % 3
        x[[11, 25, 39], -1] = 6.0
        with one_at_a_time_at_most():
            assert_cosines(cosine_matrix(net, "cross_entropy", (x, y)), true_cosines(net, x, y))

    def test_a_group_of_parameters_that_is_dead_for_the_first_eight(self):
        """One layer is not reached by the first eight, while the head is."""
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        with torch.no_grad():
            net[0].weight[:, -1] = 100.0
        x, y = torch.randn(N, FEATURES), torch.arange(N) % 3
        x[:, -1] = torch.where(torch.arange(N) < 8, -1.0, 0.1)
        with one_at_a_time_at_most():
            got = layer_cosines(net, "cross_entropy", (x, y))
        rows = true_rows(net, x, y)
        first = 8 * FEATURES + 8
        for name, own in (("0", rows[:, :first]), ("2", rows[:, first:])):
            assert_cosines(got.sel(parameter_group=name), reference.cosine(own))

    def test_rows_are_alive_and_others_are_not(self):
        """Columns of which the first eight are dead."""
        net, x, y = Dead(0.0).eval(), torch.randn(N, FEATURES), torch.arange(N) % 3
        dead_first = x[:, -1].argsort()
        with one_at_a_time_at_most():
            others = (x[dead_first], y[dead_first])
            got = cosine_matrix(net, "cross_entropy", (x, y), others=others)
            assert_cosines(got, true_cosines(net, x, y)[:, dead_first])
