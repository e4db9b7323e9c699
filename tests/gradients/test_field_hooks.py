"""Hooks, buffers, flags and random numbers of the user, and modules that wrap others.

What is true is autograd on one example at a time, in float64.

Axis letters: N examples, T positions, d features.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from field_truth import (
    FEATURES,
    assert_cosines,
    one_at_a_time_at_most,
    right_or_said,
    true_cosines,
    twin_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed_stiffness import (
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)

N, STEPS = 36, 6
LABELS = torch.arange(N) % 3
FUNCTIONS = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
either_way = pytest.mark.parametrize("check", [True, False])


def flat(n: int = N) -> Tensor:
    return torch.randn(n, FEATURES)


def steps(n: int = N) -> Tensor:
    return torch.randn(n, STEPS, FEATURES)


def usual() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


class TestHooks:
    @functions
    def test_a_hook_that_counts(self, function):
        """It sees a pass or two for a call, not a hundred."""
        net, seen = usual(), []
        net[0].register_forward_hook(lambda *_: seen.append(1))
        net.register_forward_pre_hook(lambda *_: seen.append(0))
        function(net, "cross_entropy", (flat(), LABELS))
        assert seen.count(1) <= 2
        assert seen.count(0) <= 2

    @either_way
    def test_a_hook_that_changes_an_output(self, check):
        """It is a part of the network."""
        net, x = usual(), flat()
        net[0].register_forward_hook(lambda _, i, o: o * 3 - i[0].sum(1, keepdim=True))
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(net, x, LABELS))

    @either_way
    def test_a_hook_that_changes_an_input(self, check):
        """So is one that stands before a layer, or before the network."""
        net, x = usual(), flat()
        net[2].register_forward_pre_hook(lambda _, i: (i[0] ** 2,))
        net.register_forward_pre_hook(lambda _, i: (i[0].flip(1) * 2,))
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(net, x, LABELS))

    @either_way
    def test_hooks_of_the_backward_pass(self, check):
        """Hooks that look at gradients, of modules and of parameters."""
        net, x, seen = usual(), flat(), []
        true = true_cosines(net, x, LABELS)
        net[2].register_full_backward_hook(lambda *io: seen.append(io[2][0].norm()))
        net[1].register_full_backward_pre_hook(lambda _, o: seen.append(o[0].norm()))
        net[0].weight.register_hook(lambda g: seen.append(g.norm()))
        with one_at_a_time_at_most():
            assert_cosines(cosine_matrix(net, "cross_entropy", (x, LABELS), check=check), true)

    def test_a_hook_on_every_module(self):
        """Hooks of all modules of the process stay, and change nothing."""
        net, x, seen = usual(), flat(), []
        true = true_cosines(net, x, LABELS)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        try:
            with one_at_a_time_at_most():
                assert_cosines(cosine_matrix(net, "cross_entropy", (x, LABELS)), true)
            seen.clear()
            net(x)
            assert len(seen) == 4
        finally:
            handle.remove()


class Counts(nn.Module):
    """Counts its examples and keeps a moving average, while evaluating too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.seen += len(x)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        out = self.l(h)
        self.last = out.detach().mean(0)
        return out


class Normalised(nn.Module):
    """InstanceNorm that follows its statistics, in training mode as style networks leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.l = nn.InstanceNorm1d(STEPS, track_running_stats=True), nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.n.train()(x).tanh().mean(1))


class Drawn(nn.Module):
    """Draws numbers that change nothing, and one for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) + 0 * torch.rand(1)


@functions
class TestWhatIsTheUsers:
    @pytest.mark.parametrize(("made", "inputs"), [(Counts, flat), (Normalised, steps)])
    def test_buffers(self, function, made, inputs):
        """Counters and running statistics stay as they were."""
        net = made().eval()
        before = {name: b.clone() for name, b in net.named_buffers()}
        with one_at_a_time_at_most():
            function(net, "cross_entropy", (inputs(), LABELS))
        after = dict(net.named_buffers())
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name

    def test_flags_and_gradients(self, function):
        """Training flags, what requires a gradient, gradients at hand and the weights stay."""
        net, x = usual(), flat()
        net.add_module("last", nn.Identity().train())
        net[0].bias.requires_grad_(False)
        net[2].weight.grad = torch.ones(3, 8)
        kept, weights = net[2].weight.grad, {k: v.clone() for k, v in net.state_dict().items()}
        with one_at_a_time_at_most():
            function(net, "cross_entropy", (x, LABELS))
        assert [m.training for m in net.modules()] == [False] * 4 + [True]
        assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]
        assert net[2].weight.grad is kept
        assert torch.equal(kept, torch.ones(3, 8))
        assert [p.grad for p in (net[0].weight, net[0].bias, net[2].bias)] == [None] * 3
        assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
        assert not x.requires_grad
        assert x.grad is None

    def test_random_state(self, function):
        """Random numbers of the user go on where they were."""
        net, x = Drawn().eval(), flat()
        random.seed(3)
        states = torch.get_rng_state(), random.getstate()
        with one_at_a_time_at_most():
            function(net, "cross_entropy", (x, LABELS))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]


# Wrappers.


class Checkpointed(nn.Module):
    """A part is run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def part(self, h: Tensor) -> Tensor:
        return self.b(h).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.l(checkpoint(self.part, self.a(x), use_reentrant=self.reentrant))


class Named(Tensor):
    """A tensor with a class of its own."""


class Subclassed(nn.Module):
    """Parameters of a subclass of Tensor, and of Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, FEATURES).as_subclass(Named))
        self.l = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(nn.functional.linear(x, self.w).relu())


class Wrapped(nn.Module):
    """Passes everything on, as DistributedDataParallel and its like do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def in_parts(compiled: bool) -> nn.Module:
    part = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    part = torch.compile(part, backend="eager") if compiled else part
    return nn.Sequential(nn.Linear(FEATURES, 8), part, nn.Linear(8, 3))


# What makes each, and its twin.
WRAPPED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "checkpoint, reentrant": (lambda: Checkpointed(True), lambda: Checkpointed(False)),
    "checkpoint, not reentrant": (lambda: Checkpointed(False), lambda: Checkpointed(False)),
    "a subclass of Tensor": (Subclassed, Subclassed),
    "a wrapper": (lambda: Wrapped(usual()), usual),
    "DataParallel": (lambda: nn.DataParallel(usual()), usual),
    "partly compiled": (lambda: in_parts(True), lambda: in_parts(False)),
    "compiled": (lambda: torch.compile(usual(), backend="eager"), usual),
}


class TestWrappers:
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's, of compile
    @either_way
    @pytest.mark.parametrize("name", WRAPPED)
    def test_cosines(self, name, check):
        """What is inside counts."""
        made, plain = WRAPPED[name]
        net, x = made().eval(), flat()
        true = true_cosines(twin_of(plain, net), x, LABELS)
        with one_at_a_time_at_most("torch.jit.script", "None of the inputs"):
            got, said = right_or_said(
                lambda: cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            )
            if name == "checkpoint, reentrant":  # torch's own autograd.grad refuses it
                assert "use_reentrant=False" in said
            else:
                assert_cosines(got, true)
