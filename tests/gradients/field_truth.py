"""What is true of a network of the field, what may be said beside it, and its data.

Inputs are padded token ids, (N, T), 0 where there is none, or features, (N, T, d).

Axis letters: N examples, T positions, d features, P parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import reference
import torch
from torch import Tensor, nn

from distributed_stiffness.errors import StiffnessError

TOKENS, FEATURES, WIDTH, CLASSES = 20, 6, 8, 3
Inputs = Any
Value = Callable[[nn.Module, Any, Any], Tensor]


def in_float64(tree: Any) -> Any:
    """Numbers of a nest in double precision, complex ones too."""
    if isinstance(tree, dict):
        return {key: in_float64(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(in_float64(value) for value in tree)
    if not isinstance(tree, Tensor) or not (tree.is_floating_point() or tree.is_complex()):
        return tree
    return tree.to(torch.complex128 if tree.is_complex() else torch.float64)


def one_of(tree: Any, i: int) -> Any:
    """Example i of a nest, as a batch of one."""
    if isinstance(tree, dict):
        return {key: one_of(value, i) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(one_of(value, i) for value in tree)
    return tree[i : i + 1] if isinstance(tree, Tensor) else tree


def taken(tree: Any, order: Tensor) -> Any:
    """A nest of examples in another order."""
    if isinstance(tree, dict):
        return {key: taken(value, order) for key, value in tree.items()}
    return tuple(taken(v, order) for v in tree) if isinstance(tree, tuple) else tree[order]


def called(net: nn.Module, inputs: Any) -> Any:
    """A network on inputs of its own kind."""
    if isinstance(inputs, dict):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def class_loss(net: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of a network's outputs."""
    outputs = called(net, inputs)
    return reference.cross_entropy(getattr(outputs, "logits", outputs), targets)


def true_rows(net: nn.Module, inputs: Any, targets: Any, value: Value = class_loss) -> Tensor:
    """g_NP by autograd, one example at a time, in float64; a complex number counts as two.

    A network of float64 is taken as it is, any other as a copy.
    """
    own = {p.dtype for p in net.parameters()} <= {torch.float64, torch.complex128}
    wide = net if own else copy.deepcopy(net)._apply(in_float64)
    parameters = [p for p in wide.parameters() if p.requires_grad]
    rows = []
    n = len(next(iter(inputs.values())) if isinstance(inputs, dict) else leaf(inputs))
    for i in range(n):
        loss = value(wide, in_float64(one_of(inputs, i)), in_float64(one_of(targets, i))).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        real = [
            torch.view_as_real(g.resolve_conj()) if g.is_complex() else g.to_dense() for g in grads
        ]
        rows.append(torch.cat([g.detach().flatten() for g in real]))
    return torch.stack(rows)


def twin_of(made: Callable[[], nn.Module], net: nn.Module) -> nn.Module:
    """The same numbers in float64, in a network that was never run."""
    twin = made().double().eval()
    with torch.no_grad():
        for mine, its in zip(twin.parameters(), net.parameters(), strict=True):
            mine.copy_(its)
        for name, mine in twin.named_buffers():
            mine.copy_(net.get_buffer(name))
    return twin


def leaf(tree: Any) -> Tensor:
    """The first tensor of a nest."""
    while isinstance(tree, (dict, tuple, list)):
        tree = next(iter(tree.values())) if isinstance(tree, dict) else tree[0]
    return tree


def true_cosines(net: nn.Module, inputs: Any, targets: Any, value: Value = class_loss) -> Tensor:
    """cos(g_i, g_j) of all pairs; 0 where a gradient is 0."""
    return reference.cosine(true_rows(net, inputs, targets, value))


@contextmanager
def one_at_a_time_at_most(*also: str) -> Iterator[None]:
    """One warning is allowed, that a module is taken one example at a time, and no other.

    Args:
        also: parts of other warnings that may come.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught if not any(a in str(w.message) for a in also)]
    other = [text for text in said if "one example at a time" not in text]
    assert not other, other
    assert len(said) <= 1, said


def right_or_said(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or the sentence with which it refuses: one that asks for no report."""
    try:
        return call(), ""
    except StiffnessError as error:
        said = str(error)
    assert "please report" not in said
    return None, said


def assert_cosines(got: Any, true: Tensor, within: float = 1e-5) -> None:
    """The largest difference, and where it is."""
    difference = (torch.as_tensor(got.values).double() - true).abs()
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    i, j = divmod(worst, difference.shape[1])
    assert difference[i, j] <= within, f"pair {i}, {j}: got {got.values[i, j]}, true {true[i, j]}"


# Data.


def text(n: int, longest: int, seed: int = 0) -> Tensor:
    """Token ids; a third of the texts have four tokens, the others three to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator)
    lengths[::3] = 4
    ids = torch.randint(1, TOKENS, (n, longest), generator=generator)
    return ids * (torch.arange(longest) < lengths[:, None])


def features(n: int, steps: int, seed: int = 0) -> Tensor:
    """(N, T, d) of noise."""
    return torch.randn(n, steps, FEATURES, generator=torch.Generator().manual_seed(seed))


def images(n: int, steps: int, seed: int = 0) -> Tensor:
    """(N, T, C, H, W) of noise: short films."""
    return torch.randn(n, steps, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def graphs(n: int, longest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Nodes (N, V), 0 where there is none, and edges (N, E, 2), −1 where there is none."""
    nodes = text(n, longest, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    ends = torch.rand(n, 2 * longest, 2, generator=generator)
    count = (nodes != 0).sum(1)
    edges = (ends * count[:, None, None]).long()
    edges[torch.arange(2 * longest) >= count[:, None]] = -1
    return nodes, edges


def lengths_of(_net: nn.Module, x: Inputs) -> Tensor:
    """Tokens of each text."""
    return (leaf(x) != 0).sum(1)


def all_alike(_net: nn.Module, x: Inputs) -> Tensor:
    """Examples of one size."""
    return torch.zeros(len(leaf(x)), dtype=torch.long)


def routes_of(net: nn.Module, x: Inputs) -> Tensor:
    """Which way an example goes."""
    with torch.no_grad():
        return net.route(x)


@dataclass(frozen=True)
class Case:
    """A network, its inputs of a number of examples and a longest size, and what may differ.

    Args:
        network: makes it.
        inputs: (N, longest size, seed) -> inputs.
        sizes: of which kind each example is: its length, or its way through the network.
        longest: sizes of examples and of others.
    """

    network: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs] = text
    sizes: Callable[[nn.Module, Inputs], Tensor] = lengths_of
    longest: tuple[int, int] = (6, 9)
