"""Every rule, alone and combined, against one-example autograd in float64 (reference.py)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients import PerExampleGradients, cosine_matrix
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.models import resnet18, resnet20

N = 5
CLASSES = 3

# Two right ways in float64 differ by rounding, about 1e-15 for each of a few hundred sums.
FLOAT64 = 1e-11
# float32 forward and backward pass of a few layers, relative to the example's whole gradient.
FLOAT32 = 2e-5
# The promise on cosines (issue 2): forward pass, rows and products in float32; rows and products.
COSINE = {"float32": 2e-6, "float64": 5e-7}


class Head(nn.Module):
    """Features of any shape, summed over positions with fixed weights, then a frozen linear map.

    So that the body's parameters are the ones in play, whatever shape its outputs have.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any) -> torch.Tensor:
        features = self.body(*args).flatten(1)
        size = features.shape[1] * CLASSES
        mix = torch.arange(size, dtype=features.dtype).square().cos().reshape(-1, CLASSES)
        # Many features would fit an example to where float64 itself loses p − e_y.
        return torch.tanh(features) @ mix / max(1.0, features.shape[1] / 64)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + self.shortcut(x) + x)


class CalledTwice(nn.Module):
    """One linear layer, used twice on one position each."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(x)))


class TiedLanguageModel(nn.Module):
    """The embedding is the head's weight."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Embedding(6, 4) if positions else None
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.position is not None:
            # No first dimension of examples here.
            x = x + self.position(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(self.mix(x)).mean(1))


class Scaled(nn.Module):
    """Raw parameters, multiplied and added by the network's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale + self.shift) @ self.weight


class EveryElement(nn.Module):
    """Each elementwise call with its parameter on either side."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c", "d", "e", "f"):
            self.register_parameter(name, nn.Parameter(torch.rand(4) + 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a / (x.square() + 1) + x / self.b
        x = (self.c - x) * (x - self.d)
        return torch.sub(torch.rsub(self.e, x), self.f, alpha=0.5)


class LookedUp(nn.Module):
    """An embedding by the function itself, its padding counted from the end."""

    def __init__(self, function: Callable[..., torch.Tensor], **options: Any) -> None:
        super().__init__()
        self.table, self.function, self.options = nn.Parameter(torch.randn(7, 3)), function, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.table, padding_idx=-1, **self.options)


class Added(nn.Module):
    """A matrix of parameters, as GPT-2 keeps it, and added with factors."""

    def __init__(self, **factors: float) -> None:
        super().__init__()
        self.W, self.b, self.factors = (
            nn.Parameter(torch.randn(4, 3)),
            nn.Parameter(torch.randn(3)),
            factors,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.b, x.reshape(-1, 4), self.W, **self.factors)
        return torch.add(rows.reshape(*x.shape[:-1], 3).tanh(), self.b, alpha=0.5)


class FunctionalLinear(nn.Module):
    """A linear layer without a module, its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(bias=self.b, input=torch.tanh(F.linear(x, self.W)), weight=self.W[:, :3])


class OneWeightTwoPlaces(nn.Module):
    """A weight used by a linear layer and once more outside any rule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.linear.weight.t().tanh()


class HyperNetwork(nn.Module):
    """A linear layer whose input is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.make(self.code).t()


class SequenceFirst(nn.Module):
    """Linear and norm work on (T, N, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.linear(x.transpose(0, 1)))).transpose(0, 1)


class FoldedPositions(nn.Module):
    """Positions are folded into the first dimension, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(-1, 4)).reshape(len(x), -1)


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(4, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.left(left)) * torch.tanh(self.right(right)) * self.scale


class SlicedInPlace(nn.Module):
    """A part of the layer's output is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y[:, :2] *= 2.0
        return self.second(y)


