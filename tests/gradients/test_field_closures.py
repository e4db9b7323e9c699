"""Code that holds the network itself: closures, patched methods, hooks, losses.

A copy of such a network still runs the original's weights. What is true is autograd on one example
at a time, on the network as it is. Where that cannot be given it is refused: never silently less.

Axis letters: N examples, d features.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from field_truth import FEATURES, Value, assert_cosines, one_at_a_time_at_most, right_or_said
from reference import cosine, cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness import WholeLoss, cosine_matrix

N = 36
LABELS = torch.arange(N) % 3
either_way = pytest.mark.parametrize("check", [True, False])


def flat() -> Tensor:
    return torch.randn(N, FEATURES)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def class_loss(net: nn.Module, one: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(net(one), target)


def as_it_is(net: nn.Module, x: Tensor, value: Value = class_loss) -> Tensor:
    """Cosines by autograd on the network itself, one example at a time: nothing is copied."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    rows = []
    for i in range(N):
        loss = value(net, x[i : i + 1], LABELS[i : i + 1]).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return cosine(torch.stack(rows).double())


def right_or_refused(net: nn.Module, loss: Any, check: bool, value: Value = class_loss) -> None:
    """The numbers of the network as it is, or a sentence."""
    x = flat()
    true = as_it_is(net, x, value)
    with one_at_a_time_at_most("WholeLoss"):
        got, said = right_or_said(lambda: cosine_matrix(net, loss, (x, LABELS), check=check))
        if got is None:
            assert said
        else:
            assert_cosines(got, true)


# Networks whose code holds themselves.


def wrapped_layer() -> nn.Module:
    """A layer's forward wrapped on the instance, as monkey-patches do."""
    net = plain()
    old = net[0].forward

    @functools.wraps(old)
    def doubled(x: Tensor) -> Tensor:
        return old(x) * 2

    net[0].forward = doubled
    return net


def wrapped_network() -> nn.Module:
    """The whole forward replaced by a closure over the old one."""
    net = plain()
    old = net.forward
    net.forward = lambda x: old(x) + x[:, :3]
    return net


def by_partial() -> nn.Module:
    """A layer's forward as a partial of a function and the layer, as accelerate has it."""
    net = plain()
    layer = net[0]
    layer.old = layer.forward
    layer.forward = functools.partial(lambda module, x: module.old(x) * 2, layer)
    return net


class Calls(nn.Module):
    """A lambda made in __init__ that calls a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 3)
        self.function = lambda x: self.a(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.function(x))


class CallsAll(nn.Module):
    """A wrapper that runs a closure over the network that it holds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.function = net, lambda x: net(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Child(nn.Module):
    """Looks at its parent through a weak reference."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.l, self.parent = nn.Linear(8, 3), weakref.ref(parent)

    def forward(self, h: Tensor) -> Tensor:
        return self.l(h + self.parent().a.bias)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, 8)
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.a(x).tanh())


SHARED = nn.Linear(8, 8)


class OfTheModule(nn.Module):
    """A layer of the file, registered, and called by its global name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.l = nn.Linear(FEATURES, 8), SHARED, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(SHARED(self.a(x)).tanh())


class KeepsAView(nn.Module):
    """A part of a weight, taken once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(4, 3)
        self.part = self.a.weight[:4]

    def forward(self, x: Tensor) -> Tensor:
        return self.l((x @ self.part.T).tanh())


class CopiesItself(nn.Module):
    """`copy.deepcopy` gives back the module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.a(x).relu())


class LeavesOut(nn.Module):
    """`__getstate__` leaves out what the forward pass needs, to be small in files."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l, self.large = nn.Linear(FEATURES, 8), nn.Linear(8, 3), {"scale": 2.0}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"large": None}

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.a(x).tanh() * self.large["scale"])


def with_a_hook_on_another_layer() -> nn.Module:
    net = plain()
    net[0].register_forward_hook(lambda *io: io[2] + net[2].weight.sum(0))
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a layer wrapped": wrapped_layer,
    "the network wrapped": wrapped_network,
    "by a partial": by_partial,
    "a lambda of __init__": Calls,
    "a closure over all": lambda: CallsAll(plain()),
    "a weak reference": Parent,
    "a global layer": OfTheModule,
    "a view of a weight": KeepsAView,
    "its own copy": CopiesItself,
    "no whole state": LeavesOut,
    "a hook on another layer": with_a_hook_on_another_layer,
}


class TestNetworksThatHoldThemselves:
    @either_way
    @pytest.mark.parametrize("name", NETWORKS)
    def test_cosines(self, name, check):
        """Whatever the code reaches the weights by, their gradients are whole."""
        right_or_refused(NETWORKS[name]().eval(), "cross_entropy", check)


class TestLossesThatHoldTheNetwork:
    @either_way
    def test_weight_decay(self, check):
        """The weights' own squares in the loss, as many write weight decay."""
        net = plain()

        def loss(o: Tensor, t: Tensor) -> Tensor:
            return cross_entropy(o, t) + 0.05 * sum(p.square().sum() for p in net.parameters())

        right_or_refused(net, loss, check, lambda m, one, t: loss(m(one), t))

    @either_way
    def test_a_weight_in_the_loss(self, check):
        """The last layer's weights are used again behind the outputs."""
        net = plain()

        def loss(o: Tensor, t: Tensor) -> Tensor:
            return cross_entropy(o + net[2].weight.sum(1), t)

        right_or_refused(net, loss, check, lambda m, one, t: loss(m(one), t))

    @either_way
    def test_a_loss_that_runs_the_network_by_its_name(self, check):
        """A WholeLoss that calls the network of the notebook, not the one that it is given."""
        net = plain()

        def loss(_: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(net(batch[0]), batch[1], reduction="none")

        right_or_refused(net, WholeLoss(loss), check)


class TestHooksOnGradients:
    """What changes a gradient on its way changes the gradient."""

    @either_way
    def test_of_a_parameter(self, check):
        """A mask that keeps a part of a weight as it is."""
        net, mask = plain(), (torch.rand(8, FEATURES) > 0.5).float()
        net[0].weight.register_hook(lambda g: g * mask)
        right_or_refused(net, "cross_entropy", check)

    @either_way
    def test_of_a_module(self, check):
        """A layer that passes a third of the gradient on."""
        net = plain()
        net[2].register_full_backward_hook(lambda *io: (io[1][0] * 0.3,))
        right_or_refused(net, "cross_entropy", check)

    @either_way
    def test_before_a_module(self, check):
        """Outputs whose gradients count differently."""
        net = plain()
        net[2].register_full_backward_pre_hook(lambda _, o: (o[0] * torch.tensor([1.0, 2.0, 0.5]),))
        right_or_refused(net, "cross_entropy", check)
