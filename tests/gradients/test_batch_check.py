"""What is wrong behind the first batch is seen in its batch: a rule, a layout, independence."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from distributed_stiffness import (
    class_cosine_matrix,
    cosine_matrix,
    explain,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients import reading
from distributed_stiffness.gradients.batch_check import BatchCheck
from distributed_stiffness.gradients.layout import Layout
from distributed_stiffness.gradients.rules.convolution import Convolution
from distributed_stiffness.gradients.rules.linear import Linear
from distributed_stiffness.models import resnet20

N, LATE = 96, 60
LITTLE = 100_000  # bytes, that hold a third of the rows
LABELS = torch.arange(N) % 3
PUBLIC = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]
public = pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)


def images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(96, 40), nn.Tanh(), nn.Linear(40, 3)),
    ).eval()


def pictures() -> Tensor:
    return torch.randn(N, 1, 8, 8)


class Marked(nn.Module):
    """A network that does something else from example `LATE` on, whose first feature is large."""

    def __init__(self, wrong: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 40), nn.Linear(40, 3)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(self.wrong(h, x[:, :1] > 5))


def vectors() -> Tensor:
    x = torch.randn(N, 6)
    x[LATE:, 0] += 100
    return x


def little(net: nn.Module) -> int:
    """Bytes in which some twenty examples are held at a time."""
    return 400 * sum(p.numel() for p in net.parameters())


class TestABrokenRule:
    @pytest.mark.parametrize("rule", [Linear, Convolution], ids=lambda r: r.__name__)
    def test_behind_the_first_batch(self, rule, monkeypatch):
        """
        The rule goes wrong after the self-check: it is said by parameter, and the cosines are right
        all the same, made another way.
        """
        net, x = images(), pictures()
        right, is_late = rule.per_example, []

        def late(self, role, call, grad):
            return right(self, role, call, grad) * (3.0 if is_late and role == "weight" else 1.0)

        monkeypatch.setattr(rule, "per_example", late)
        agrees = BatchCheck.agrees

        def after_the_first(self, *made):
            found = agrees(self, *made)
            is_late.append(True)
            return found

        monkeypatch.setattr(BatchCheck, "agrees", after_the_first)
        with pytest.warns(UserWarning, match=r"'\d\.weight'.*differs from one-example autograd"):
            found = cosine_matrix(net, "cross_entropy", (x, LABELS), memory=little(net))

        expected = reference.cosine_matrix(net, reference.cross_entropy, x, LABELS)
        np.testing.assert_allclose(found.values, expected.numpy(), atol=1e-5)
        assert len(is_late) > 2

    def test_without_the_long_checks_too(self, monkeypatch):
        """`check=False` leaves out what is done before and after, not this."""
        right = Linear.per_example
        monkeypatch.setattr(Linear, "per_example", lambda *args: 2 * right(*args))
        net, x = images(), pictures()

        with pytest.warns(UserWarning, match="differs from one-example autograd"):
            found = cosine_matrix(net, "cross_entropy", (x, LABELS), check=False)

        expected = reference.cosine_matrix(net, reference.cross_entropy, x, LABELS)
        np.testing.assert_allclose(found.values, expected.numpy(), atol=1e-5)


class TestABrokenLayout:
    def test_is_read_anew(self, monkeypatch):
        """Examples that are given each other's rows: whose they are is looked for again."""
        known = reading.Reader.read

        def swapped(self, done, *, anew=False):
            found, grads = known(self, done, anew=anew)
            if anew or done.n < 9:
                return found, grads
            order = torch.arange(done.n).roll(1).unsqueeze(1)
            layouts = tuple(Layout(done.n, places_NT=order) for _ in found.layouts)
            return reading.Reading(layouts, found.why), grads

        monkeypatch.setattr(reading.Reader, "read", swapped)
        net, x = Marked(lambda h, _: h).eval(), vectors()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = cosine_matrix(net, "cross_entropy", (x, LABELS), memory=little(net))

        expected = reference.cosine_matrix(net, reference.cross_entropy, x, LABELS)
        np.testing.assert_allclose(found.values, expected.numpy(), atol=1e-5)