class Product(torch.autograd.Function):
    """x W, by an autograd function of the network's own: no torch call shows it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x @ weight

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


class ProductOfATranspose(Product):
    """x Wᵀ: makes a view of a parameter where nothing is in the autograd graph."""

    @staticmethod
    def forward(x, weight):
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class OwnFunction(nn.Module):
    def __init__(
        self, also_a_layer: bool = False, function: type[torch.autograd.Function] = Product
    ) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function
        self.weight = self.linear.weight if also_a_layer else nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(torch.tanh(self.linear(x)), self.weight)


class Checkpointed(nn.Module):
    """Activations are not kept, but computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

        return checkpoint(run, x, use_reentrant=False)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.not_used = nn.Linear(4, CLASSES), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class WithoutInputs(nn.Module):
    """A layer whose weight has no numbers beside one that has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.empty, self.bias = nn.Parameter(torch.empty(4, 0)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x[:, :0], self.empty, self.bias) + self.layer(x))


def sequential(*layers: nn.Module) -> nn.Module:
    return Head(nn.Sequential(*layers))


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(N, *shape)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 7, (N, *shape))


def classes() -> torch.Tensor:
    return torch.tensor([0, 2, 1, 0, 2])


@dataclass(frozen=True)
class Case:
    """A network and its inputs; `functional` are the parameters that no rule covers."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    functional: frozenset[str] = frozenset()


def case(name: str, model: Any, inputs: Any, *functional: str) -> Case:
    return Case(name, model, inputs, frozenset(functional))


def convolution(name: str, module: Callable[[], nn.Module], *shape: int):
    return case(name, lambda: sequential(module()), lambda: vectors(*shape))


