"""Networks, losses and callers that change the type of numbers on the way.

What is true is autograd on one example at a time, in float64, of the network without its casts.

Axis letters: N examples, d features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from field_truth import (
    FEATURES,
    assert_cosines,
    one_at_a_time_at_most,
    right_or_said,
    true_cosines,
    true_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distributed_stiffness import (
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)

N = 36
LABELS = torch.arange(N) % 3
PROMISE = 1e-5
# What half precision on the way costs: eleven bits, and eight.
HALF, BFLOAT16 = 5e-3, 3e-2
either_way = pytest.mark.parametrize("check", [True, False])


class Layers(nn.Module):
    """Two layers and a kink; `exact` leaves out what changes types."""

    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def cast(self, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        return x if self.exact else how(x)


class Float(Layers):
    """`.float()` between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.cast(self.b(x @ self.a.weight.T).relu(), Tensor.float))


class FloatsInputs(Layers):
    """`.float()` on what comes in: pictures as bytes, features in double precision."""

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.a(self.cast(x, Tensor.float)).relu())


class ToType(Layers):
    """`.to(torch.float32)` and `.type(torch.FloatTensor)` before layers."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.cast(x, lambda t: t.to(torch.float32))).relu()
        return self.l(self.cast(self.b(h), lambda t: t.type(torch.FloatTensor)).relu())


class TypeAs(Layers):
    """`.type_as` of a weight, and `.to` of a tensor made in the network."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu().type_as(self.b.weight)
        ones = torch.ones(len(x), 8, dtype=x.dtype if self.exact else torch.float32)
        return self.l(self.b(h).to(ones) + ones)


class SoftmaxInFloat(Layers):
    """A softmax in float32, as transformers have it, and back to what came."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        p = h.softmax(-1) if self.exact else F.softmax(h, -1, dtype=torch.float32).to(h.dtype)
        return self.l(self.b(p).relu())


class MadeInside(Layers):
    """Numbers made inside, of the default type, joined with those that came."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8, dtype=x.dtype if self.exact else torch.float32)
        h[:, :] = self.a(x).relu()
        scale = torch.tensor(0.5, dtype=x.dtype if self.exact else torch.float32)
        return self.l(self.b(h) * scale)


class NormInFloat(Layers):
    """A root mean square in float32, as Llama has it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        z = self.cast(h, lambda t: t.to(torch.float32))
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.l(self.b(z.to(h.dtype)).relu())


class ExactInHalf(Layers):
    """Inputs through half precision, which holds these inputs exactly."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.cast(x, lambda t: t.half().float())
        return self.l(self.cast(self.a(x).relu(), Tensor.float))


class ThroughHalf(Layers):
    """Activations through half precision and back."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cast(self.a(x).tanh(), lambda t: t.half().float())
        return self.l(self.b(h).tanh())


class ThroughBfloat16(Layers):
    """Activations through bfloat16 and back to the type of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cast(self.a(x).tanh(), lambda t: t.to(torch.bfloat16).to(self.b.weight.dtype))
        return self.l(self.b(h).tanh())


class Autocast(Layers):
    """A part under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not self.exact):
            h = self.b(self.a(x).tanh())
        return self.l(self.cast(h, Tensor.float).tanh())


class MadeAgain(Layers):
    """A cast and a normalisation whose activations are made again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.b(self.cast(self.n(self.a(x)), Tensor.float).tanh())

        return self.l(checkpoint(run, x, use_reentrant=False))


class NoAutocast(Layers):
    """A part that switches autocast off, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.b(self.cast(self.a(x).relu(), Tensor.float))
        return self.l(h.relu())


def eighths() -> Tensor:
    """Inputs that half precision holds exactly."""
    return torch.randint(-16, 17, (N, FEATURES)) / 8


class TwoTypes(nn.Module):
    """The first layer in float32, the second in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.a(x).relu().to(self.l.weight.dtype))


