"""Complex numbers, and derivatives inside network or loss.

What is true is autograd on one example at a time, in float64; a network that casts is copied for
it without its casts.

Axis letters: N examples, T positions, d features, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from field_truth import (
    FEATURES,
    assert_cosines,
    one_at_a_time_at_most,
    true_cosines,
    true_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness import (
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    layer_cosines,
)

N, CHANNELS, STEPS = 36, 4, 9
LABELS = torch.arange(N) % 3


def signals(seed: int = 0) -> Tensor:
    """(N, C, T) of noise."""
    return torch.randn(N, CHANNELS, STEPS, generator=torch.Generator().manual_seed(seed))


def without_casts(net: nn.Module) -> nn.Module:
    """A copy whose modules leave their casts out."""
    net = copy.deepcopy(net)
    for module in net.modules():
        module.casts = False
    return net


# Complex numbers.


class Filter(nn.Module):
    """A filter in frequency, as GFNet has: two real numbers seen as a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.l = nn.Parameter(torch.randn(4, 5, 2)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x) * torch.view_as_complex(self.w)
        return self.l(torch.fft.irfft(z, n=STEPS).tanh().mean(-1))


class ByFft(nn.Module):
    """A convolution by FFT of a real kernel, as Hyena has."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.l = nn.Parameter(torch.randn(4, STEPS)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x) * torch.fft.rfft(self.k)
        return self.l(torch.fft.irfft(z, n=STEPS).tanh().mean(-1))


class Fourier1d(nn.Module):
    """A Fourier neural operator: complex weights mix channels for each frequency."""

    def __init__(self, kink: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 5, dtype=torch.cfloat) / 2)
        self.c, self.l, self.kink = nn.Conv1d(4, 6, 1), nn.Linear(6, 3), kink

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("bix,iox->box", torch.fft.rfft(x), self.w)
        return self.l(self.kink(torch.fft.irfft(z, n=STEPS) + self.c(x)).mean(-1))


class Fourier2d(nn.Module):
    """The same in the plane: a part of the frequencies, written into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(2, 3, 2, 2, dtype=torch.cfloat))
        self.high = nn.Parameter(torch.randn(2, 3, 2, 2, dtype=torch.cfloat))
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :32].view(-1, 2, 4, 4)
        z = torch.fft.rfft2(x)
        out = torch.zeros(len(x), 3, 4, 3, dtype=z.dtype)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", z[:, :, :2, :2], self.low)
        out[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", z[:, :, -2:, :2], self.high)
        return self.l(torch.fft.irfft2(out, s=(4, 4)).tanh().mean((2, 3)))


class StateSpace(nn.Module):
    """An S4D layer: its kernel is made of complex exponentials of real parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.rand(4).log())
        self.real, self.imag = nn.Parameter(torch.rand(4, 2)), nn.Parameter(torch.randn(4, 2))
        self.c = nn.Parameter(torch.randn(4, 2, 2))
        self.d, self.l = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = -self.real.exp() + 1j * self.imag
        dt = self.step.exp()[:, None] * a
        c = torch.view_as_complex(self.c) * (dt.exp() - 1) / a
        k = 2 * torch.einsum("hn,hnl->hl", c, (dt[..., None] * torch.arange(STEPS)).exp()).real
        y = torch.fft.irfft(
            torch.fft.rfft(x, n=2 * STEPS) * torch.fft.rfft(k, n=2 * STEPS), n=2 * STEPS
        )
        return self.l((y[..., :STEPS] + x * self.d[:, None]).tanh().mean(-1))


class ComplexLayers(nn.Module):
    """Complex layers, a complex product, a real and a complex number added, an absolute value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6, dtype=torch.cfloat)
        self.m = nn.Parameter(torch.randn(6, 6, dtype=torch.cfloat) / 2)
        self.r, self.s = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.l = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(torch.fft.rfft(x).mT) @ self.m
        z = (z + self.r) * self.s
        return self.l((z.abs() + 0.1).log().mean(1))