class TestBrokenIndependence:
    @public
    def test_behind_the_first_batch(self, function):
        """Late examples have the mean of the batch taken from them: refused, by what it is."""

        def centred(h: Tensor, is_late: Tensor) -> Tensor:
            return torch.where(is_late, h - h.mean(0, keepdim=True), h)

        net, x = Marked(centred).eval(), vectors()
        with pytest.raises(GradientError, match=r"'[ab]\.\w+'.*the examples depend on each other"):
            function(net, "cross_entropy", (x, LABELS), memory=little(net))

    def test_of_numbers_alone(self):
        """What comes of the company without a gradient is seen too: other halves, other numbers."""

        def scaled(h: Tensor, is_late: Tensor) -> Tensor:
            return torch.where(is_late, h / h.detach().norm(), h)

        net, x = Marked(scaled).eval(), vectors()
        with pytest.raises(GradientError, match="the examples depend on each other"):
            cosine_matrix(net, "cross_entropy", (x, LABELS), check=False)


class Guarded(nn.Module):
    """A second layer runs for all if any example asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.l = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if (x[:, 0] > 1).any():
            h = torch.tanh(self.b(h))
        return self.l(h)


class Replaced(nn.Module):
    """Outliers are replaced by the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.l(torch.where(x[:, :1] > 5, h.mean(0), h))


class TestCompany:
    @pytest.mark.parametrize("network", [Guarded, Replaced])
    @public
    def test_a_path_or_a_value_that_others_decide(self, function, network):
        """Examples alone and a few together are company that half a batch is not."""
        x = torch.randn(N, 6).clamp(max=1.5)
        x[[20, 70], 0] = 6.0
        with pytest.raises(GradientError, match="the examples depend on each other"):
            function(network().eval(), "cross_entropy", (x, LABELS))

    def test_a_layer_of_no_width(self):
        """As adaptive softmax makes for rare classes: it has no numbers, and hides none."""

        class Split(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.z, self.l = nn.Linear(6, 5), nn.Linear(6, 0), nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.l(torch.cat([self.a(x), self.z(x)], 1).tanh())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of initialising no numbers
            net = Split().eval()
        x = vectors()
        found = cosine_matrix(net, "cross_entropy", (x, LABELS))
        kept = ["a.*", "l.*"]
        alone = cosine_matrix(net, "cross_entropy", (x, LABELS), parameters=kept)
        assert abs(found - alone).max() < 1e-6


class TestWhatItCosts:
    def test_is_said(self):
        """Explained before, as a share of the work; at most a twentieth of it."""
        found = explain(images(), "cross_entropy", (pictures(), LABELS), n_examples=10_000)

        assert found.plan.checked_work <= 0.05
        assert "of each batch compared with plain autograd" in str(found)
        assert 24 <= found.plan.sample <= 96

    def test_more_where_products_take_the_time(self):
        """Of every batch one example at least; the larger the matrix, the more of each."""
        network, examples = resnet20((3, 32, 32), 10), torch.randn(8, 3, 32, 32)
        plans = [
            explain(network, "cross_entropy", (examples, LABELS[:8]), n_examples=n).plan
            for n in (500, 5_000, 50_000)
        ]
        assert 1 / plans[0].batch <= plans[0].checked_share
        assert plans[0].checked_share < plans[1].checked_share < plans[2].checked_share == 1.0
        assert max(plan.checked_work for plan in plans) <= 0.05

    def test_a_batch_that_is_made_again_is_not_compared_again(self, monkeypatch):
        """A memory that holds few rows makes gradients often, of the same batches."""
        compared = []
        agrees = BatchCheck.agrees

        def counting(self, *args):
            compared.append(self._share)
            return agrees(self, *args)

        monkeypatch.setattr(BatchCheck, "agrees", counting)
        net, x = images(), pictures()
        whole = cosine_matrix(net, "cross_entropy", (x, LABELS))
        assert min(compared) > 0
        compared.clear()
        few = cosine_matrix(net, "cross_entropy", (x, LABELS), memory=LITTLE)
        again = compared.count(0.0)
        assert again > 0
        assert (
            len(compared) - again
            >= len(x) / explain(net, "cross_entropy", (x, LABELS), memory=LITTLE).plan.batch
        )
        assert abs(few - whole).max() < 1e-6
