"""Modules that keep what they made: tensors with history, and caches.

What is true is autograd on one example at a time, in float64, of a twin that is made anew.

Axis letters: N examples, T positions, d features.
"""

from __future__ import annotations

import functools
import weakref
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
    twin_of,
)
from reference import unit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

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
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def flat(n: int = N) -> Tensor:
    return torch.randn(n, FEATURES)


def steps(n: int = N) -> Tensor:
    return torch.randn(n, STEPS, FEATURES)


# Tensors with history.


class Keeps(nn.Module):
    """Keeps its activations, as attention maps are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.maps = nn.Linear(FEATURES, 8), nn.Linear(8, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.relu(self.a(x))
        self.maps.append({"map": (self.hidden, self.hidden.softmax(-1))})
        return self.b(self.hidden)


class KeepsState(nn.Module):
    """Keeps its last state, and begins anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.l, self.state = nn.GRU(FEATURES, 8, batch_first=True), nn.Linear(8, 3), None

    def forward(self, x: Tensor) -> Tensor:
        out, self.state = self.r(x)
        return self.l(out[:, -1])


def layered(first: nn.Module, last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), last or nn.Linear(8, 3))


def pruned() -> nn.Module:
    net = layered(nn.Linear(FEATURES, 8))
    prune.l1_unstructured(net[0], "weight", amount=0.3)
    return net


def with_gradcam() -> nn.Module:
    """Hooks keep a layer's output and its gradient."""
    net, kept = layered(nn.Linear(FEATURES, 8)), {}
    net[1].register_forward_hook(lambda *seen: kept.update(activation=seen[2]))
    net[1].register_full_backward_hook(lambda *seen: kept.update(gradient=seen[2][0]))
    net.kept = kept
    return net


HISTORY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "weight_norm": (lambda: layered(nn.utils.weight_norm(nn.Linear(FEATURES, 8))), flat),
    "weight_norm of all": (
        lambda: layered(
            nn.utils.weight_norm(nn.Linear(FEATURES, 8)),
            nn.utils.weight_norm(nn.Linear(8, 3), dim=None),
        ),
        flat,
    ),
    "weight_norm of a convolution": (
        lambda: nn.Sequential(
            nn.utils.weight_norm(nn.Conv1d(STEPS, 4, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        steps,
    ),
    "spectral_norm": (lambda: layered(nn.utils.spectral_norm(nn.Linear(FEATURES, 8))), flat),
    "pruned": (pruned, flat),
    "parametrized weight_norm": (
        lambda: layered(parametrizations.weight_norm(nn.Linear(FEATURES, 8))),
        flat,
    ),
    "parametrized spectral_norm": (
        lambda: layered(parametrizations.spectral_norm(nn.Linear(FEATURES, 8))),
        flat,
    ),
    "kept activations": (Keeps, flat),
    "kept state": (KeepsState, steps),
    "Grad-CAM": (with_gradcam, flat),
}


class TestTensorsWithHistory:
    @either_way
    @pytest.mark.parametrize("ran", [False, True], ids=["fresh", "run before"])
    @pytest.mark.parametrize("name", HISTORY)
    def test_cosines(self, name, ran, check):
        """A graph of an earlier pass on the module is nobody's business."""
        made, inputs = HISTORY[name]
        net, x = made().eval(), inputs()
        if ran:
            net(x)
        true = true_cosines(twin_of(made, net), x, LABELS)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true)

    @functions
    def test_every_function(self, function):
        """As of the newer function, which keeps none."""
        net = layered(nn.utils.weight_norm(nn.Linear(FEATURES, 8))).eval()
        new = layered(parametrizations.weight_norm(nn.Linear(FEATURES, 8))).eval()
        new.load_state_dict(net.state_dict())
        x = flat()
        with one_at_a_time_at_most():
            got = function(net, "cross_entropy", (x, LABELS))
        if function is not layer_cosines:  # its groups have other names
            expected = function(new, "cross_entropy", (x, LABELS)).values
            np.testing.assert_allclose(got.values, expected, rtol=1e-5, atol=1e-6)


# Caches.


class Attends(nn.Module):
    """Attention with a bias for each distance; while evaluating, the table of biases is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.l = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, 3)
        self.b, self.kept = nn.Parameter(torch.randn(STEPS)), self.empty()
        self.at = (torch.arange(STEPS)[:, None] - torch.arange(STEPS)).abs()

    def empty(self) -> Any:
        return None

    def bias(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept = self.empty()
            return self.b[self.at]
        return self.looked_up(x)

    def looked_up(self, _x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.b[self.at]
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        weights = (q @ k.mT / FEATURES**0.5 + self.bias(x)).softmax(-1)
        return self.l((weights @ v).mean(1))


class ByDevice(Attends):
    """Kept in a mapping by device, as timm has it."""

    def empty(self) -> Any:
        return {}

    def looked_up(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.b[self.at]
        return self.kept[str(x.device)]


class BySize(ByDevice):
    """Kept by length, and the number of examples."""

    def looked_up(self, x: Tensor) -> Tensor:
        if tuple(x.shape[:2]) not in self.kept:
            self.kept[tuple(x.shape[:2])] = self.b[self.at].expand(len(x), -1, -1)
        return self.kept[tuple(x.shape[:2])]


class InAList(Attends):
    """Kept in a list."""

    def empty(self) -> Any:
        return []

    def looked_up(self, _x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(self.b[self.at])
        return self.kept[0]


class WhenSwitched(Attends):
    """The table is made when evaluation begins, as merged weights of LoRA are."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.kept = None if mode else self.b[self.at]
        return self


CACHES = [Attends, ByDevice, BySize, InAList, WhenSwitched]


class TestCachesOfWeights:
    @either_way
    @pytest.mark.parametrize("before", ["nothing", "no_grad", "inference_mode", "a pass"])
    @pytest.mark.parametrize("made", CACHES)
    def test_cosines(self, made, before, check):
        """A table kept while evaluating hides no gradient, whoever made it and how."""
        net, x = made(), steps()
        if before == "no_grad":
            with torch.no_grad():
                net.eval()(x)
        elif before == "inference_mode":
            with torch.inference_mode():
                net.eval()(x)
        elif before == "a pass":
            net.eval()(x)
        net.eval()
        true = true_cosines(twin_of(made, net).train(), x, LABELS)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true)
        assert not net.training