CASES = [
    case(
        "linear",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
        lambda: vectors(4),
    ),
    case(
        "linear without bias",
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)),
        lambda: vectors(4),
    ),
    case(
        "linear on one position with more dimensions",
        lambda: sequential(nn.Linear(4, 3)),
        lambda: vectors(1, 1, 4),
    ),
    case("linear on a sequence", lambda: sequential(nn.Linear(4, 3)), lambda: vectors(6, 4)),
    case("linear on a grid", lambda: sequential(nn.Linear(4, 3)), lambda: vectors(2, 3, 4)),
    case(
        "linear on a sequence without bias",
        lambda: sequential(nn.Linear(4, 3, bias=False)),
        lambda: vectors(6, 4),
    ),
    convolution("conv1d with stride", lambda: nn.Conv1d(3, 4, 3, stride=2), 3, 10),
    convolution("conv1d with dilation", lambda: nn.Conv1d(3, 4, 3, dilation=3), 3, 11),
    convolution("conv1d with groups", lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), 4, 8),
    convolution("conv2d", lambda: nn.Conv2d(3, 4, 3), 3, 6, 6),
    convolution("conv2d without bias", lambda: nn.Conv2d(3, 4, 3, bias=False), 3, 6, 6),
    convolution("conv2d with padding", lambda: nn.Conv2d(3, 4, 3, padding=(1, 2)), 3, 5, 6),
    convolution("conv2d that leaves a rest", lambda: nn.Conv2d(2, 3, 3, stride=(2, 3)), 2, 8, 10),
    convolution("conv2d not square", lambda: nn.Conv2d(2, 3, (1, 4), dilation=(2, 1)), 2, 5, 7),
    convolution("conv2d 1×1", lambda: nn.Conv2d(3, 4, 1, stride=2), 3, 5, 5),
    convolution("conv2d with groups", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), 4, 5, 5),
    convolution("conv2d depthwise", lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), 3, 5, 5),
    convolution("conv2d 'same'", lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), 2, 6, 6),
    convolution("conv2d 'valid'", lambda: nn.Conv2d(2, 3, 3, padding="valid"), 2, 6, 6),
    convolution(
        "conv2d 'same' with one side longer",
        lambda: nn.Conv2d(2, 3, 4, padding="same"),
        2,
        6,
        6,
    ),
    *(
        convolution(
            f"conv2d padded by {mode}",
            lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
            2,
            5,
            5,
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    convolution("conv3d", lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), 2, 4, 5, 4),
    convolution("conv3d with groups", lambda: nn.Conv3d(2, 4, 3, groups=2, padding=1), 2, 3, 4, 3),
    convolution("transposed convolution", lambda: nn.ConvTranspose2d(2, 3, 3), 2, 4, 4),
    # From 128 positions on the first dimension of a kernel goes by steps.
    convolution("a long conv1d", lambda: nn.Conv1d(2, 3, 4, dilation=2, padding=3), 2, 140),
    convolution("a large conv2d", lambda: nn.Conv2d(3, 4, 3, padding=1), 3, 12, 12),
    convolution(
        "a large conv2d with dilation",
        lambda: nn.Conv2d(2, 3, (3, 2), dilation=(3, 2), padding=(3, 1)),
        2,
        14,
        13,
    ),
    convolution("a large conv2d with steps across", lambda: nn.Conv2d(2, 3, 3, (1, 2)), 2, 18, 20),
    convolution("a large conv2d with steps down", lambda: nn.Conv2d(2, 3, 3, (2, 1)), 2, 24, 14),
    convolution("a large conv2d with groups", lambda: nn.Conv2d(4, 6, 3, groups=2), 4, 14, 14),
    convolution(
        "a large conv3d", lambda: nn.Conv3d(2, 3, (2, 3, 1), dilation=(2, 1, 1)), 2, 8, 6, 6
    ),
    convolution("a large transposed conv2d", lambda: nn.ConvTranspose2d(3, 2, 3), 3, 12, 12),
    case("batch norm on vectors", lambda: sequential(nn.BatchNorm1d(4)), lambda: vectors(4)),
    case("batch norm on sequences", lambda: sequential(nn.BatchNorm1d(4)), lambda: vectors(4, 6)),
    case(
        "batch norm on images",
        lambda: sequential(nn.BatchNorm2d(3, eps=1e-2)),
        lambda: vectors(3, 4, 4),
    ),
    case("layer norm", lambda: sequential(nn.LayerNorm(4, eps=1e-2)), lambda: vectors(6, 4)),
    case("layer norm on vectors", lambda: sequential(nn.LayerNorm(4)), lambda: vectors(4)),
    case(
        "layer norm on images",
        lambda: sequential(nn.LayerNorm((3, 2, 2))),
        lambda: vectors(3, 2, 2),
    ),
    case(
        "layer norm without bias",
        lambda: sequential(nn.LayerNorm((3, 4), bias=False)),
        lambda: vectors(2, 3, 4),
    ),
    case("group norm", lambda: sequential(nn.GroupNorm(2, 6, eps=1e-2)), lambda: vectors(6, 3, 3)),
    case("group norm on vectors", lambda: sequential(nn.GroupNorm(2, 6)), lambda: vectors(6)),
    case(
        "instance norm",
        lambda: sequential(nn.InstanceNorm2d(3, affine=True, eps=1e-2)),
        lambda: vectors(3, 4, 4),
    ),
    case(
        "instance norm with running statistics",
        lambda: sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        lambda: vectors(3, 5),
    ),
    case("RMS norm", lambda: sequential(nn.RMSNorm(4)), lambda: vectors(6, 4)),
    case(
        "RMS norm with eps", lambda: sequential(nn.RMSNorm((3, 4), eps=1e-1)), lambda: vectors(3, 4)
    ),
    case("embedding", lambda: sequential(nn.Embedding(7, 3)), lambda: tokens(6)),
    case("embedding of one token", lambda: sequential(nn.Embedding(7, 3)), lambda: tokens()),
    case(
        "embedding with sparse gradients",
        lambda: sequential(nn.Embedding(7, 3, sparse=True)),
        lambda: tokens(6),
    ),
    case(
        "embedding with padding",
        lambda: sequential(nn.Embedding(7, 3, padding_idx=2)),
        lambda: tokens(8),
    ),
    case(
        "embedding with padding counted from the end",
        lambda: sequential(nn.Embedding(7, 3, padding_idx=-1)),
        lambda: tokens(2, 4),
    ),
    case("F.embedding", lambda: Head(LookedUp(F.embedding)), lambda: tokens(8)),
    *(
        case(
            f"F.embedding_bag, {mode}",
            lambda mode=mode: Head(LookedUp(F.embedding_bag, mode=mode)),
            lambda: tokens(8),
        )
        for mode in ("mean", "sum")
    ),
    case("a module called twice", lambda: Head(CalledTwice()), lambda: vectors(4)),
    case("tied embedding and head", TiedLanguageModel, lambda: tokens(6)),
    case(
        "embedding of positions",
        lambda: TiedLanguageModel(positions=True),
        lambda: tokens(6),
    ),
    case("every elementwise call", lambda: Head(EveryElement()), lambda: vectors(3, 4)),
    case("raw parameters", lambda: Head(Scaled()), lambda: vectors(4)),
    case("addmm", lambda: Head(Added()), lambda: vectors(6, 4)),
    case(
        "addmm with factors",
        lambda: Head(Added(alpha=2.0, beta=0.5)),
        lambda: vectors(6, 4),
        "body.W",
        "body.b",
    ),
    case("F.linear", FunctionalLinear, lambda: vectors(4)),
    case(
        "a weight in two places",
        lambda: Head(OneWeightTwoPlaces()),
        lambda: vectors(4),
    ),
    case("a parameter as input", lambda: Head(HyperNetwork()), lambda: vectors(4)),
    case(
        "weight norm",
        lambda: sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: vectors(4),
    ),
    case("multi-head attention", lambda: Head(SelfAttention()), lambda: vectors(3, 4)),
    case(
        "transformer layer",
        lambda: sequential(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)),
        lambda: vectors(3, 4),
    ),
    case(
        "PReLU",
        lambda: sequential(nn.Linear(4, 3), nn.PReLU(3)),
        lambda: vectors(4),
    ),
    case(
        "in-place ReLU",
        lambda: sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True)
        ),
        lambda: vectors(2, 6, 6),
    ),
    case(
        "in-place ReLU on a view",
        lambda: sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)),
        lambda: vectors(6, 4),
    ),
    case(
        "in-place write to a part",
        SlicedInPlace,
        lambda: vectors(4),
    ),
    case("residual", lambda: sequential(Residual(), Residual()), lambda: vectors(3, 5, 5)),
    case("sequence first", lambda: Head(SequenceFirst()), lambda: vectors(6, 4)),
    case(
        "positions folded into the batch",
        lambda: Head(FoldedPositions()),
        lambda: vectors(6, 4),
    ),
    case("tuple of inputs", TwoInputs, lambda: (vectors(4), vectors(2))),
    case(
        "dict of inputs",
        TwoInputs,
        lambda: {"right": vectors(2), "left": vectors(4)},
    ),
    case(
        "an autograd function of its own",
        lambda: Head(OwnFunction()),
        lambda: vectors(4),
        "body.weight",
    ),
    case(
        "an autograd function that takes a view of a parameter",
        lambda: Head(OwnFunction(function=ProductOfATranspose)),
        lambda: vectors(4),
        "body.weight",
    ),
    case(
        "a layer's weight in a function of its own",
        lambda: Head(OwnFunction(also_a_layer=True)),
        lambda: vectors(4),
        "body.weight",
    ),
    case("a layer without inputs", lambda: Head(WithoutInputs()), lambda: vectors(4)),
    case("activation checkpoints", lambda: Head(Checkpointed()), lambda: vectors(4)),
    case(
        "ResNet-20",
        lambda: resnet20((3, 8, 8), CLASSES, normalisation="batch"),
        lambda: vectors(3, 8, 8),
    ),
    case(
        "ResNet-20 as in the paper",
        lambda: resnet20((3, 8, 8), CLASSES),
        lambda: vectors(3, 8, 8),
    ),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# torch warns that an uneven 'same' padding takes a copy.