class Polar(nn.Module):
    """Complex numbers of length and angle; a convolution and an embedding of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.angle = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.c = nn.Conv1d(4, 5, 3, dtype=torch.cfloat)
        self.e = nn.Parameter(torch.randn(3, 5, dtype=torch.cfloat))
        self.l = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.c(x * torch.polar(self.length, self.angle)[:, None]).mean(-1)
        z = z * self.e[(x[:, 0, 0] > 0).long()].conj()
        return self.l(torch.view_as_real(z).flatten(1).tanh())


class Rotary(nn.Module):
    """Positions by complex rotation, as LLaMA's own code has them, with its casts to float."""

    casts = True

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 8, bias=False) for _ in range(3))
        self.l = nn.Linear(8, 3)
        at = torch.outer(torch.arange(STEPS), 1.0 / 100 ** (torch.arange(0, 4, 2) / 4))
        self.freqs_cis = torch.polar(torch.ones_like(at), at)  # no buffer, there too

    def turned(self, x: Tensor) -> Tensor:
        z = x.float() if self.casts else x
        z = torch.view_as_complex(z.reshape(*x.shape[:-1], -1, 2))
        z = torch.view_as_real(z * self.freqs_cis[: x.shape[1]][:, None]).flatten(3)
        return z.type_as(x) if self.casts else z

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x.mT).unflatten(-1, (2, 4)) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.turned(q), self.turned(k), v))
        scores = q @ k.mT / 2
        weights = F.softmax(scores.float() if self.casts else scores, -1).type_as(q)
        return self.l((weights @ v).transpose(1, 2).flatten(2).mean(1))


COMPLEX: dict[str, Callable[[], nn.Module]] = {
    "filter in frequency": Filter,
    "convolution by FFT": ByFft,
    "Fourier operator": Fourier1d,
    "Fourier operator, smooth": lambda: Fourier1d(torch.tanh),
    "Fourier operator, 2d": Fourier2d,
    "S4D": StateSpace,
    "complex layers": ComplexLayers,
    "polar": Polar,
    "rotary positions": Rotary,
}


class TestComplexNumbers:
    """A complex number has two parts, and its gradient has too."""

    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("name", COMPLEX)
    def test_cosines(self, name, check):
        """As autograd says them, which conjugates."""
        net, x = COMPLEX[name]().eval(), signals()
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(without_casts(net), x, LABELS))

    def test_others_norms_layers_and_classes(self):
        """Every function, not the square matrix alone."""
        net, x = Fourier1d().eval(), signals()
        rows = true_rows(net, x, LABELS)
        cosine, norms = true_cosines(net, x, LABELS), rows.norm(dim=1)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x[:9], LABELS[:9]), others=(x, LABELS))
            assert_cosines(got, cosine[:9])
        with one_at_a_time_at_most():
            got = gradient_norms(net, "cross_entropy", (x, LABELS)).values
            np.testing.assert_allclose(got, norms, rtol=1e-5)
        with one_at_a_time_at_most():
            got = layer_cosines(
                net, "cross_entropy", (x, LABELS), groups={"w": ["w"], "l": ["l.*"]}
            )
            w = F.normalize(rows[:, : 2 * net.w.numel()])
            assert_cosines(got.sel(parameter_group="w"), w @ w.T)
        with one_at_a_time_at_most():
            got = class_cosine_matrix(net, "cross_entropy", (x, LABELS))
        between = cosine[LABELS == 0][:, LABELS == 1].mean()
        assert float(got[0, 1]) == pytest.approx(float(between), abs=1e-6)

    def test_complex_inputs(self):
        """Inputs are complex, as spectra and MR images are."""
        net = nn.Sequential(nn.Linear(5, 6, dtype=torch.cfloat), Absolute(), nn.Linear(6, 3)).eval()
        x = torch.fft.rfft(signals()[:, 0])
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS))
            assert_cosines(got, true_cosines(net, x, LABELS))


class Absolute(nn.Module):
    """|z|."""

    def forward(self, z: Tensor) -> Tensor:
        return z.abs()


# Derivatives inside.


def field(outputs: int = 1) -> nn.Module:
    """Places to a number."""
    return nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, outputs)).eval()