class InABuffer(Attends):
    """Kept as a buffer that no state dict has."""

    def looked_up(self, _x: Tensor) -> Tensor:
        if "table" not in self._buffers:
            self.register_buffer("table", self.b[self.at], persistent=False)
        return self.table


class InAnObject(Attends):
    """Kept by an object that is no module."""

    class Store:
        table: Tensor | None = None

    def empty(self) -> Any:
        return self.Store()

    def looked_up(self, _x: Tensor) -> Tensor:
        if self.kept.table is None:
            self.kept.table = self.b[self.at]
        return self.kept.table


class AsAProperty(Attends):
    """Kept as a cached property."""

    @functools.cached_property
    def table(self) -> Tensor:
        return self.b[self.at]

    def looked_up(self, _x: Tensor) -> Tensor:
        return self.table


class ByAFunction(Attends):
    """Kept by `functools.lru_cache` on a method: by the function, not the module."""

    @functools.lru_cache(maxsize=8)  # noqa: B019 - what people write
    def table(self, steps: int) -> Tensor:
        return self.b[self.at[:steps, :steps]]

    def looked_up(self, x: Tensor) -> Tensor:
        return self.table(x.shape[1])


TABLES: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


class ByTheFile(Attends):
    """Kept in a mapping of the file, for each module."""

    def looked_up(self, _x: Tensor) -> Tensor:
        if self not in TABLES:
            TABLES[self] = self.b[self.at]
        return TABLES[self]


class TestCachesInUnusualPlaces:
    @pytest.mark.parametrize(
        ("made", "check"),
        [
            *((made, check) for made in (InABuffer, InAnObject, AsAProperty) for check in (0, 1)),
            # Out of the network's reach, and so of every check but that before long work.
            (ByAFunction, True),
            (ByTheFile, True),
        ],
    )
    @pytest.mark.parametrize("validated", [False, True], ids=["fresh", "validated"])
    def test_right_or_refused(self, made, validated, check):
        """What cannot be cleared is refused: no gradient is left out silently."""
        net, x = made().eval(), steps()
        if validated:
            with torch.no_grad():
                net(x)
        true = true_cosines(twin_of(made, net).train(), x, LABELS)
        with one_at_a_time_at_most():
            got, said = right_or_said(
                lambda: cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            )
            if got is None:
                assert said
            else:
                assert_cosines(got, true)


class Rotates(nn.Module):
    """Cosines and sines of positions, made for the longest so far and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.l = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, 3)
        self.cos = self.sin = None

    def table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.cos is None or len(self.cos) < x.shape[1]:
            at = torch.outer(torch.arange(x.shape[1]), 0.1 ** torch.arange(3)).to(x.dtype)
            self.cos, self.sin = at.cos(), at.sin()
        return self.cos[: x.shape[1]], self.sin[: x.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        q, k, v = self.q(x).chunk(3, -1)
        turned = []
        for t in (q, k):
            even, odd = t[..., ::2], t[..., 1::2]
            turned.append(torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1))
        return self.l(((turned[0] @ turned[1].mT).softmax(-1) @ v).mean(1))


@functools.lru_cache
def positions(length: int) -> Tensor:
    """Kept by a function."""
    return torch.linspace(0, 1, length)[:, None]


class Positions(nn.Module):
    """Positions that a function keeps, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.a(x + positions(x.shape[1])).relu().mean(1))


class TestCachesOfConstants:
    @either_way
    @pytest.mark.parametrize("ran", [False, True], ids=["fresh", "run before"])
    @pytest.mark.parametrize("made", [Rotates, Positions])
    def test_cosines(self, made, ran, check):
        """What was kept in one precision is not used in another unawares."""
        net, x = made().eval(), steps()
        if ran:
            with torch.no_grad():
                net(x)
        true = true_cosines(twin_of(made, net), x, LABELS)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true)

    def test_longer_others(self):
        """A table that grows between rows and columns."""
        net, x = Rotates().eval(), steps()
        longer, labels = torch.randn(20, STEPS + 3, FEATURES), torch.arange(20) % 3
        twin = twin_of(Rotates, net)
        rows, columns = true_rows(twin, x, LABELS), true_rows(twin, longer, labels)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), others=(longer, labels))
            assert_cosines(got, unit(rows) @ unit(columns).T)