uneven_padding = pytest.mark.filterwarnings("ignore:Using padding='same'")


def away_from_initial_values(model: nn.Module) -> nn.Module:
    """Ones and zeros hide mistakes: draw norms, biases and running statistics anew."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


def assert_same_gradients(found, expected, tolerance: float) -> None:
    """Each parameter's part of each example's gradient, relative to the whole gradient."""
    assert found.keys() == expected.keys()
    length = reference.flat(expected).norm(dim=1)
    assert length.max() > 0
    for name, g in expected.items():
        difference = (found[name].double() - g).flatten(1).norm(dim=1)
        assert (difference <= tolerance * length).all(), f"{name}: {difference / length}"


@uneven_padding
@every_case
def test_gradients_are_those_of_autograd(case):
    """Every parameter's gradient of every example is that of one-example autograd."""
    model, inputs, targets = away_from_initial_values(case.model()), case.inputs(), classes()
    expected = reference.per_example_gradients(model, reference.cross_entropy, inputs, targets)

    exact = PerExampleGradients(model, "cross_entropy", (inputs, targets), precision="float64")
    assert_same_gradients(exact.materialised(inputs, targets), expected, FLOAT64)
    single = PerExampleGradients(model, "cross_entropy", (inputs, targets))
    assert_same_gradients(single.materialised(inputs, targets), expected, FLOAT32)