def slopes(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def heat(model: nn.Module, x: Tensor) -> Tensor:
    """Residual of u_t = 0.1 u_xx, squared: a physics-informed loss."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        g = slopes(model(x), x)
        return (g[:, 1] - 0.1 * slopes(g[:, 0], x)[:, 0]) ** 2


def heat_as_usual(model: nn.Module, x: Tensor) -> Tensor:
    """The same as most write it: nothing is detached, nothing switched on."""
    x.requires_grad_(True)
    g = slopes(model(x), x)
    return (g[:, 1] - 0.1 * slopes(g[:, 0], x)[:, 0]) ** 2


def two_terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Residual inside and a value at the boundary."""
    x, wall = batch
    return heat(model, x) + (model(wall)[:, 0] - wall[:, 0].sin()) ** 2


def forces(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Energy and forces of a potential."""
    x, wanted = batch
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = model(x)
        return (energy[:, 0] - wanted[:, 0]) ** 2 + (slopes(energy, x) + wanted).square().sum(1)


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    """A critic's value and the gradient penalty of WGAN-GP."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = model(x)
        return u[:, 0] + 10 * (slopes(u, x).norm(dim=1) - 1) ** 2


def by_functions(model: nn.Module, x: Tensor) -> Tensor:
    """The heat equation by torch.func."""

    def u(place: Tensor) -> Tensor:
        return model(place[None])[0, 0]

    first = torch.func.vmap(torch.func.grad(u))(x)
    second = torch.func.vmap(torch.func.jacrev(torch.func.grad(u)))(x)
    return (first[:, 1] - 0.1 * second[:, 0, 0]) ** 2


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[], Any]]] = {
    "heat equation": (heat, lambda: (torch.randn(N, 2), None)),
    "heat equation, as usual": (heat_as_usual, lambda: (torch.randn(N, 2), None)),
    "residual and boundary": (two_terms, lambda: ((torch.randn(N, 2), torch.randn(N, 2)), None)),
    "energy and forces": (forces, lambda: (torch.randn(N, 2), torch.randn(N, 2))),
    "gradient penalty": (penalty, lambda: (torch.randn(N, 2), None)),
    "torch.func": (by_functions, lambda: (torch.randn(N, 2), None)),
}


class TestDerivativesInTheLoss:
    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("name", LOSSES)
    def test_cosines(self, name, check):
        """A loss that differentiates the network by its inputs."""
        loss, data = LOSSES[name]
        net, (x, y) = field(), data()

        def value(wide: nn.Module, one: Any, target: Any) -> Tensor:
            one = one.clone() if isinstance(one, Tensor) else one
            return loss(wide, one if target is None else (one, target))

        true = true_cosines(net, x, y, value)
        with one_at_a_time_at_most("WholeLoss"):
            got = cosine_matrix(net, WholeLoss(loss), (x, y), check=check)
            assert_cosines(got, true)
        assert not any(t.requires_grad for t in (x if isinstance(x, tuple) else (x,)))


class Forces(nn.Module):
    """An energy whose derivative is what the network says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(FEATURES, 8), nn.Linear(8, 1), nn.Linear(FEATURES, 3)

    def energy(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def derivative(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return slopes(self.energy(x), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.derivative(x))


class ByGrad(Forces):
    """The same by torch.func.grad of one example, over the batch."""

    def derivative(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda z: self.energy(z)[0]))(x)


class ByJacobian(Forces):
    """The same by the Jacobian."""

    def derivative(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.energy))(x)[:, 0]


class ByForwardMode(Forces):
    """The same, a direction at a time, by forward mode."""

    def derivative(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacfwd(self.energy))(x)[:, 0]


class TestDerivativesInTheNetwork:
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's, of jacfwd
    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("network", [Forces, ByGrad, ByJacobian, ByForwardMode])
    def test_cosines(self, network, check):
        """What a derivative depends on has its gradient through it."""
        net, x = network().eval(), torch.randn(N, FEATURES)
        with one_at_a_time_at_most("torch.jit.script"):
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(net, x, LABELS))


class Solves(nn.Module):
    """A linear system with a matrix of parameters, as implicit layers and Gaussian processes do.

    Args:
        how: (matrix, inputs (N, d)) -> (N, d).
    """

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.c = nn.Parameter(torch.randn(FEATURES, FEATURES) / 2), nn.Linear(FEATURES, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        matrix = 3 * torch.eye(FEATURES, dtype=x.dtype) + self.w
        return self.c(self.how(matrix, x))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: torch.linalg.solve(m, x[..., None])[..., 0],
        lambda m, x: torch.linalg.solve(m, x, left=False),
        lambda m, x: x @ torch.linalg.inv(m),
        lambda m, x: torch.linalg.solve_triangular(m.tril(), x[..., None], upper=False)[..., 0],
    ],
    ids=["a system an example", "one system", "inverse", "triangular"],
)
def test_systems_that_are_solved(how, check):
    """A matrix of parameters that all examples share."""
    net, x = Solves(how).eval(), torch.randn(N, FEATURES)
    with one_at_a_time_at_most():
        got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
        assert_cosines(got, true_cosines(net, x, LABELS))
