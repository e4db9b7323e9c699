"""Networks drawn at random, against one-example autograd in float64.

A network is a tree of modules, raw parameters and functions on features (N, *positions, d), images
(N, C, *S) or tokens (N, T), with a head, a form of inputs and outputs, and a loss. What is expected
comes from a reference of its own, which knows nothing of the package.

Axis letters: N examples, T positions, d features, C channels, S sizes of an image.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from distributed_stiffness.errors import StudyError
from distributed_stiffness.gradients import (
    PerExampleGradients,
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.gradients.budget import fit
from distributed_stiffness.gradients.gram import Rows, cosine

CLASSES = 3
WORDS = 7

# Two right ways in float64, relative to the example's gradient.
EXACT = 1e-9
# The promise on cosines: all in float32; rows and products in float32.
COSINE = {"float32": 2e-6, "float64": 7e-7}
# Other blocks sum in another order.
MOVED = 1e-6
# Nothing is promised where float32 itself has lost the digits: networks are passed over for which
# torch's own float32 gradients, one by one, give cosines with an error above this.
WELL_CONDITIONED = 5e-7
# Gradients below this, of losses of about 1, are differences of rounding errors.
VANISHED = 1e-5
# Factors lose the digits that cancel between an example's positions; see test_notebook_calls.py.
CANCELLED = 2.5

# torch warns that an uneven 'same' padding takes a copy.
# What torch.func cannot do is right all the same, one example at a time.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:no structured rule and no torch.func"),
]


# The reference


def one_example(nest: Any, i: int, dtype: torch.dtype) -> Any:
    """Example i of a tensor, a tuple or a dict, as a batch of one."""
    if isinstance(nest, Mapping):
        return {key: one_example(value, i, dtype) for key, value in nest.items()}
    if isinstance(nest, tuple):
        return tuple(one_example(value, i, dtype) for value in nest)
    one = nest[i : i + 1].clone()  # networks may write their input in place
    return one.to(dtype) if one.is_floating_point() else one


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def class_loss(outputs: Any, targets: Tensor) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    return F.cross_entropy(logits, targets, reduction="none")


def expected_gradients(
    model: nn.Module,
    loss: Any,
    examples: tuple[Any, Any],
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Each parameter's gradient of each example's loss, (N, *shape), one after the other."""
    model = copy.deepcopy(model).to(dtype)
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).to(dtype)
    value = class_loss if loss == "cross_entropy" else loss
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(count(examples)):
        inputs, targets = (one_example(part, i, dtype) for part in examples)
        if isinstance(value, WholeLoss):
            total = value.function(model, (inputs, targets)).sum()
        else:
            total = value(call(model, inputs), targets).sum()
        try:
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        except RuntimeError as error:
            # Drawn in-place operations may spoil what torch itself needs; and its weight
            # normalisation takes no weights that a convolution has laid channels last.
            assume("modified by an inplace operation" not in str(error))
            assume("grad_weight needs to be contiguous" not in str(error))
            raise
        for (name, p), g in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g.to_dense())
    return {name: torch.stack(column).double() for name, column in rows.items()}


def require_consistent(
    model: nn.Module, loss: Any, examples: tuple[Any, Any], found: Mapping[str, Tensor]
) -> None:
    """Pass over networks for which torch contradicts itself.

    torch 2.14 differentiates F.rms_norm wrongly for one example whose positions lie apart in
    memory: then the sum of single gradients is not the gradient of the summed loss.
    """
    model = copy.deepcopy(model).double()
    loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
    value = class_loss if loss == "cross_entropy" else loss
    inputs, targets = (in_float64(part) for part in examples)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = torch.autograd.grad(
        value(call(model, inputs), targets).sum(), list(parameters.values()), allow_unused=True
    )
    size = flat(found).norm(dim=1).sum()
    for name, g in zip(parameters, whole, strict=True):
        if g is not None:
            assume((found[name].sum(0) - g.to_dense()).norm() <= EXACT * size)


def in_float64(nest: Any) -> Any:
    if isinstance(nest, Mapping):
        return {key: in_float64(value) for key, value in nest.items()}
    if isinstance(nest, tuple):
        return tuple(in_float64(value) for value in nest)
    return nest.double() if nest.is_floating_point() else nest.clone()


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], 1)


def expected_cosines(gradients: Mapping[str, Tensor]) -> Tensor:
    g_NP = flat(gradients)
    length = g_NP.norm(dim=1, keepdim=True)
    unit = g_NP / torch.where(length > 0, length, 1.0)
    return unit @ unit.T


def leaves(nest: Any) -> list[Tensor]:
    if isinstance(nest, Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, Mapping) else nest
    return [leaf for part in parts for leaf in leaves(part)]


def count(examples: tuple[Any, Any]) -> int:
    return len(leaves(examples)[0])


def chosen(nest: Any, rows: Any) -> Any:
    """Some examples of a nest."""
    if isinstance(nest, Mapping):
        return {key: chosen(value, rows) for key, value in nest.items()}
    if isinstance(nest, tuple):
        return tuple(chosen(value, rows) for value in nest)
    return nest[rows]


# Parts of networks: each draws a module for a kind and shape, and says what comes out

Shape = tuple[int, ...]
State = tuple[str, Shape]  # ("features", (*positions, d)) or ("image", (C, *S)), without N
Draw = Callable[[st.SearchStrategy], Any]
Part = Callable[[Draw, Shape], tuple[nn.Module, State]]


class Do(nn.Module):
    """A function of the module's own parts and its input, as the code of a network has it."""

    def __init__(
        self, text: str, function: Callable[[Do, Tensor], Tensor], **parts: Tensor | nn.Module
    ) -> None:
        super().__init__()
        self.text, self.function = text, function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def extra_repr(self) -> str:
        own = {name: tuple(p.shape) for name, p in self.named_parameters(recurse=False)}
        return f"{self.text} {own or ''}"


booleans = st.booleans()
widths = st.sampled_from([1, 2, 3, 4, 5, 20])