@uneven_padding
@every_case
@pytest.mark.parametrize("precision", COSINE)
def test_cosines_are_those_of_autograd(case, precision):
    """Every cosine is that of one-example autograd, to the precision that is promised."""
    model, inputs, targets = away_from_initial_values(case.model()), case.inputs(), classes()
    expected = reference.cosine_matrix(model, reference.cross_entropy, inputs, targets)

    found = cosine_matrix(model, "cross_entropy", (inputs, targets), precision=precision)
    assert abs(found.values - expected.numpy()).max() <= COSINE[precision]


@uneven_padding
@every_case
def test_no_more_than_needed_goes_through_torch_func(case):
    """What has a rule goes by it; torch.func gets the rest, and nothing is left to loops."""
    model, inputs = away_from_initial_values(case.model()), case.inputs()
    recipe = PerExampleGradients(model, "cross_entropy", (inputs, classes())).recipe

    assert set(recipe.functional) == case.functional
    assert recipe.one_by_one == recipe.unused == ()


@uneven_padding
@every_case
def test_the_form_of_the_gradients_does_not_matter(case):
    """Every weight that can be kept as factors gives the same cosines as factors."""
    model, inputs = away_from_initial_values(case.model()), case.inputs()
    expected = reference.cosine_matrix(model, reference.cross_entropy, inputs, classes())

    gradients = PerExampleGradients(model, "cross_entropy", (inputs, classes()))
    for chosen in ((), tuple(gradients.recipe.layers)):
        rows = gradients.with_factored(chosen).rows(inputs, classes())
        assert len(rows.factors) == len(chosen)
        assert abs(cosine(rows, rows) - expected).max() <= COSINE["float32"]


class TestTheCheapestForm:
    """Factors cost a pair T²(d + p) multiply-adds, the product of gradients d·p."""

    def recipe(self, model, inputs):
        return PerExampleGradients(model, "cross_entropy", (inputs, classes())).recipe

    def test_one_position(self):
        """Wide layers that see one position are kept as factors, narrow ones are not."""
        model = nn.Sequential(nn.Linear(500, 40), nn.Tanh(), nn.Linear(40, CLASSES))

        assert self.recipe(model, vectors(500)).factored == ("0.weight",)

    @pytest.mark.parametrize(("positions", "kept"), [(4, True), (64, False)])
    def test_many_positions(self, positions, kept):
        """The more positions share a weight, the dearer are its factors."""
        recipe = self.recipe(sequential(nn.Linear(400, 400)), vectors(positions, 400))

        assert recipe.layers["body.0.weight"].positions == positions
        assert bool(recipe.factored) == kept

    def test_a_small_image(self):
        """A convolution with few positions has factors too: its patches."""
        model = sequential(nn.Conv2d(256, 256, 3, padding=1))

        assert self.recipe(model, vectors(256, 2, 2)).factored == ("body.0.weight",)
        assert self.recipe(model, vectors(256, 16, 16)).factored == ()

    def test_an_embedding_of_many_words(self):
        """Two texts share few words: the rows of a large vocabulary are never laid out."""
        model = sequential(nn.Embedding(5000, 16), nn.Linear(16, 2))
        recipe = self.recipe(model, tokens(8))

        assert recipe.factored == ("body.0.weight",)

    def test_a_bias_goes_with_its_weight(self):
        """A bias that a weight's uses alone take is a last input of 1."""
        model = nn.Sequential(nn.Linear(500, 40), nn.Tanh(), nn.Linear(40, CLASSES))
        recipe = self.recipe(model, vectors(500))

        assert recipe.factored_parameters == {"0.weight", "0.bias"}
        assert recipe.structured == ("2.weight", "2.bias")


