"""float32 on the wrong side of a kink: found, and made again in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from networks import Cancelling
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.gradients import cosine_matrix
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.kinks import Kinks, KinksAgain, Moved, Rounded, Rounding
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.reference import Reference

TINY = 1e-8  # beside 1, within rounding


def inputs(*at: float) -> Tensor:
    """Three examples of many units, of which the first of the second example are given."""
    x = 1.0 + torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x[1].view(-1)[: len(at)] = torch.tensor(at)
    return x


def noted(function: Callable[[Tensor], Tensor], x: Tensor) -> Kinks:
    with Kinks(len(x)) as kinks:
        function(x)
    return kinks


FUNCTIONS = {
    "relu": (F.relu, 0.0),
    "module": (nn.ReLU(inplace=True), 0.0),
    "method": (lambda x: x.clone().relu_(), 0.0),
    "leaky": (nn.LeakyReLU(0.1), 0.0),
    "prelu": (nn.PReLU(), 0.0),
    "relu6": (nn.ReLU6(), 6.0),
    "hardtanh": (nn.Hardtanh(-1.5, 1.5), -1.5),
    "clamp": (lambda x: x.clamp(min=0.25), 0.25),
    "abs": (torch.abs, 0.0),
    "hardswish": (nn.Hardswish(), 3.0),
}


class TestFound:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_the_example_with_a_unit_near_a_kink(self, name: str) -> None:
        """
        Whichever way a network calls the function, and wherever its kink is.
        """
        function, kink = FUNCTIONS[name]
        near = float(torch.nextafter(torch.tensor(kink), torch.tensor(10.0))) if kink else TINY

        kinks = noted(function, inputs(near))

        assert kinks.examples().tolist() == [1]
        (call,) = [c for c in kinks.calls if c is not None and len(c.examples)]
        assert call.units.tolist() == [0]

    @pytest.mark.parametrize("function", [nn.GELU(), nn.Tanh(), nn.SiLU(), nn.Identity()])
    def test_nothing_in_smooth_functions(self, function: nn.Module) -> None:
        """
        They have no sides, and cost nothing.
        """
        assert noted(function, inputs(TINY)).calls == []

    def test_nothing_far_away(self) -> None:
        """
        A unit a thousandth of the others' size is decided.
        """
        assert len(noted(F.relu, inputs(1e-3, -1e-3)).examples()) == 0

    def test_exactly_at_a_kink(self) -> None:
        """
        A sum may cancel by chance; where many units are 0, nothing reaches them in any precision.
        """
        assert noted(F.relu, inputs(0.0)).examples().tolist() == [1]
        assert len(noted(F.relu, inputs(*[0.0] * 20)).examples()) == 0

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(2),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.MaxPool2d(2, stride=1, dilation=2),
        ],
    )
    def test_two_that_are_largest_in_a_window(self, pool: nn.MaxPool2d) -> None:
        """
        The largest and the second of one window, also where windows overlap or leave the image.
        """
        x = inputs()
        x[1, 1, 4, 4] = 5.0
        x[1, 1, 4 + 2 * (pool.dilation == 2), 5 - (pool.dilation == 2)] = 5.0 + 5e-7
        assert noted(pool, x).examples().tolist() == [1]

        x[1, 1, 4, 4] = 4.0

        assert len(noted(pool, x).examples()) == 0

    def test_two_that_are_equal_in_a_window(self) -> None:
        """
        They may differ in float64; what ReLU has left of a whole region does not.
        """
        x = inputs()
        x[1, 0, 0, :2] = 3.0
        x[2, 0] = 0.0

        assert noted(nn.MaxPool2d(2), x).examples().tolist() == [1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_networks_that_cast(self, dtype: torch.dtype) -> None:
        """
        A network may go through fewer digits on its way; the loops are for float32 alone.
        """
        x = inputs(TINY).to(dtype)

        assert noted(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), x).calls[0] is not None
        assert noted(F.relu, x).examples().tolist() == [1]


def moved(network: Callable[[Tensor], Tensor], x: Tensor, true: Tensor) -> tuple[Moved, ...]:
    """What is measured where float32 sees x in place of the truth."""
    with Rounded(len(x)) as rounded:
        network(x)
    with Rounding(rounded) as rounding:
        network(true)
    return rounding.moved()


class TestRounding:
    def test_is_measured_between_two_passes(self) -> None:
        """
        Call by call, as a share of the size of what float64 gives there.
        """
        true = inputs().double()
        x = true + 1e-6 * torch.randn(true.shape, dtype=torch.float64)

        with Rounded(3) as rounded:
            F.relu(true)
            nn.ReLU(inplace=True)(x.clone())
        with Rounding(rounded) as rounding:
            F.relu(true)
            nn.ReLU(inplace=True)(true.clone())
        least, found = rounding.moved()

        share = 1e-6 / float(torch.linalg.vector_norm(true) / true.numel() ** 0.5)
        assert share < found.most < 3 * share
        assert found.weight.shape == true.shape[1:]
        assert found.weight.min() == 1.0
        assert 0 < least.most < 1e-7

    def test_of_a_channel_that_is_moved_more(self) -> None:
        """
        By its normalisation, say; the others are not taken to be moved as much.
        """
        true = torch.randn(8, 5, 6, 6, dtype=torch.float64)
        scale = torch.tensor([1.0, 1.0, 8.0, 1.0, 1.0])[:, None, None]

        found = Moved.between(true + 1e-6 * scale * torch.randn_like(true), true, 1.0)

        by_channel = (found.most / found.weight).amax((1, 2))
        assert by_channel[2] == pytest.approx(8e-6, rel=0.5)
        assert float(by_channel[[0, 1, 3, 4]].max()) < 6e-6

    def test_units_that_do_not_move_say_nothing(self) -> None:
        """
        Nor do those that are not finite: the others are moved as much as ever.
        """
        true = torch.randn(8, 4, 6, 6, dtype=torch.float64)
        x = true + 1e-6 * torch.randn_like(true)
        x[:, :, 1:] = true[:, :, 1:] = 0.0
        x[0, 0, 0, 0] = torch.inf
        true[0, 0, 0, 1] = torch.nan

        found = Moved.between(x, true, 1.0)

        assert 1e-6 < found.most < 3e-6

    @pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, padding=1)])
    def test_of_windows(self, pool: nn.Module) -> None:
        """
        It is the distance of the largest from the second that is moved.
        """
        true = torch.rand(3, 2, 6, 6, dtype=torch.float64)
        x = true + 1e-6 * torch.randn(true.shape, dtype=torch.float64)

        (found,) = moved(pool, x, true)

        assert found.weight.shape == pool(true).shape[1:]
        assert 1e-6 < found.most < 1e-5
        image = torch.arange(36.0).reshape(1, 1, 6, 6).expand(3, 2, 6, 6).clone()
        image[1, 1] = 7.0 + 1e-7 * image[1, 1]
        with Kinks(3, (found,)) as kinks:
            pool(image)
        assert kinks.examples().tolist() == [1]

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x + torch.clamp(torch.tensor(9.0), max=4.6).to(x.dtype),
            lambda x: x + torch.tensor([-1.0, 2.0]).abs().sum().to(x.dtype),
            lambda x: x + torch.arange(len(x) * 2).reshape(len(x), 2).clamp(0, 1).sum(),
        ],
        ids=["a number", "a parameter", "integers"],
    )
    def test_of_what_is_not_watched(self, function: Callable[[Tensor], Tensor]) -> None:
        """
        Numbers and parameters are no units of examples, and integers are not rounded.
        """
        x = inputs(TINY)
        true = x.double() + 1e-8 * torch.randn(x.shape, dtype=torch.float64)

        *others, found = moved(lambda x: F.relu(function(x) * 0 + x), x, true)

        assert others
        assert found.weight.shape == x.shape[1:]
        with Kinks(3, (*others, found)) as kinks:
            F.relu(function(x) * 0 + x)
        assert set(kinks.calls[:-1]) == {None}
        assert kinks.examples().tolist() == [1]

    def test_of_two_passes_that_differ(self) -> None:
        """
        Of a network that makes other calls in float64 it is not known which are the same.
        """
        x = inputs()

        with Rounded(3) as rounded:
            F.relu(x)
        with Rounding(rounded) as rounding:
            F.relu(x)
            F.relu(x)

        assert rounding.moved() == ()

    def test_says_how_near_is_near(self) -> None:
        """
        In a deep network units are moved further, and more of them have to be looked at again.
        """
        x = inputs(2e-3)
        size = float(torch.linalg.vector_norm(x[1])) / x[1].numel() ** 0.5
        call = 2e-3 / size / 3  # so much is three times as far
        others = torch.full(x.shape[1:], 8.0)

        for rounding, expected in ((0.9 * call, []), (1.1 * call, [1])):
            with Kinks(3, (Moved(rounding, torch.ones(())),)) as kinks:
                F.relu(x)
            assert kinks.examples().tolist() == expected
            # As much for this unit, an eighth for others: the same.
            weight = torch.where(x[1].abs() == 2e-3, 1.0, others)
            with Kinks(3, (Moved(rounding, weight),)) as kinks:
                F.relu(x)
            assert kinks.examples().tolist() == expected
            with Kinks(3, (Moved(rounding, others),)) as kinks:
                F.relu(x)
            assert kinks.examples().tolist() == []

    def test_of_other_units_than_were_measured(self) -> None:
        """
        A longer text, a larger image: all are taken to be moved as the most were.
        """
        x = inputs(2e-3)

        with Kinks(3, (Moved(1.0, torch.full((7,), 1e9)),)) as kinks:
            F.relu(x)

        assert kinks.examples().tolist() == [0, 1, 2]

    def test_covers_the_depth_of_a_network(self) -> None:
        """
        Sixty layers move a unit across its kink from farther than any constant for small networks.
        """
        layers = [nn.Linear(32, 32) for _ in range(60)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=(2 / 32) ** 0.5)
        parts = (module for layer in layers for module in (layer, nn.ReLU()))
        model = nn.Sequential(*parts, nn.Linear(32, 4)).eval()
        x, y = torch.randn(3000, 32), torch.arange(3000) % 4

        found, exact = (
            PerExampleGradients(model, "cross_entropy", (x[:3], y[:3]), precision=name).rows(x, y)
            for name in ("float32", "float64")
        )

        torch.testing.assert_close(
            cosine(found[:100], found), cosine(exact[:100], exact), atol=5e-6, rtol=0
        )


class TestFewUnits:
    def test_a_call_of_one_unit_is_compared_with_other_examples(self) -> None:
        """
        Its own size is its distance from the kink, which rounding does not follow.
        """
        x = torch.tensor([[1.0], [-2.0], [1e-9], [0.5]])

        assert noted(F.relu, x).examples().tolist() == [2]


class TestChanged:
    def test_only_an_example_on_another_side(self) -> None:
        """
        Of two examples near a kink, the one whose other pass is beyond it.
        """
        x = inputs(TINY, -TINY)
        x[2, 0, 0, 0] = TINY
        kinks = noted(F.relu, x)
        true = x.double()
        true[1, 0, 0, 1] = TINY

        with KinksAgain(kinks.calls, 3) as again:
            F.relu(true)

        assert kinks.examples().tolist() == [1, 2]
        assert again.examples().tolist() == [1]

    def test_what_was_not_seen_again_counts_as_changed(self) -> None:
        """
        A call that was not made, or of other units: where a network's path depends on its inputs.
        """
        x = inputs(TINY)
        kinks = noted(F.relu, x)

        with KinksAgain(kinks.calls, 3) as missed:
            x.double()
        with KinksAgain(kinks.calls, 3) as other:
            F.relu(x.double()[:, :1])

        assert missed.examples().tolist() == other.examples().tolist() == [1]


class TestBehindTheLastUnit:
    def test_layers_give_zeros(self) -> None:
        """
        Of the shape of their outputs; what lies before is computed.
        """
        x = inputs(TINY)
        kinks = noted(F.relu, x)
        layer, head = nn.Conv2d(2, 5, 3, padding="same"), nn.Linear(8, 3)

        with KinksAgain(kinks.calls, 3):
            before = head(x)
            F.relu(x)
            behind, last = layer(x), head(x)

        assert before.any()
        assert behind.shape == (3, 5, 8, 8)
        assert last.shape == (3, 2, 8, 3)
        assert not behind.any()
        assert not last.any()
        assert layer(x).any()

    def test_errors_of_the_network_count_before_it_alone(self) -> None:
        """
        Zeros may lead to some.
        """
        x = inputs(TINY)
        kinks = noted(lambda x: (F.relu(x), F.relu(x + 1))[1], x)

        with pytest.raises(ZeroDivisionError), KinksAgain(kinks.calls, 3):
            1 / 0  # noqa: B018
        with KinksAgain(kinks.calls, 3) as again:
            F.relu(x)
            1 / 0  # noqa: B018

        assert again.examples().tolist() == []

    def test_a_network_that_tidies_up_at_its_end_does(self) -> None:
        """
        So that the next pass finds it as the last one did.
        """

        class Keeping(Cancelling):
            def forward(self, x: Tensor) -> Tensor:
                assert not kept
                kept.append(x)
                outputs = super().forward(x)
                kept.clear()
                return outputs

        kept: list[Tensor] = []
        torch.manual_seed(0)
        x, y = 1 + torch.rand(12, 4), torch.arange(12) % 3
        model = Keeping().eval()

        found = cosine_matrix(model, "cross_entropy", (x, y), check=False)

        names = [name for name, _ in model.named_parameters()]
        expected = Reference(model, "cross_entropy", names).cosines(x, y, memory=10**8)
        torch.testing.assert_close(
            torch.from_numpy(found.values).double(), expected, atol=2e-6, rtol=0
        )


class PReLUs(nn.Module):
    """Four calls that are alike; the second has the units."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.ModuleList(nn.PReLU(64) for _ in range(4))
        self.layer = nn.Linear(64, 64)

    def forward(self, z: Tensor) -> Tensor:
        first, second, third, fourth = self.slopes
        h = first(self.layer(z))
        h = h + second(z)
        h = h + third(self.layer(h))
        return h + fourth(self.layer(h))