class CastsToDouble(TwoTypes):
    """The same with the type by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.a(x).relu().double())


def exactly(net: nn.Module) -> nn.Module:
    """A copy that changes no types."""
    made = type(net)()
    made.load_state_dict(net.state_dict())
    made.exact = True
    return made.double().eval()


class TestNetworksThatCast:
    @either_way
    @pytest.mark.parametrize(
        "network",
        [
            Float,
            FloatsInputs,
            ToType,
            TypeAs,
            SoftmaxInFloat,
            MadeInside,
            NormInFloat,
            ExactInHalf,
            MadeAgain,
            NoAutocast,
        ],
    )
    def test_to_float(self, network, check):
        """A cast to float32 changes no number of a float32 network."""
        net, x = network().eval(), eighths()
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(exactly(net), x, LABELS))

    @either_way
    @pytest.mark.parametrize("network", [Float, MadeInside, MadeAgain, NormInFloat])
    def test_in_float64(self, network, check):
        """Asked for in float64, the network's own casts are all that is lost."""
        net, x = network().eval(), eighths()
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check, precision="float64")
            assert_cosines(got, true_cosines(exactly(net), x, LABELS), within=1e-6)

    @either_way
    @pytest.mark.parametrize("network", [TwoTypes, CastsToDouble])
    def test_of_two_types(self, network, check):
        """Layers of float32 and float64 in one network."""
        net, x = network().eval(), torch.randn(N, FEATURES)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(net, x, LABELS))

    @pytest.mark.parametrize(
        ("network", "within"),
        [(ThroughHalf, HALF), (ThroughBfloat16, BFLOAT16), (Autocast, BFLOAT16)],
    )
    def test_through_half_precision(self, network, within):
        """What is rounded on the way is right within that rounding, or refused as such."""
        net, x = network().eval(), eighths()
        with one_at_a_time_at_most():
            got, said = right_or_said(lambda: cosine_matrix(net, "cross_entropy", (x, LABELS)))
            if got is None:
                words = "half", "float16", "autocast", "precision", "error bound"
                assert any(word in said for word in words), said
            else:
                assert_cosines(got, true_cosines(exactly(net), x, LABELS), within)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


FUNCTIONS = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]


class TestAutocastAround:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    @either_way
    def test_cosines(self, dtype, precision, check):
        """The precision that was asked for counts, not the caller's autocast."""
        net, x = network(), torch.randn(N, FEATURES)
        true = true_cosines(net, x, LABELS)
        with one_at_a_time_at_most(), torch.autocast("cpu", dtype=dtype):
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check, precision=precision)
            assert torch.is_autocast_enabled("cpu")
        assert_cosines(got, true, PROMISE)

    @pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
    def test_every_function(self, function):
        """Inside autocast as outside of it."""
        net, x = network(), torch.randn(N, FEATURES)
        outside = function(net, "cross_entropy", (x, LABELS)).values
        with one_at_a_time_at_most(), torch.autocast("cpu", dtype=torch.bfloat16):
            inside = function(net, "cross_entropy", (x, LABELS)).values
        np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-5)

    def test_a_loss_that_runs_the_network(self):
        """A WholeLoss is run without it too."""
        net, x = network(), torch.randn(N, FEATURES)

        def own(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

        with one_at_a_time_at_most("WholeLoss"), torch.autocast("cpu", dtype=torch.bfloat16):
            got = cosine_matrix(net, WholeLoss(own), (x, LABELS))
        assert_cosines(got, true_cosines(net, x, LABELS))


WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
SOFT = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.0, 0.2, 0.8]])