def divisors(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([k for k in range(1, n + 1) if n % k == 0])


def about(value: float, shape: Shape) -> Tensor:
    """Numbers near ±`value`, of moderate size and away from zero."""
    sign = torch.where(torch.rand(shape) < 0.3, -1.0, 1.0)
    return sign * value * (0.7 + 0.6 * torch.rand(shape))


def weight(*shape: int) -> Tensor:
    """A matrix that keeps the size of what it is multiplied with."""
    return torch.randn(shape) / math.sqrt(shape[0])


def eps(draw: Draw) -> float:
    return draw(st.sampled_from([1e-2, 1e-1]))


def linear(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    out = draw(widths)
    return nn.Linear(shape[-1], out, bias=draw(booleans)), ("features", (*shape[:-1], out))


def parametrised(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    out = draw(st.integers(1, 5))
    layer = nn.Linear(shape[-1], out, bias=draw(booleans))
    by = draw(
        st.sampled_from(
            [
                parametrizations.weight_norm,
                lambda m: parametrizations.weight_norm(m, dim=None),
                parametrizations.spectral_norm,
                *(
                    lambda m, kind=kind: parametrizations.orthogonal(m, orthogonal_map=kind)
                    for kind in ("matrix_exp", "cayley", "householder")
                ),
            ]
        )
    )
    return by(layer), ("features", (*shape[:-1], out))


def matrix(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    d, out = shape[-1], draw(widths)
    forms: dict[str, Callable[[], Do]] = {
        "x @ W": lambda: Do("x @ W", lambda m, x: x @ m.W, W=weight(d, out)),
        "torch.matmul": lambda: Do(
            "matmul(x, W)", lambda m, x: torch.matmul(x, m.W), W=weight(d, out)
        ),
        "F.linear": lambda: Do(
            "linear(x, W, b)",
            lambda m, x: F.linear(x, weight=m.W, bias=m.b),
            W=weight(d, out).T.contiguous(),
            b=torch.randn(out),
        ),
        "x @ W.T": lambda: Do("x @ W.T", lambda m, x: x @ m.W.T, W=weight(d, out).T.contiguous()),
        "a part of W": lambda: Do(
            "x @ W[1:, :p]", lambda m, x: x @ m.W[1:, :-1], W=weight(d + 1, out + 1)
        ),
        "einsum": lambda: Do(
            "einsum", lambda m, x: torch.einsum("...i,ij->...j", x, m.W), W=weight(d, out)
        ),
        "W of a product": lambda: Do(
            "x @ (A @ B)", lambda m, x: x @ (m.A @ m.B), A=weight(d, 2), B=weight(2, out)
        ),
    }
    if len(shape) == 1:
        forms |= {
            "mm": lambda: Do("x.mm(W)", lambda m, x: x.mm(m.W), W=weight(d, out)),
            "addmm": lambda: Do(
                "addmm(b, x, W)",
                lambda m, x: torch.addmm(m.b, x, m.W),
                W=weight(d, out),
                b=torch.randn(out),
            ),
        }
    return forms[draw(st.sampled_from(sorted(forms)))](), ("features", (*shape[:-1], out))


def shared_weight(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    d = shape[-1]
    form = draw(st.sampled_from(["two layers", "transposed", "called twice", "two biases"]))
    if form == "two layers":
        first, second = nn.Linear(d, d, bias=draw(booleans)), nn.Linear(d, d, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second), ("features", shape)
    if form == "transposed":
        W = weight(d, draw(widths))
        module = Do("linear(tanh(x @ W), W)", lambda m, x: F.linear(torch.tanh(x @ m.W), m.W), W=W)
        return module, ("features", shape)
    if form == "called twice":
        layer = nn.Linear(d, d, bias=draw(booleans))
        return nn.Sequential(layer, nn.Tanh(), layer), ("features", shape)
    module = Do(
        "linear(tanh(linear(x, W, b)), W, c)",
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.W, m.b)), m.W, m.c),
        W=weight(d, d),
        b=torch.randn(d),
        c=torch.randn(d),
    )
    return module, ("features", shape)


OPERATIONS: dict[str, Callable[[Do, Tensor], Tensor]] = {
    "x * w": lambda m, x: x * m.w,
    "w * x": lambda m, x: m.w * x,
    "x.mul(w)": lambda m, x: x.mul(m.w),
    "(x + 0).mul_(w)": lambda m, x: (x + 0).mul_(m.w),
    "x / w": lambda m, x: x / m.w,
    "w / (1 + x²)": lambda m, x: m.w / (1 + x * x),
    "x + w": lambda m, x: x + m.w,
    "w + x": lambda m, x: m.w + x,
    "torch.add(x, w, alpha=0.5)": lambda m, x: torch.add(x, m.w, alpha=0.5),
    "torch.add(w, x, alpha=0.5)": lambda m, x: torch.add(m.w, x, alpha=0.5),
    "x - w": lambda m, x: x - m.w,
    "w - x": lambda m, x: m.w - x,
    "torch.sub(x, w, alpha=2)": lambda m, x: torch.sub(x, m.w, alpha=2),
    "torch.rsub(x, w)": lambda m, x: torch.rsub(x, m.w),
    "torch.rsub(w, x, alpha=2)": lambda m, x: torch.rsub(m.w, x, alpha=2),
    "x * tanh(w)": lambda m, x: x * m.w.tanh(),
    "x * (1 + w)": lambda m, x: x * (1 + m.w),
    "x + w.expand_as(x)": lambda m, x: x + m.w.expand_as(x),
    "x * w + w": lambda m, x: x * m.w + m.w,
    "addcmul": lambda m, x: torch.addcmul(x, x, m.w),
    "y = x + 0; y += w": lambda m, x: (x + 0).__iadd__(m.w),
}


def elementwise(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    """Parameters beside each example's values, repeated along some dimensions."""
    sizes = [size if draw(booleans) else 1 for size in shape]
    sizes = sizes[draw(st.integers(0, len(sizes))) :]
    if len(sizes) == len(shape) and draw(booleans):
        sizes = [1, *sizes]  # beside the examples
    text = draw(st.sampled_from(sorted(OPERATIONS)))
    return Do(text, OPERATIONS[text], w=about(1.0, tuple(sizes))), ("features", shape)


def layer_norm(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    over = shape[-draw(st.integers(1, len(shape))) :]
    if draw(booleans):
        return nn.LayerNorm(over, eps=eps(draw), bias=draw(booleans)), ("features", shape)
    return nn.RMSNorm(over, eps=eps(draw)), ("features", shape)


def channel_norm(draw: Draw, shape: Shape) -> nn.Module:
    """A norm of (N, C, …), in evaluation mode."""
    channels, dims = shape[0], len(shape) - 1
    groups = [k for k in range(1, channels + 1) if channels % k == 0 and math.prod(shape) > k]
    # Of one value there are no statistics.
    kinds = ["batch"] + (["group"] if groups else [])
    if dims and math.prod(shape[1:]) > 1:
        kinds += ["instance", "instance, running"]
    kind = draw(st.sampled_from(kinds))
    if kind == "group":
        return nn.GroupNorm(draw(st.sampled_from(groups)), channels, eps=eps(draw))
    if kind == "batch":
        layers = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
        return layers[dims](channels, eps=eps(draw))
    layers = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
    running = kind == "instance, running"
    return layers[dims - 1](channels, affine=True, track_running_stats=running, eps=eps(draw))


def norm_by_channels(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    return channel_norm(draw, shape), ("features", shape)


def prelu(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    slopes = shape[0] if draw(booleans) else 1
    return nn.PReLU(slopes), ("features", shape)


ACTIVATIONS = [
    lambda: nn.Tanh(),
    lambda: nn.GELU(),
    lambda: nn.ELU(),
    lambda: nn.Sigmoid(),
    lambda: Do("(x + 0).relu_()", lambda _, x: (x + 0).relu_()),
    lambda: nn.ELU(inplace=True),
    lambda: nn.LeakyReLU(0.2, inplace=True),
    lambda: Do("x.tanh_()", lambda _, x: x.tanh_()),
]


# On any number of positions
ANYWHERE: list[Part] = [
    linear,
    linear,
    parametrised,
    matrix,
    shared_weight,
    elementwise,
    elementwise,
    layer_norm,
    norm_by_channels,
    prelu,
]
ON_VECTORS: list[Part] = [linear, matrix, elementwise, layer_norm, norm_by_channels, prelu]


def folded(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    """Positions and examples in one dimension, either of them outside."""
    positions = math.prod(shape[:-1])
    inner, (_, (out,)) = draw(st.sampled_from(ON_VECTORS))(draw, shape[-1:])
    if draw(booleans):
        return (
            Do(
                "x.reshape(-1, d)",
                lambda m, x: m.inner(x.reshape(-1, shape[-1])).reshape(-1, *shape[:-1], out),
                inner=inner,
            ),
            ("features", (*shape[:-1], out)),
        )

    def time_first(m: Do, x: Tensor) -> Tensor:
        rows = x.reshape(-1, positions, shape[-1]).transpose(0, 1).reshape(-1, shape[-1])
        y = m.inner(rows).reshape(positions, -1, out).transpose(0, 1)
        return y.reshape(-1, *shape[:-1], out)

    return Do("x (T·N, d)", time_first, inner=inner), ("features", (*shape[:-1], out))


def sequence_first(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    """(T, N, d), as recurrent networks have it."""
    inner, (_, (_, out)) = draw(st.sampled_from([linear, matrix, layer_norm_of_features, beside]))(
        draw, shape
    )
    module = Do("(T, N, d)", lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=inner)
    return module, ("features", (shape[0], out))


def layer_norm_of_features(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    return layer_norm(draw, shape[-1:])[0], ("features", shape)


def beside(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    """Parameters beside (T, N, d)."""
    sizes = draw(st.sampled_from([(shape[0], 1, shape[1]), (shape[0], 1, 1), (1, shape[1])]))
    text = draw(st.sampled_from(["x * w", "w * x", "x + w", "w - x", "x / w"]))
    return Do(text, OPERATIONS[text], w=about(1.0, sizes)), ("features", shape)


def attention(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    positions, d = shape
    heads = draw(divisors(d))
    options: dict[str, Any] = {"bias": draw(booleans), "add_bias_kv": draw(booleans)}
    options["add_zero_attn"] = draw(booleans)
    k = v = d
    if draw(booleans):
        k, v = draw(st.integers(1, d)), draw(st.integers(1, d))
        options |= {"kdim": k, "vdim": v}
    first, weights, causal = draw(booleans), draw(booleans), draw(booleans)
    module = nn.MultiheadAttention(d, heads, batch_first=first, **options)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1 or p.shape[0] == 1:
                p.normal_(std=0.3)  # zero at first, some of them

    def attend(m: Do, x: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        mask = torch.ones(positions, positions, dtype=torch.bool).triu(1) if causal else None
        y, _ = m.attention(x, x[..., :k], x[..., -v:], need_weights=weights, attn_mask=mask)
        return y if first else y.transpose(0, 1)

    text = f"attention(batch_first={first}, need_weights={weights}, causal={causal}, {options})"
    return Do(text, attend, attention=module), ("features", shape)


def plain_attention(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    _, d = shape
    heads, causal = draw(divisors(d)), draw(booleans)

    def attend(m: Do, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return y.transpose(1, 2).flatten(2)

    module = Do(f"sdpa(causal={causal})", attend, qkv=nn.Linear(d, 3 * d, bias=draw(booleans)))
    return module, ("features", shape)


def recurrent(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    positions, d = shape
    kind, out = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), draw(st.integers(1, 4))
    first, both = draw(booleans), draw(booleans)
    options: dict[str, Any] = {"num_layers": draw(st.integers(1, 2)), "bias": draw(booleans)}
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    module = kind(d, out, batch_first=first, bidirectional=both, **options)

    def run(m: Do, x: Tensor) -> Tensor:
        if first:
            return m.cells(x)[0]
        return m.cells(x.transpose(0, 1))[0].transpose(0, 1)

    return Do("all steps", run, cells=module), ("features", (positions, out * (1 + both)))


def last_state(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    _, d = shape
    kind, out = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), draw(st.integers(1, 4))

    def run(m: Do, x: Tensor) -> Tensor:
        state = m.cells(x)[1]
        return (state[1] if kind is nn.LSTM else state)[-1]

    return Do("last state", run, cells=kind(d, out, batch_first=True)), ("features", (out,))


def cell_loop(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    _, d = shape
    kind = draw(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]))
    out = draw(st.integers(1, 4))

    def run(m: Do, x: Tensor) -> Tensor:
        state, hidden = None, []
        for step in x.unbind(1):
            state = m.cell(step, state)
            hidden.append(state[0] if kind is nn.LSTMCell else state)
        return torch.stack(hidden, 1)

    module = Do("a loop", run, cell=kind(d, out, bias=draw(booleans)))
    return module, ("features", (shape[0], out))


def class_token(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    positions, d = shape
    forms: dict[str, Callable[[Do, Tensor], Tensor]] = {
        "expand(len(x), −1, −1)": lambda m, x: m.token.expand(len(x), -1, -1),
        "repeat(len(x), 1, 1)": lambda m, x: m.token.repeat(len(x), 1, 1),
        "broadcast_to": lambda m, x: torch.broadcast_to(m.token, (len(x), 1, d)),
        "expand_as": lambda m, x: m.token.expand_as(x[:, :1]),
        "zeros + token": lambda m, x: torch.zeros_like(x[:, :1]) + m.token,
    }
    text = draw(st.sampled_from(sorted(forms)))
    module = Do(
        f"class token: {text}",
        lambda m, x: torch.cat([forms[text](m, x), x], 1),
        token=torch.randn(1, 1, d),
    )
    return module, ("features", (positions + 1, d))


def positions(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    length, d = shape
    longer = length + draw(st.integers(0, 2))
    form = draw(st.sampled_from(["parameter", "embedding", "embedding of each example's"]))
    if form == "parameter":
        module = Do("x + p[:T]", lambda m, x: x + m.p[:length], p=torch.randn(longer, d))
    elif form == "embedding":
        module = Do(
            "x + e(arange(T))",
            lambda m, x: x + m.e(torch.arange(length)),
            e=nn.Embedding(longer, d),
        )
    else:
        module = Do(
            "x + e(arange(T).expand)",
            lambda m, x: x + m.e(torch.arange(length).expand(len(x), -1)),
            e=nn.Embedding(longer, d),
        )
    return module, ("features", shape)


def mean_over_positions(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    if draw(booleans):
        return Do("x.mean(1)", lambda _, x: x.mean(1)), ("features", shape[1:])
    return Do("x[:, -1]", lambda _, x: x[:, -1]), ("features", shape[1:])


def to_image(_draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    *sizes, d = shape
    return Do("channels first", lambda _, x: x.movedim(-1, 1)), ("image", (d, *sizes))


ON_POSITIONS: list[Part] = [*ANYWHERE, folded, folded, mean_over_positions, to_image]
ON_SEQUENCES: list[Part] = [
    *ON_POSITIONS,
    sequence_first,
    sequence_first,
    attention,
    attention,
    plain_attention,
    recurrent,
    recurrent,
    last_state,
    cell_loop,
    class_token,
    positions,
]


def convolution(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    channels, *sizes = shape
    groups = draw(divisors(channels))
    out = groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in sizes)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    named = draw(st.sampled_from([None, None, "same", "valid"]))
    if named:
        stride: Any = 1
        dilation = (1,) * len(sizes)
        if named == "same" and mode in ("reflect", "circular"):
            assume(all(k < size for k, size in zip(kernel, sizes, strict=True)))
        padding: Any = named
        ends = sizes if named == "same" else [s - k + 1 for s, k in zip(sizes, kernel, strict=True)]
    else:
        stride = tuple(draw(st.integers(1, 3)) for _ in sizes)
        pads = [draw(st.integers(0, min(2, size - 1))) for size in sizes]
        dilation = tuple(
            draw(st.integers(1, max(1, (size + 2 * pad - 1) // max(1, k - 1))))
            for size, pad, k in zip(sizes, pads, kernel, strict=True)
        )
        # torch 2.14 crashes on a dilated kernel of size 1 over an image of channels last in 3D.
        dilation = tuple(1 if k == 1 else min(3, d) for d, k in zip(dilation, kernel, strict=True))
        padding = tuple(pads)
        ends = [
            (size + 2 * pad - each * (k - 1) - 1) // step + 1
            for size, pad, k, step, each in zip(sizes, pads, kernel, stride, dilation, strict=True)
        ]
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(sizes) - 1](
        channels,
        out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw(booleans),
    )
    return layer, ("image", (out, *ends))


def transposed_convolution(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    channels, *sizes = shape
    groups = draw(divisors(channels))
    out = groups * draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in sizes)
    stride = tuple(draw(st.integers(1, 2)) for _ in sizes)
    dilation = tuple(draw(st.integers(1, 2)) for _ in sizes)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    whole = [
        (size - 1) * s + d * (k - 1) + e + 1
        for size, s, d, k, e in zip(sizes, stride, dilation, kernel, extra, strict=True)
    ]
    padding = tuple(draw(st.integers(0, min(2, (size - 1) // 2))) for size in whole)
    layer = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][len(sizes) - 1](
        channels,
        out,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        bias=draw(booleans),
    )
    ends = [size - 2 * pad for size, pad in zip(whole, padding, strict=True)]
    return layer, ("image", (out, *ends))


def parametrised_convolution(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    channels, *sizes = shape
    out = draw(st.integers(1, 3))
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(sizes) - 1](channels, out, 1)
    by = draw(st.sampled_from([parametrizations.weight_norm, parametrizations.spectral_norm]))
    return by(layer), ("image", (out, *sizes))


def norm_of_image(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    return channel_norm(draw, shape), ("image", shape)


def norm_of_channels_last(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    inner, _ = layer_norm_of_features(draw, shape[:1])
    module = Do("channels last", lambda m, x: m.inner(x.movedim(1, -1)).movedim(-1, 1), inner=inner)
    return module, ("image", shape)


def scale_of_image(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    """A scale for each channel, as ConvNeXt has it; or parameters of any other shape."""
    module, _ = elementwise(draw, shape)
    return module, ("image", shape)


def prelu_of_image(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    return prelu(draw, shape)[0], ("image", shape)


def folded_image(draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    """One dimension beside the examples, as frames of a film are: in either order."""
    channels, frames, *sizes = shape
    inner, (_, (out, *ends)) = draw(
        st.sampled_from([convolution, transposed_convolution, norm_of_image, prelu_of_image])
    )(draw, (channels, *sizes))
    outside = draw(booleans)

    def run(m: Do, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if outside else x.permute(2, 0, 1, *range(3, x.dim()))
        y = m.inner(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], out, *ends)
        return y.transpose(1, 2) if outside else y.permute(1, 2, 0, *range(3, x.dim()))

    module = Do(f"frames folded, examples outside={outside}", run, inner=inner)
    return module, ("image", (out, frames, *ends))


def to_sequence(_draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    channels, *sizes = shape
    module = Do("patches as a sequence", lambda _, x: x.flatten(2).transpose(1, 2))
    return module, ("features", (math.prod(sizes), channels))


def pooled(_draw: Draw, shape: Shape) -> tuple[nn.Module, State]:
    module = Do("mean over the image", lambda _, x: x.flatten(2).mean(2))
    return module, ("features", shape[:1])


ON_IMAGES: list[Part] = [
    *[convolution] * 4,
    *[transposed_convolution] * 2,
    parametrised_convolution,
    norm_of_image,
    norm_of_image,
    norm_of_channels_last,
    scale_of_image,
    prelu_of_image,
    to_sequence,
    pooled,
]


def simple(draw: Draw, state: State) -> tuple[nn.Module, State]:
    """One part, and perhaps an activation."""
    kind, shape = state
    if kind == "image":
        parts = ON_IMAGES + ([folded_image] * 2 if len(shape) > 2 else [])
    else:
        parts = [ANYWHERE, ON_SEQUENCES, ON_POSITIONS][min(len(shape), 3) - 1]
    module, after = draw(st.sampled_from(parts))(draw, shape)
    if draw(booleans):
        module = nn.Sequential(module, draw(st.sampled_from(ACTIVATIONS))())
    return module, after


def part(draw: Draw, state: State, depth: int) -> tuple[nn.Module, State]:
    """A part, alone or in a residual connection, a checkpoint, a loop."""
    form = draw(st.sampled_from(["plain"] * 5 + ["residual", "checkpoint", "twice", "pair"]))
    if form == "plain" or depth == 0:
        return simple(draw, state)
    module, after = part(draw, state, depth - 1)
    if form == "pair":
        second, after = part(draw, after, depth - 1)
        return nn.Sequential(module, second), after
    if form == "checkpoint":
        run = Do("checkpoint", _checkpointed, inner=module)
        return run, after
    if after != state:
        return module, after
    if form == "residual":
        return Do("x + f(x)", lambda m, x: x + m.inner(x + 0), inner=module), after
    return Do(
        "f(tanh(f(x)))", lambda m, x: m.inner(torch.tanh(m.inner(x + 0))), inner=module
    ), after


def _checkpointed(m: Do, x: Tensor) -> Tensor:
    return checkpoint(m.inner, x + 0, use_reentrant=False)


# Whole networks


class Network(nn.Module):
    """From inputs in their form to outputs in theirs."""

    def __init__(
        self,
        first: nn.Module,
        body: nn.Module,
        head: nn.Module,
        *,
        side: nn.Module | None,
        tied: nn.Embedding | None,
        outputs: str,
    ) -> None:
        super().__init__()
        self.first, self.body, self.head, self.side, self.tied = first, body, head, side, tied
        self.outputs = outputs

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Any:
        h = self.body(self.first(x))
        z = self.head(h) if self.tied is None else F.linear(self.head(h), self.tied.weight)
        if self.side is not None:
            z = z + torch.tanh(self.side(beside)).reshape(len(z), *[1] * (z.dim() - 2), -1)
        if self.outputs == "dict":
            return {"features": h, "logits": z}
        return (h, z) if self.outputs == "tuple" else z


@dataclass
class Drawn:
    """A network, its examples and its loss."""

    model: nn.Module
    examples: tuple[Any, Any]
    loss: Any
    text: str

    def __repr__(self) -> str:
        shapes = [tuple(t.shape) for t in leaves(self.examples)]
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        return f"{self.text}, frozen {frozen}, {shapes}, {self.model}"


class Weighted(nn.Module):
    """Weights of classes, a tensor of the loss's own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2.0, classes))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, self.weight, reduction="none")


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def several_labels(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")
    return loss.flatten(1).sum(1)


def sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the tokens that are there: −100 is padding."""
    loss = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return loss.sum(1) / (targets != -100).sum(1).clamp(min=1)


class OnBoth(nn.Module):
    """A loss of a dict's or a tuple's two outputs."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], form: str) -> None:
        super().__init__()
        self.loss, self.form = loss, form

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        h, z = (outputs["features"], outputs["logits"]) if self.form == "dict" else outputs
        return self.loss(z, targets) + 0.1 * h.square().flatten(1).mean(1)


class Importance(nn.Module):
    """A loss whose targets are a dict: labels of any kind, and how much each example counts."""

    def __init__(self, loss: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, targets: dict[str, Tensor]) -> Tensor:
        return targets["importance"] * self.loss(outputs, targets["labels"])


@st.composite
def networks(draw: Draw, n: int | None = None, class_targets: bool = False) -> Drawn:
    """Draw a network with its examples and its loss."""
    seed = draw(st.integers(0, 10_000))
    torch.manual_seed(seed)
    n = n or draw(st.integers(3, 6))
    side_inputs = draw(st.sampled_from(["none", "none", "tuple", "dict"]))
    outputs = draw(st.sampled_from(["tensor", "tensor", "tensor", "dict", "tuple"]))

    # Inputs
    tied = None
    kind = draw(st.sampled_from(["vectors", "features", "sequences", "tokens", "bags", "images"]))
    first: nn.Module = Do("x + 0", lambda _, x: x + 0)  # the input itself is not written
    if kind in ("tokens", "bags"):
        length, d = draw(st.integers(1, 6)), draw(st.integers(2, 5))
        x = torch.randint(0, WORDS, (n, length))
        padding = draw(st.sampled_from([None, 2, -1]))
        if kind == "tokens":
            first = nn.Embedding(WORDS, d, padding_idx=padding, sparse=draw(booleans))
            state: State = ("features", (length, d))
        else:
            mode = draw(st.sampled_from(["sum", "mean"]))
            first = nn.EmbeddingBag(WORDS, d, mode=mode, padding_idx=padding)
            state = ("features", (d,))
        with torch.no_grad():
            first.weight.normal_()
        if isinstance(first, nn.Embedding) and not first.sparse and draw(booleans):
            tied = first
    elif kind == "images":
        dims = draw(st.integers(1, 3))
        sizes = [draw(st.integers(1, 7 - dims)) for _ in range(dims)]
        if draw(st.integers(0, 4)) == 0:
            sizes = [[131], [12, 11], [5, 6, 5]][dims - 1]  # more than 128 positions
        shape = (draw(st.integers(1, 4)), *sizes)
        x, state = torch.randn(n, *shape), ("image", shape)
    else:
        dims = {"vectors": 0, "sequences": 1, "features": draw(st.integers(2, 3))}[kind]
        shape = (*(draw(st.integers(1, 5)) for _ in range(dims)), draw(st.integers(1, 5)))
        x, state = torch.randn(n, *shape), ("features", shape)

    # Body
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        module, state = part(draw, state, depth=2)
        parts.append(module)
    body = nn.Sequential(*parts)

    # Head
    kind, shape = state
    per_position = kind == "features" and len(shape) == 2 and draw(booleans) and not class_targets
    wide = shape[-1] if per_position else math.prod(shape)
    out = tied.embedding_dim if tied is not None else draw(st.integers(2, 4))
    head = nn.Linear(wide, out, bias=draw(booleans))
    if not per_position:
        head = nn.Sequential(nn.Flatten(), head)
    classes = WORDS if tied is not None else out

    # Loss
    if per_position:
        loss_name = draw(st.sampled_from(["tokens", "squared error", "several labels"]))
    else:
        names = ["cross_entropy", "smoothed", "weighted", "squared error", "several labels"]
        loss_name = draw(st.sampled_from(names[: 3 if class_targets else None]))
    output_shape = (shape[0], classes) if per_position else (classes,)
    if loss_name == "squared error":
        loss, y = squared_error, torch.randn(n, *output_shape)
    elif loss_name == "several labels":
        loss, y = several_labels, torch.randint(0, 2, (n, *output_shape))
    elif loss_name == "tokens":
        y = torch.randint(0, classes, (n, shape[0]))
        there = torch.rand(n, shape[0]) < 0.7
        there[:, 0] = True
        loss, y = sequence_loss, torch.where(there, y, -100)
    else:
        y = torch.randint(0, classes, (n,))
        loss = {
            "cross_entropy": class_loss,
            "smoothed": smoothed,
            "weighted": Weighted(classes),
        }[loss_name]
    named = loss_name == "cross_entropy" and outputs != "tuple" and draw(booleans)
    if named:
        loss = "cross_entropy"
    elif outputs != "tensor":
        loss = OnBoth(loss, outputs)
    labels: Any = y
    if not named and not class_targets and draw(st.integers(0, 4)) == 0:
        loss, labels = Importance(loss), {"labels": y, "importance": 0.5 + torch.rand(n)}

    side = None if side_inputs == "none" else nn.Linear(2, classes, bias=draw(booleans))
    model = Network(first, body, head, side=side, tied=tied, outputs=outputs)
    _settle(model)
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 7)) > 0)
    assume(any(p.requires_grad for p in model.parameters()))
    inputs: Any = x
    if side is not None:
        other = torch.randn(n, 2)
        inputs = (x, other) if side_inputs == "tuple" else {"beside": other, "x": x}
    if draw(booleans):
        model.double()
    return Drawn(model, (inputs, labels), loss, f"seed {seed}, loss {loss_name}, outputs {outputs}")


def _settle(model: nn.Module) -> None:
    """Draw norms, biases and running statistics anew: ones and zeros hide mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm
                          | nn.modules.batchnorm._NormBase):  # fmt: skip
                for p in module.parameters():
                    p.add_(0.3 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    model.eval()


def require_gradients(expected: Mapping[str, Tensor]) -> Tensor:
    """Return each gradient's norm; pass over what is nothing but rounding errors."""
    length = flat(expected).norm(dim=1)
    assume(((length > VANISHED) | (length == 0)).all())
    assume(length.max() > 0)
    assume(length.max() < 1e4)
    return length


def gradients_of(drawn: Drawn) -> dict[str, Tensor]:
    """What is expected of a drawn network."""
    expected = expected_gradients(drawn.model, drawn.loss, drawn.examples)
    require_consistent(drawn.model, drawn.loss, drawn.examples, expected)
    return expected


def well_conditioned(drawn: Drawn, expected: Mapping[str, Tensor]) -> Tensor:
    """Return the cosines; pass over networks for which torch's own float32 loses digits."""
    length = require_gradients(expected)
    cosines = expected_cosines(expected)
    single = expected_gradients(drawn.model, drawn.loss, drawn.examples, torch.float32)
    assume(abs(expected_cosines(single) - cosines).max() <= WELL_CONDITIONED)
    assume((abs(flat(single).norm(dim=1) - length) <= 1e-6 * length).all())
    return cosines


def cancellation(rows: Rows) -> float:
    """How much larger the terms Σ_t |A_t| |D_t| of an example's factors are than its gradient."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for f in rows.factors:
        A_NT = torch.hypot(f.A_NTd.double().norm(dim=2), f.b_NT.double())
        D_NT = f.D_NTp.double().norm(dim=2) if f.D_NTp.dim() == 3 else torch.ones_like(A_NT)
        total += (A_NT * D_NT).sum(1).square()
    return float(total.sqrt().max())


often = settings(
    max_examples=4 * settings.default.max_examples,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
seldom = settings(often, max_examples=settings.default.max_examples)


@often
@given(drawn=networks())
def test_gradients_are_those_of_autograd(drawn):
    """Every parameter's gradient of every example is that of one-example autograd."""
    expected = gradients_of(drawn)
    length = require_gradients(expected)

    gradients = PerExampleGradients(drawn.model, drawn.loss, drawn.examples, precision="float64")
    found = gradients.materialised(*drawn.examples)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        difference = (found[name] - g).reshape(len(g), -1).norm(dim=1)
        assert (difference <= EXACT * length).all(), (name, gradients.recipe.rules[name])


@often
@given(drawn=networks())
def test_cosines_are_those_of_autograd(drawn):
    """In either precision, with every weight as a gradient, every one as factors, or a choice."""
    expected = gradients_of(drawn)
    cosines = well_conditioned(drawn, expected)

    for precision, tolerance in COSINE.items():
        gradients = PerExampleGradients(
            drawn.model, drawn.loss, drawn.examples, precision=precision
        )
        for weights in ((), tuple(gradients.recipe.layers), gradients.recipe.factored):
            rows = gradients.with_factored(weights).rows(*drawn.examples)
            assume(cancellation(rows) <= CANCELLED)
            assert abs(cosine(rows, rows) - cosines).max() <= tolerance
            length = flat(expected).norm(dim=1)
            assert (abs(rows.norm - length) <= 1e-5 * length).all()


@seldom
@given(drawn=networks())
def test_a_whole_call(drawn):
    """The self-check lets every network pass, and the matrix is right."""
    expected = gradients_of(drawn)
    cosines = well_conditioned(drawn, expected)

    found = cosine_matrix(drawn.model, drawn.loss, drawn.examples)
    assert abs(found.values - cosines.numpy()).max() <= COSINE["float32"]
    assert json.loads(found.attrs["parameters"]) == list(expected)


@seldom
@given(drawn=networks(), data=st.data())
def test_order_and_company_do_not_matter(drawn, data):
    """Permuted examples permute the matrix, and rows of parts are parts of the rows."""
    n = count(drawn.examples)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    at = data.draw(st.integers(1, n - 1))
    well_conditioned(drawn, gradients_of(drawn))

    gradients = PerExampleGradients(drawn.model, drawn.loss, drawn.examples)
    rows = gradients.rows(*drawn.examples)
    whole = cosine(rows, rows)
    permuted = gradients.rows(*chosen(drawn.examples, order))
    assert abs(cosine(permuted, permuted) - whole[order][:, order]).max() <= MOVED
    first = gradients.rows(*chosen(drawn.examples, slice(at)))
    second = gradients.rows(*chosen(drawn.examples, slice(at, None)))
    assert abs(cosine(first, second) - whole[:at, at:]).max() <= MOVED
    assert abs(cosine(first, first) - whole[:at, :at]).max() <= MOVED
    assert abs(cosine(rows, second) - whole[:, at:]).max() <= MOVED


class Scaled(nn.Module):
    """A loss, so many times."""

    def __init__(self, loss: Any, factor: float) -> None:
        super().__init__()
        self.loss, self.factor = (class_loss if loss == "cross_entropy" else loss), factor

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        return self.factor * self.loss(outputs, targets)


@seldom
@given(drawn=networks(), power=st.integers(-9, 9))
def test_the_size_of_the_loss_is_the_size_of_the_gradient(drawn, power):
    """A factor leaves the cosines, and multiplies the norms."""
    require_gradients(gradients_of(drawn))
    one, many = (
        PerExampleGradients(drawn.model, loss, drawn.examples, precision="float64").rows(
            *drawn.examples
        )
        for loss in (drawn.loss, Scaled(drawn.loss, 10.0**power))
    )

    assert abs(cosine(many, many) - cosine(one, one)).max() <= MOVED
    torch.testing.assert_close(many.norm, 10.0**power * one.norm, rtol=EXACT, atol=0)


class Then(nn.Module):
    """A network, and a frozen layer on every output that leaves it as it is."""

    def __init__(self, model: nn.Module, outputs: Any) -> None:
        super().__init__()
        self.model = model
        self.identity = nn.ModuleList(nn.Linear(t.shape[-1], t.shape[-1]) for t in leaves(outputs))
        for layer, t in zip(self.identity, leaves(outputs), strict=True):
            layer.weight.data, layer.bias.data = torch.eye(t.shape[-1]), torch.zeros(t.shape[-1])
            layer.to(t.dtype).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        if isinstance(outputs, Tensor):
            return self.identity[0](outputs)
        if isinstance(outputs, Mapping):
            return {k: f(outputs[k]) for k, f in zip(outputs, self.identity, strict=True)}
        return tuple(f(t) for t, f in zip(outputs, self.identity, strict=True))


@seldom
@given(drawn=networks())
def test_frozen_layers_do_not_matter(drawn):
    """A layer that is not in play, and changes no output, changes no gradient."""
    require_gradients(gradients_of(drawn))
    with torch.no_grad():
        inputs = one_example(drawn.examples[0], 0, next(drawn.model.parameters()).dtype)
        longer = Then(drawn.model, call(drawn.model, inputs)).eval()
    one, other = (
        PerExampleGradients(model, drawn.loss, drawn.examples, precision="float64")
        for model in (drawn.model, longer)
    )

    assert [f"model.{name}" for name in one.parameters] == list(other.parameters)
    first, second = one.rows(*drawn.examples), other.rows(*drawn.examples)
    assert abs(cosine(first, first) - cosine(second, second)).max() <= MOVED
    torch.testing.assert_close(first.norm, second.norm, rtol=EXACT, atol=0)


@seldom
@given(drawn=networks(), data=st.data())
def test_parameters_left_out_are_as_frozen(drawn, data):
    """`parameters` chooses those that the gradients are over, and nothing else changes."""
    names = [name for name, p in drawn.model.named_parameters() if p.requires_grad]
    some = sorted(data.draw(st.sets(st.sampled_from(names), min_size=1)), key=names.index)
    expected = gradients_of(drawn)
    length = require_gradients({name: expected[name] for name in some})

    gradients = PerExampleGradients(
        drawn.model, drawn.loss, drawn.examples, parameters=some, precision="float64"
    )
    found = gradients.materialised(*drawn.examples)
    assert list(found) == some
    for name in some:
        difference = (found[name] - expected[name]).reshape(len(length), -1).norm(dim=1)
        assert (difference <= EXACT * length).all(), (name, gradients.recipe.rules[name])


@seldom
@given(drawn=networks(), data=st.data())
def test_products_of_groups_add_up(drawn, data):
    """The Gram matrices of a partition of the parameters add up to the Gram matrix."""
    names = [name for name, p in drawn.model.named_parameters() if p.requires_grad]
    group_of = [data.draw(st.integers(0, 2)) for _ in names]
    groups = {
        f"group {k}": [n for n, of in zip(names, group_of, strict=True) if of == k]
        for k in sorted(set(group_of))
    }
    expected = gradients_of(drawn)
    lengths = {
        group: require_gradients({name: expected[name] for name in members})
        for group, members in groups.items()
    }
    options = {"precision": "float64"}
    whole = gram_matrix(drawn.model, drawn.loss, drawn.examples, **options)
    parts = {
        group: gram_matrix(
            drawn.model, drawn.loss, drawn.examples, parameters=members, **options
        ).values
        for group, members in groups.items()
    }
    size = np.outer(*[flat(expected).norm(dim=1).numpy()] * 2)
    assert (abs(sum(parts.values()) - whole.values) <= MOVED * size).all()

    together = layer_cosines(drawn.model, drawn.loss, drawn.examples, groups=groups, **options)
    assert together.parameter_group.values.tolist() == list(groups)
    for group, length in lengths.items():
        scale = np.outer(length.numpy(), length.numpy())
        part = together.sel(parameter_group=group).values
        assert (abs(part * scale - parts[group]) <= MOVED * scale).all()


def class_means(cosines: np.ndarray, labels: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Means over all pairs of two examples, in a plain loop; zero gradients are left out."""
    classes = range(labels.max() + 1)
    means = np.full((len(classes), len(classes)), np.nan)
    for a in classes:
        for b in classes:
            pairs = [
                cosines[i, j]
                for i in np.flatnonzero((labels == a) & alive)
                for j in np.flatnonzero((labels == b) & alive)
                if i != j
            ]
            means[a, b] = np.mean(pairs) if pairs else np.nan
    return means


def in_parts(nest: Any, lengths: list[int]) -> list[Any]:
    """Cut examples into parts of these lengths; the last part is the rest."""
    ends = np.cumsum([0, *lengths])
    parts = [chosen(nest, slice(a, b)) for a, b in zip(ends, [*ends[1:], None], strict=True)]
    return [part for part in parts if len(leaves(part)[0])]


@seldom
@given(drawn=networks(n=12, class_targets=True), data=st.data())
def test_class_means_are_means_of_the_matrix(drawn, data):
    """Without a pair being made; also of an iterator of batches, with labels in other parts."""
    expected = gradients_of(drawn)
    alive = require_gradients(expected).numpy() > 0
    labels = drawn.examples[1]
    means = class_means(expected_cosines(expected).numpy(), labels.numpy(), alive)

    found = class_cosine_matrix(drawn.model, drawn.loss, drawn.examples)
    np.testing.assert_allclose(found.values, means, atol=EXACT)
    lengths = st.lists(st.integers(1, 4), max_size=3)
    batches = in_parts(drawn.examples, [3, *data.draw(lengths)])  # three examples to start from
    others = in_parts(labels, data.draw(lengths))
    streamed = class_cosine_matrix(drawn.model, drawn.loss, iter(batches), iter(others))
    np.testing.assert_allclose(streamed.values, means, atol=EXACT)


def smallest_memory(drawn: Drawn) -> int:
    """Return the smallest budget that is taken, by bisection."""
    gradients = PerExampleGradients(drawn.model, drawn.loss, drawn.examples)
    too_small, enough = 1, 2**24
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        try:
            fit(gradients, n_examples=count(drawn.examples), memory=middle)
            enough = middle
        except StudyError:
            too_small = middle
    return enough


@seldom
@given(drawn=networks(n=12))
def test_the_smallest_budget_gives_the_same_matrix(drawn):
    """Memory that is just enough means more blocks and panels, and the same numbers."""
    well_conditioned(drawn, gradients_of(drawn))
    memory = smallest_memory(drawn)
    little = cosine_matrix(drawn.model, drawn.loss, drawn.examples, memory=memory)

    much = cosine_matrix(drawn.model, drawn.loss, drawn.examples, memory=2**30, check=False)
    assert abs(little.values - much.values).max() <= MOVED
    with pytest.raises(StudyError, match="too small"):
        cosine_matrix(drawn.model, drawn.loss, drawn.examples, memory=memory // 2)


@seldom
@given(drawn=networks(n=8), data=st.data())
def test_others_are_columns(drawn, data):
    """The matrix of two sets is a block of the matrix of both."""
    at = data.draw(st.integers(3, 7))
    well_conditioned(drawn, gradients_of(drawn))
    rows, columns = (chosen(drawn.examples, part) for part in (slice(at), slice(at, None)))
    found = cosine_matrix(drawn.model, drawn.loss, rows, columns)

    joint = cosine_matrix(drawn.model, drawn.loss, drawn.examples, check=False)
    assert found.shape == (at, 8 - at)
    assert abs(found.values - joint.values[:at, at:]).max() <= MOVED


@seldom
@given(drawn=networks())
def test_a_whole_loss_is_the_loss(drawn):
    """A loss that runs the network itself has the gradients of the same loss of its outputs."""
    value = class_loss if drawn.loss == "cross_entropy" else drawn.loss
    value = copy.deepcopy(value).double() if isinstance(value, nn.Module) else value
    whole = WholeLoss(lambda model, batch: value(call(model, batch[0]), batch[1]))
    expected = gradients_of(drawn)
    length = require_gradients(expected)

    gradients = PerExampleGradients(drawn.model, whole, drawn.examples, precision="float64")
    found = gradients.materialised(*drawn.examples)
    for name, g in expected.items():
        difference = (found[name] - g).reshape(len(g), -1).norm(dim=1)
        assert (difference <= EXACT * length).all(), (name, gradients.recipe.rules[name])