def test_wide_linear_layers_are_never_materialised():
    """For one position a layer's d·p numbers are not made: its row takes d + p."""
    d, p, n = 3000, 2000, 8
    model, x = nn.Linear(d, p), torch.randn(n, d)
    gradients = PerExampleGradients(model, "cross_entropy", (x, torch.arange(n)))

    rows = gradients.rows(x, torch.arange(n))
    assert rows.nbytes() <= 4 * n * (d + p + 1)


def test_resnet18():
    """ResNet-18 with batch normalisation: cosines as one-example autograd."""
    model = away_from_initial_values(resnet18((3, 8, 8), CLASSES))
    inputs, targets = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    expected = reference.cosine_matrix(model, reference.cross_entropy, inputs, targets)

    found = cosine_matrix(model, "cross_entropy", (inputs, targets))
    assert abs(found.values - expected.numpy()).max() <= COSINE["float32"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_has_no_rule_goes_one_at_a_time_and_says_so(kind):
    """What even torch.func cannot do is right, and warned of with the module's name."""
    model, x = Head(Recurrent(kind)), torch.randn(N, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients = PerExampleGradients(model, "cross_entropy", (x, classes()), precision="float64")

    expected = reference.per_example_gradients(model, reference.cross_entropy, x, classes())
    assert_same_gradients(gradients.materialised(x, classes()), expected, FLOAT64)
    if gradients.recipe.one_by_one:
        (warning,) = caught
        assert "body.recurrent" in str(warning.message)
        assert "one example at a time" in str(warning.message)


def test_grouped_convolution_is_not_averaged_over_its_groups():
    """Each group's weight has the gradient of its own channels (a fault of a public tool)."""
    model = sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False)).eval()
    x = torch.randn(N, 4, 5, 5)
    x[:, 1:] = 0  # only the first group sees anything

    gradients = PerExampleGradients(model, "cross_entropy", (x, classes()))
    weight = gradients.materialised(x, classes())["body.0.weight"]
    assert (weight[:, 0].flatten(1).norm(dim=1) > 0).all()
    assert (weight[:, 1:] == 0).all()


def test_the_sum_of_losses_is_differentiated():
    """A gradient does not depend on how many examples come with it (no mean over the batch)."""
    model, x = nn.Linear(4, CLASSES), torch.randn(N, 4)
    gradients = PerExampleGradients(model, "cross_entropy", (x, classes()), precision="float64")

    together = gradients.materialised(x, classes())["weight"]
    alone = gradients.materialised(x[:1], classes()[:1])["weight"]
    torch.testing.assert_close(together[:1], alone)


def test_tied_weights_are_counted_once():
    """A tied weight is one parameter, and its uses add up before any product is made."""
    model, x = TiedLanguageModel(), tokens(6)
    gradients = PerExampleGradients(model, "cross_entropy", (x, classes()))

    assert list(gradients.parameters) == ["embedding.weight", "mix.weight", "mix.bias"]
    assert gradients.n_parameters == 7 * 4 + 4 * 4 + 4


def squared_error(outputs, targets):
    return (outputs - F.one_hot(targets, outputs.shape[1])).square().sum(1)


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


def hinge(outputs, targets):
    return F.multi_margin_loss(outputs, targets, reduction="none")