class Largest(nn.Module):
    """The larger of a unit and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.linspace(0, 1, 64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.maximum(self.least, z)


def exactly_on_it(z: Tensor) -> Tensor:
    """The size of units whose first is 0 in float64 and not in float32."""
    one = torch.ones_like(z[:, :1])
    lost = ((one + 2.0**-24) - one) - 2.0**-24
    return torch.cat([z[:, :1] - z[:, :1].detach() + lost, z[:, 1:]], 1).abs()


# What a network may do with its units.
KINKS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "ReLU": lambda: F.relu,
    "by name": lambda: lambda z: torch.relu(input=z),
    "the larger, by name": lambda: lambda z: torch.maximum(input=z, other=torch.zeros_like(z)),
    "several PReLUs": PReLUs,
    "beside a parameter": Largest,
    "clamped by a tensor": lambda: lambda z: z.clamp(min=torch.zeros(64, dtype=z.dtype)),
    "exactly on it in float64": lambda: exactly_on_it,
    "of an imaginary part": lambda: lambda z: F.relu(torch.complex(z, -z).conj().imag),
    "beside a mask": lambda: lambda z: (z > 0) * F.relu(z),
    "beside the larger of two masks": lambda: lambda z: torch.maximum(z > 0, z < 1) * F.relu(z),
    "behind a derivative forwards": lambda: (
        lambda z: F.relu(z) + torch.func.jvp(F.relu, (z.detach(),), (z.detach(),))[0]
    ),
}


class TestCosines:
    @pytest.mark.parametrize("kind", KINKS)
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
    def test_are_right_whatever_a_network_does_at_its_kinks(self, kind: str) -> None:
        """
        All of its examples are on the wrong side in float32.
        """
        torch.manual_seed(0)
        model = Cancelling(kink=KINKS[kind]()).eval()
        with torch.no_grad():
            model.last.weight[:, 0] = torch.tensor([3.0, -2.0, 1.0])
        x, y = 1 + torch.rand(12, 4), torch.arange(12) % 3
        names = [name for name, _ in model.named_parameters()]
        expected = Reference(model, "cross_entropy", names).cosines(x, y, memory=10**8)

        found = cosine_matrix(model, "cross_entropy", (x, y), check=False)

        torch.testing.assert_close(
            torch.from_numpy(found.values).double(), expected, atol=2e-6, rtol=0
        )

    @pytest.mark.parametrize("kind", KINKS)
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
    def test_of_two_passes_have_the_same_calls(self, kind: str) -> None:
        """
        The one that gradients are made of, and the one that looks again at what was near a kink.
        """

        def loss(outputs: Tensor, y: Tensor) -> Tensor:
            return (1 - outputs.gather(1, y[:, None])).clamp(min=0).squeeze(1)

        torch.manual_seed(0)
        model = Cancelling(kink=KINKS[kind]()).eval()
        x, y = 1 + torch.rand(12, 4), torch.arange(12) % 3
        gradients = PerExampleGradients(model, loss, (x, y))

        of_gradients = Kinks(12)
        with of_gradients:
            gradients._passes.run(*gradients._on_device(x, y))
        with Kinks(12) as of_the_look:
            gradients._run(x, y)

        first, second = ([c and c.shape for c in k.calls] for k in (of_gradients, of_the_look))
        assert first == second
        assert (1,) in first

    def test_are_right_where_the_loss_has_the_kink(self) -> None:
        """
        It is looked at like the network's; what the loss head computes besides is not.
        """

        def loss(units: Tensor, y: Tensor) -> Tensor:
            (weights,) = torch.autograd.grad(0.5 * (units**2).sum(), units)  # it may differentiate
            weights = torch.linspace(-1, 1, 3 * 64, dtype=weights.dtype).view(64, 3)
            return F.cross_entropy(F.relu(units) @ weights, y, reduction="none")

        torch.manual_seed(0)
        model = Cancelling(kink=nn.Identity()).eval()
        model.last = nn.Identity()
        x, y = 1 + torch.rand(12, 4), torch.arange(12) % 3
        names = ["first.weight", "first.bias"]
        expected = Reference(model, loss, names).cosines(x, y, memory=10**8)
        looks: list[int] = []
        look = Kinks._look

        def counted(self: Kinks, sides: Any) -> None:
            looks.append(1)
            look(self, sides)

        with mock.patch.object(Kinks, "_look", counted):
            found = cosine_matrix(model, loss, (x, y), parameters=["first.*"], check=False)

        assert sum(looks) == 1
        torch.testing.assert_close(
            torch.from_numpy(found.values).double(), expected, atol=2e-6, rtol=0
        )

    def test_are_right_where_the_path_depends_on_the_batch(self) -> None:
        """
        Another pass makes other calls, of the same units: all in question are made again.
        """

        class Path(Cancelling):
            def forward(self, x: Tensor) -> Tensor:
                z = self.first(F.relu(x) if (x < 0).any() else x)
                return super().forward(x) + self.last(F.relu(z))

        torch.manual_seed(0)
        model = Path().eval()
        x, y = 1 + torch.rand(96, 4), torch.arange(96) % 3
        x[0, 1] = -1.0
        names = [name for name, _ in model.named_parameters()]
        expected = Reference(model, "cross_entropy", names).cosines(x, y, memory=10**8)
        gradients = PerExampleGradients(model, "cross_entropy", (x[1:9], y[1:9]))

        (rows,) = gradients.rows_of(
            lambda some: (x[some], y[some]), slice(0, 96), batch=32, mended_together=96
        )

        torch.testing.assert_close(cosine(rows, rows).double(), expected, atol=2e-6, rtol=0)
