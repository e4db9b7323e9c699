"""The error bound acts: every public function has one, and a large one is an error.

Axis letters: N examples, d features.
"""

from __future__ import annotations

import re

import pytest
import reference
import torch
from field_truth import FEATURES, one_at_a_time_at_most, right_or_said, true_cosines, true_rows
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness import (
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.errors import GradientError

N = 48
FUNCTIONS = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
# Class means may be made in float64, and then are right.
of_pairs = pytest.mark.parametrize("function", FUNCTIONS[:4], ids=lambda f: f.__name__)
with_others = pytest.mark.parametrize(
    "function", [cosine_matrix, gram_matrix, layer_cosines], ids=lambda f: f.__name__
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, FEATURES), torch.arange(n) % 3


def own_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy as a network returns it: in its own precision."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def over_fitted() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network so sure that softmax minus one-hot cancels to float32's last digits."""
    net = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
    x = torch.randn(N, FEATURES)
    with torch.no_grad():
        y = net(x).argmax(1)
        two = net(x).topk(2).values
        scale = 15 / (two[:, 0] - two[:, 1])
        x = x[scale < scale.median() * 3]
        y = y[scale < scale.median() * 3]
        net[2].weight *= float(scale.median())
        net[2].bias *= float(scale.median())
    return net, (x, y)


class TestEveryFunctionHasABound:
    @functions
    def test_of_the_examples(self, function):
        """Small, and not 0: numbers in float32 are rounded."""
        with one_at_a_time_at_most():
            got = function(network(), "cross_entropy", data())
        assert 0 < float(got.attrs["error_bound"]) < 1e-4

    @with_others
    def test_of_others(self, function):
        """Of rows and columns that are different examples too."""
        with one_at_a_time_at_most():
            got = function(network(), "cross_entropy", data(), others=data(30))
        assert 0 < float(got.attrs["error_bound"]) < 1e-4

    @pytest.mark.parametrize("n", [1, 2, 3])
    @functions
    def test_of_few(self, function, n):
        """Of one, two and three examples."""
        with one_at_a_time_at_most():
            got = function(network(), "cross_entropy", data(n))
        assert not float(got.attrs["error_bound"]) >= 1e-4  # of no pair there is none

    def test_it_holds(self):
        """The largest error of all pairs is below it, of rows and others as of the square."""
        net, (x, y), (u, v) = network(), data(), data(30)
        with one_at_a_time_at_most():
            square = cosine_matrix(net, "cross_entropy", (x, y))
        with one_at_a_time_at_most():
            oblong = cosine_matrix(net, "cross_entropy", (x, y), others=(u, v))
        rows = [reference.unit(true_rows(net, *examples)) for examples in ((x, y), (u, v))]
        for got, true in ((square, rows[0] @ rows[0].T), (oblong, rows[0] @ rows[1].T)):
            error = (torch.from_numpy(got.values).double() - true).abs().max()
            assert float(error) <= float(got.attrs["error_bound"])

    @of_pairs
    def test_unchecked(self, function):
        """Without the long checks there is none: nothing was measured."""
        with one_at_a_time_at_most():
            got = function(network(), "cross_entropy", data(), check=False)
        assert "error_bound" not in got.attrs


class TestALargeBoundIsAnError:
    def test_the_example_is_one(self):
        """The over-fitted network's cosines are off by more than a hundredth in float32."""
        net, (x, y) = over_fitted()
        net.requires_grad_(True)
        rows = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        own_loss(net, (x[i : i + 1], y[i : i + 1])).sum(), list(net.parameters())
                    )
                ]
            )
            for i in range(len(y))
        ]
        float32 = reference.cosine(torch.stack(rows).double())
        assert float((float32 - true_cosines(net, x, y)).abs().max()) > 0.01

    @of_pairs
    def test_raised(self, function):
        """What the bound says is more than a hundredth off is not returned."""
        net, examples = over_fitted()
        with one_at_a_time_at_most("WholeLoss"), pytest.raises(GradientError) as caught:
            function(net, WholeLoss(own_loss), examples)
        said = str(caught.value)
        assert "please report" not in said
        assert "allow_error" in said
        assert re.search(r"0\.01|1e-0?2|hundredth", said)

    @of_pairs
    def test_what_to_try(self, function):
        """The message names a way out that is one: float64, or a loss of (outputs, targets)."""
        net, examples = over_fitted()
        with (
            one_at_a_time_at_most("WholeLoss"),
            pytest.raises(GradientError, match=r"float64|outputs, targets"),
        ):
            function(net, WholeLoss(own_loss), examples)
        with one_at_a_time_at_most("WholeLoss"):
            got = function(net, "cross_entropy", examples)
        assert float(got.attrs["error_bound"]) < 0.01

    @pytest.mark.parametrize("allowed", [False, True])
    def test_class_means(self, allowed):
        """Refused, unless allowed, or right: the bound holds either way."""
        net, (x, y) = over_fitted()
        keywords = {"allow_error": True} if allowed else {}
        with one_at_a_time_at_most("WholeLoss", "bound"):
            got, said = right_or_said(
                lambda: class_cosine_matrix(net, WholeLoss(own_loss), (x, y), **keywords)
            )
        if got is None:
            assert not allowed
            assert "allow_error" in said
            return
        true = true_cosines(net, x, y)
        bound = float(got.attrs["error_bound"])
        assert allowed or bound < 0.01
        for a in range(3):
            for b in range(3):
                pairs = (y[:, None] == a) & (y == b) & ~torch.eye(len(y), dtype=torch.bool)
                assert abs(float(got[a, b]) - float(true[pairs].mean())) <= bound

    def test_in_float64(self):
        """The same loss in float64 is right."""
        net, (x, y) = over_fitted()
        with one_at_a_time_at_most("WholeLoss"):
            got = cosine_matrix(net, WholeLoss(own_loss), (x, y), precision="float64")
        assert float(got.attrs["error_bound"]) < 0.01
        error = (torch.from_numpy(got.values).double() - true_cosines(net, x, y)).abs().max()
        assert float(error) < 1e-5

    @of_pairs
    def test_allowed(self, function):
        """Who allows it has the numbers, and the bound beside them."""
        net, examples = over_fitted()
        with one_at_a_time_at_most("WholeLoss", "bound"):
            got = function(net, WholeLoss(own_loss), examples, allow_error=True)
        assert float(got.attrs["error_bound"]) > 0.01

    @with_others
    def test_of_others(self, function):
        """Rows that are right against columns that are not."""
        net, (x, y) = over_fitted()
        sure = x[:30], y[:30]
        with one_at_a_time_at_most("WholeLoss"), pytest.raises(GradientError, match="allow_error"):
            function(net, WholeLoss(own_loss), data(), others=sure)
        with one_at_a_time_at_most("WholeLoss", "bound"):
            got = function(net, WholeLoss(own_loss), data(), others=sure, allow_error=True)
        assert float(got.attrs["error_bound"]) > 0.01

    @of_pairs
    def test_which_example(self, function):
        """One of twenty is lost: the message has its number."""
        net, (x, y) = over_fitted()
        sure = net(x).softmax(1).max(1).values.argmax()
        x = torch.cat([x[:17] * 0.02, x[sure][None], x[18:20] * 0.02])
        y = torch.arange(20) % 3
        y[17] = net(x).argmax(1)[17]
        with one_at_a_time_at_most("WholeLoss"), pytest.raises(GradientError) as caught:
            function(net, WholeLoss(own_loss), (x, y))
        assert re.search(r"\b17\b", str(caught.value))

    def test_in_bf16(self):
        """What bfloat16 costs is no error: a tenth is allowed there."""
        net, (x, y) = network(), data()
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, y), precision="bf16")
        error = (torch.from_numpy(got.values).double() - true_cosines(net, x, y)).abs().max()
        assert float(error) <= float(got.attrs["error_bound"]) < 0.1