def weighted(o: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(o, t, weight=w, reduction="none")


class Focal(nn.Module):
    """A loss of modules, with class weights as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = WEIGHTS

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        p = o.log_softmax(1).gather(1, t[:, None])[:, 0]
        return -self.alpha[t] * (1 - p.exp()) ** 2 * p


# The loss, and the same without a type of its own; and what makes the targets.
LOSSES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "class weights": (
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS, reduction="none"),
        lambda o, t: weighted(o, t, WEIGHTS.double()),
    ),
    "class weights, partial": (
        functools.partial(weighted, w=WEIGHTS),
        lambda o, t: weighted(o, t, WEIGHTS.double()),
    ),
    "class weights, nll": (
        lambda o, t: F.nll_loss(o.log_softmax(1), t, weight=WEIGHTS, reduction="none"),
        lambda o, t: weighted(o, t, WEIGHTS.double()),
    ),
    "class weights, a module": (
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="none"),
        lambda o, t: weighted(o, t, WEIGHTS.double()),
    ),
    "focal": (
        Focal(),
        lambda o, t: (
            -(
                WEIGHTS.double()[t]
                * (1 - o.softmax(1).gather(1, t[:, None])[:, 0]) ** 2
                * o.log_softmax(1).gather(1, t[:, None])[:, 0]
            )
        ),
    ),
    "soft labels": (
        lambda o, t: F.cross_entropy(o, SOFT[t], reduction="none"),
        lambda o, t: -(SOFT.double()[t] * o.log_softmax(1)).sum(1),
    ),
    "squares of one-hot": (
        lambda o, t: F.mse_loss(o, F.one_hot(t, 3).float(), reduction="none").sum(1),
        lambda o, t: ((o - F.one_hot(t, 3)) ** 2).sum(1),
    ),
    "binary": (
        lambda o, t: F.binary_cross_entropy_with_logits(
            o, F.one_hot(t, 3).float(), pos_weight=WEIGHTS, reduction="none"
        ).sum(1),
        lambda o, t: (
            -(
                WEIGHTS.double() * F.one_hot(t, 3) * F.logsigmoid(o)
                + (1 - F.one_hot(t, 3)) * F.logsigmoid(-o)
            ).sum(1)
        ),
    ),
    "product with a matrix": (
        lambda o, t: (o.softmax(1) @ SOFT).log().gather(1, t[:, None])[:, 0],
        lambda o, t: (o.softmax(1) @ SOFT.double()).log().gather(1, t[:, None])[:, 0],
    ),
    "casts outputs": (
        lambda o, t: F.cross_entropy(o.float(), t, reduction="none"),
        lambda o, t: F.cross_entropy(o, t, reduction="none"),
    ),
}


class TestLossesWithTensorsOfTheirOwn:
    @pytest.mark.parametrize("name", LOSSES)
    @either_way
    def test_cosines(self, name, check):
        """Weights and tables of float32 in the loss."""
        loss, plain = LOSSES[name]
        net, x = network(), torch.randn(N, FEATURES)
        true = true_cosines(net, x, LABELS, lambda wide, one, t: plain(wide(one), t))
        with one_at_a_time_at_most():
            got = cosine_matrix(net, loss, (x, LABELS), check=check)
            assert_cosines(got, true)

    @pytest.mark.parametrize("name", LOSSES)
    def test_norms(self, name):
        """At true scale."""
        loss, plain = LOSSES[name]
        net, x = network(), torch.randn(N, FEATURES)
        true = true_rows(net, x, LABELS, lambda wide, one, t: plain(wide(one), t)).norm(dim=1)
        with one_at_a_time_at_most():
            got = gradient_norms(net, loss, (x, LABELS)).values
        np.testing.assert_allclose(got, true, rtol=1e-5)
        assert WEIGHTS.dtype == SOFT.dtype == torch.float32

    def test_probabilities_as_targets(self):
        """Targets of float32."""
        net, x, p = network(), torch.randn(N, FEATURES), torch.rand(N, 3).softmax(1)

        def loss(o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o, t, reduction="none")

        with one_at_a_time_at_most():
            got = cosine_matrix(net, loss, (x, p))
            assert_cosines(got, true_cosines(net, x, p, lambda wide, one, t: loss(wide(one), t)))