class Weighted(nn.Module):
    """A loss with a tensor of its own, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, self.weight, reduction="none")


def name_of(loss):
    return getattr(loss, "__name__", type(loss).__name__)


@pytest.mark.parametrize("loss", [squared_error, smoothed, hinge, Weighted()], ids=name_of)
@pytest.mark.parametrize("name", ["linear", "conv2d with groups", "multi-head attention"])
def test_any_loss(loss, name):
    """Any callable (outputs, targets) -> (N,) is a loss."""
    (chosen,) = (case for case in CASES if case.name == name)
    model, inputs = away_from_initial_values(chosen.model()), chosen.inputs()

    gradients = PerExampleGradients(model, loss, (inputs, classes()), precision="float64")
    expected = reference.per_example_gradients(model, loss, inputs, classes())
    assert_same_gradients(gradients.materialised(inputs, classes()), expected, FLOAT64)


def test_loss_of_a_sequence():
    """Outputs may have positions: the loss of a language model is a mean over its tokens."""

    def language_loss(outputs, targets):
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)

    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7))
    text = tokens(6)
    expected = reference.per_example_gradients(model, language_loss, text, text.roll(1, 1))

    gradients = PerExampleGradients(
        model, language_loss, (text, text.roll(1, 1)), precision="float64"
    )
    assert_same_gradients(gradients.materialised(text, text.roll(1, 1)), expected, FLOAT64)


class TestParametersInPlay:
    def test_frozen_parameters_are_left_out(self):
        """A parameter that needs no gradient is not in play; those behind it are."""
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)), vectors(4)
        model[0].bias.requires_grad_(False)
        model[2].weight.requires_grad_(False)
        gradients = PerExampleGradients(model, "cross_entropy", (x, classes()), precision="float64")

        assert list(gradients.parameters) == ["0.weight", "2.bias"]
        expected = reference.per_example_gradients(model, reference.cross_entropy, x, classes())
        assert_same_gradients(gradients.materialised(x, classes()), expected, FLOAT64)
        cosines = cosine_matrix(model, "cross_entropy", (x, classes())).values
        assert abs(cosines - reference.cosine(reference.flat(expected)).numpy()).max() <= 2e-6

    def test_patterns_choose(self):
        """Glob patterns choose parameters by name, and the cosines are over those alone."""
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)), vectors(4)
        expected = reference.cosine_matrix(
            model, reference.cross_entropy, x, classes(), ["0.weight", "0.bias"]
        )

        found = cosine_matrix(model, "cross_entropy", (x, classes()), parameters=["0.*"])
        assert json.loads(found.attrs["parameters"]) == ["0.weight", "0.bias"]
        assert abs(found.values - expected.numpy()).max() <= 2e-6

    def test_a_pattern_that_matches_nothing_is_refused(self):
        """The message names the pattern and the parameters that there are."""
        with pytest.raises(ModelError, match=r"'head\.\*'.*weight, bias"):
            cosine_matrix(
                nn.Linear(4, 3), "cross_entropy", (vectors(4), classes()), parameters=["head.*"]
            )

    def test_nothing_in_play_is_refused(self):
        """A network without trainable parameters has no gradients."""
        with pytest.raises(ModelError, match="no parameter"):
            cosine_matrix(nn.Flatten(), "cross_entropy", (vectors(3), classes()))

    def test_unused_parameters_are_reported(self):
        """A parameter that gets no gradient is reported, not refused, and changes no cosine."""
        model, x = Unused(), vectors(4)
        gradients = PerExampleGradients(model, "cross_entropy", (x, classes()))

        assert gradients.recipe.unused == ("not_used.weight", "not_used.bias")
        assert (gradients.materialised(x, classes())["not_used.weight"] == 0).all()
        expected = reference.cosine_matrix(model, reference.cross_entropy, x, classes())
        found = cosine_matrix(model, "cross_entropy", (x, classes()))
        assert abs(found.values - expected.numpy()).max() <= 2e-6

    @pytest.mark.filterwarnings("ignore:the loss gradients of all examples are 0")
    def test_only_unused_parameters(self):
        """Where no parameter in play is used, every gradient is 0."""
        found = cosine_matrix(
            Unused(), "cross_entropy", (vectors(4), classes()), parameters=["not_used.*"]
        )

        assert (found.values == 0).all()

    def test_the_network_is_left_as_it_was(self):
        """No gradient is accumulated, no weight changes, in either precision."""
        model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), vectors(4)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for precision in COSINE:
            cosine_matrix(model, "cross_entropy", (x, classes()), precision=precision)

        assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def unit_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    gradients = reference.per_example_gradients(model, reference.cross_entropy, x, y)
    return reference.unit(reference.flat(gradients))


class TestTheOrderOfARow:
    """Rows of two passes are multiplied with each other, however each came about."""

    def test_images_of_two_sizes(self):
        """
        For which different ways are the fastest to make a convolution's gradients.
        """
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(5, 8, 3, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        ).eval()
        large, small, y = torch.randn(6, 5, 16, 16), torch.randn(6, 5, 8, 8), torch.arange(6) % 3

        found = cosine_matrix(model, "cross_entropy", (large, y), (small, y), check=False)

        expected = unit_gradients(model, large, y) @ unit_gradients(model, small, y).T
        assert abs(torch.from_numpy(found.values) - expected).max() <= 2e-6

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_images_in_two_memory_formats(self, precision):
        """
        Of which torch makes results in the same.
        """
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.LayerNorm([8, 6, 6]),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(288, 3),
        ).eval()
        x, y = torch.randn(6, 3, 6, 6), torch.arange(6) % 3
        others = x.contiguous(memory_format=torch.channels_last)

        found = cosine_matrix(
            model, "cross_entropy", (x, y), (others, y), precision=precision, check=False
        )

        expected = reference.cosine_matrix(model, reference.cross_entropy, x, y)
        assert abs(torch.from_numpy(found.values) - expected).max() <= 2e-6


class NormalisesGroups(nn.Module):
    """By a layer, or by itself."""

    def __init__(self, by_a_layer: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.norm = nn.GroupNorm(4, 8, affine=False) if by_a_layer else self.by_itself

    @staticmethod
    def by_itself(x: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(x, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("by_a_layer", [True, False])
def test_groups_of_flat_images_keep_their_digits(memory_format, by_a_layer):
    """
    torch takes the variance of groups of channels last as E[x²] - E[x]².
    """
    torch.manual_seed(0)
    model = NormalisesGroups(by_a_layer).eval().to(memory_format=memory_format)
    x = (1 + 0.05 * torch.randn(8, 3, 32, 32)).contiguous(memory_format=memory_format)
    y = torch.arange(8) % 3
    expected = reference.cosine_matrix(model, reference.cross_entropy, x, y)

    found = cosine_matrix(model, "cross_entropy", (x, y), check=False)

    assert abs(torch.from_numpy(found.values) - expected).max() <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_keeps_its_memory(dtype):
    """
    Whatever precision it has, and however its weights lie.
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).eval()
    model = model.to(dtype).to(memory_format=torch.channels_last)
    before = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    x, y = torch.randn(8, 3, 8, 8, dtype=dtype), torch.arange(8) % 3

    for precision in ("float32", "float64"):
        PerExampleGradients(model, "cross_entropy", (x, y), precision=precision).rows(x, y)

    assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == before


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize(
    "layer",
    [
        lambda d: nn.Conv2d(d, 6, 3, padding="same", dilation=2),
        lambda d: nn.Conv2d(d, 6, (5, 3), stride=(2, 3), padding=(2, 0)),
        lambda d: nn.ConvTranspose2d(6, d, 3, stride=2, output_padding=1),
        lambda d: nn.Conv1d(d, 6, 4, stride=2, padding=1),
        lambda d: nn.Conv3d(d, 6, (1, 2, 3)),
    ],
)
def test_convolutions_of_few_channels(layer, channels):
    """
    As images have them, laid out by planes; and of one more.
    """
    torch.manual_seed(0)
    convolution = layer(channels)
    dims = convolution.weight.dim() - 2
    x, y = torch.randn(5, convolution.in_channels, *[9, 8, 7][:dims]), torch.arange(5) % 3
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).eval()
    model(x)

    found = cosine_matrix(model, "cross_entropy", (x, y), check=False)

    expected = reference.cosine_matrix(model, reference.cross_entropy, x, y)
    assert abs(torch.from_numpy(found.values) - expected).max() <= 2e-6
