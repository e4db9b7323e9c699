"""From the weights of a checkpoint to those of the network that takes them, by the network's names.

Which names fit is decided by the network's own `load_state_dict`, so that whatever torch takes is
taken: older names of weight normalisation, what a version of a module did not have yet, a module's
extra state. What wrappers have put around the names is taken off before.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.importing.content import Read, listed

# What torch.compile, data parallelism, FSDP, activation checkpointing, Lightning and Opacus call
# the network within: its names have these between them, wherever a part is wrapped.
_WRAPPERS = (
    "module",
    "_module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
)


def fitted(
    read: Read, network: nn.Module, path: str, prefix: str | None = None
) -> tuple[dict[str, Any], str]:
    """Return the network's state dict with a checkpoint's weights, and how they got there in words.

    Args:
        read: the checkpoint.
        network: freshly built; its weights become those of the checkpoint.
        path: of the checkpoint, for messages.
        prefix: of the names in the checkpoint; None: it is found.

    Raises:
        CheckpointError: names, shapes or kinds of numbers do not fit; lists the first few.
    """
    names = _Names(network)
    if prefix is None:
        prefix = _prefix(read.weights, names, path)
    theirs = _renamed(read.weights, names, prefix, path)
    inside = {name: read.weights[their] for name, their in theirs.items()}
    kinds = _kinds(inside, names.expected, path)
    wrong = _wrong_shapes(inside, names.expected)
    own = _own_buffers(inside, network)
    missing, surplus = _load(
        network,
        {name: value for name, value in inside.items() if name not in {*wrong, *own}},
        _versions(read, names, prefix),
        path,
    )
    weights = network.state_dict()
    tied = _tied(missing, inside, weights)
    missing = [name for name in missing if name not in {*tied, *wrong}]
    _requirelisted(missing, surplus, inside, names.expected, path, prefix)
    _require_shapes(wrong, path)
    _require_one_of_tied(inside, weights, path)
    outside = len(read.weights) - len(inside)
    made = [name for name in names.expected if name not in {*inside, *tied}]
    notes = [
        f"found under {read.under!r}" if read.under else "",
        f"prefix {prefix!r} taken off" if prefix else "",
        _taken_off(theirs, prefix),
        f"{outside} tensors of other names left out" if outside else "",
        f"tied: {listed(tied)}" if tied else "",
        f"made by the network's own loading: {listed(made)}" if made else "",
        f"not stored by the network: {listed(own)}" if own else "",
        kinds,
    ]
    return dict(weights), "; ".join(note for note in notes if note)


# Names


class _Names:
    """The names of a network's weights, and what they are called without wrappers."""

    def __init__(self, network: nn.Module) -> None:
        self.expected: Mapping[str, Any] = network.state_dict()
        # A network may have parts of its own that are called so.
        without = {_without(name, _WRAPPERS) for name in self.expected}
        self.wrappers = _WRAPPERS if len(without) == len(self.expected) else ()
        # The innermost, of a module and what it is wrapped in.
        self.modules = {
            self.bare(name): name for name, _ in network.named_modules(remove_duplicate=False)
        }
        self.bare_expected = {self.bare(name) for name in self.expected}

    def bare(self, name: str) -> str:
        """Return a name without what wrappers have put into it."""
        return _without(name, self.wrappers)

    def of(self, name: str) -> str:
        """Return what the network calls a weight, or would: the module may rename it itself."""
        if name in self.expected:
            return name
        parts = self.bare(name).split(".")
        for k in range(len(parts) - 1, 0, -1):
            module = self.modules.get(".".join(parts[:k]))
            if module is not None:
                return ".".join([module, *parts[k:]])
        return ".".join(part for part in [self.modules[""], *parts] if part)


def _without(name: str, wrappers: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _prefix(given: Mapping[str, Any], names: _Names, path: str) -> str:
    """Find what stands before the network's names: "", "module.", "model.", "net.", …"""
    if names.expected.keys() <= given.keys():
        return ""
    # Where no name fits, since modules rename what they load, those of the modules do.
    befores = _befores(given, names, names.bare_expected) or _befores(
        [name.rpartition(".")[0] for name in given], names, names.modules.keys() - {""}
    )
    if not befores:
        return ""
    most = max(map(len, befores.values()))
    best = [_common(found) for found in befores.values() if len(found) == most]
    if len(best) > 1:
        raise CheckpointError(
            f"{path} holds the network's names {len(best)} times, after"
            f" {' and '.join(map(repr, best))}: say which with --prefix {best[-1]}"
        )
    return best[0]


def _befores(
    given: Iterable[str], names: _Names, known: Collection[str]
) -> dict[str, list[list[str]]]:
    """Return what stands before known names, in parts, by what of it is no wrapper's."""
    befores: defaultdict[str, list[list[str]]] = defaultdict(list)
    for name in given:
        parts, seen = name.split("."), set()
        for k in range(len(parts) - 1, -1, -1):
            before = names.bare(".".join(parts[:k]))
            if before not in seen and names.bare(".".join(parts[k:])) in known:
                seen.add(before)
                befores[before].append(parts[:k])
    return befores


def _common(befores: Iterable[list[str]]) -> str:
    """Return the parts that all begin with, each with its dot."""
    together: list[str] = []
    for parts in zip(*befores, strict=False):
        if len(set(parts)) > 1:
            break
        together.append(f"{parts[0]}.")
    return "".join(together)


def _renamed(given: Iterable[str], names: _Names, prefix: str, path: str) -> dict[str, str]:
    """Return the name in the checkpoint of each weight, by the network's name."""
    theirs: dict[str, str] = {}
    for name in given:
        if not name.startswith(prefix):
            continue
        ours = names.of(name.removeprefix(prefix))
        if ours in theirs:
            raise CheckpointError(
                f"{path} has {theirs[ours]} and {name}, which are both {ours} of the network: say"
                " with --prefix how those begin that count"
            )
        theirs[ours] = name
    return theirs


def _taken_off(theirs: Mapping[str, str], prefix: str) -> str:
    found = {
        part
        for ours, name in theirs.items()
        for part in name.removeprefix(prefix).split(".")
        if part in _WRAPPERS and part not in ours.split(".")
    }
    return f"{', '.join(sorted(found))} of wrappers taken off" if found else ""


def _versions(read: Read, names: _Names, prefix: str) -> OrderedDict[str, Any]:
    """Return torch's notes of each module's version, by the network's names of modules."""
    versions: OrderedDict[str, Any] = OrderedDict()
    for module, version in (read.versions or {}).items():
        if f"{module}.".startswith(prefix):
            name = f"{module}.".removeprefix(prefix).rstrip(".")
            versions[names.of(f"{name}.").rstrip(".") if name else ""] = version
    return versions


# Loading


def _load(
    network: nn.Module, inside: Mapping[str, Any], versions: OrderedDict[str, Any], path: str
) -> tuple[list[str], list[str]]:
    """Let the network load; return the names that it misses, and those that it does not know."""
    state: Any = OrderedDict(inside)
    if versions:
        state._metadata = versions  # where torch keeps it
    try:
        found = network.load_state_dict(state, strict=False)
    except Exception as error:  # hooks and extra states are the user's own code
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{path} does not fit the network: its load_state_dict fails with"
            f" {type(error).__name__}: {' '.join(said[-2:])}"
        ) from error
    return list(found.missing_keys), list(found.unexpected_keys)


def _own_buffers(inside: Mapping[str, Any], network: nn.Module) -> list[str]:
    """Return the names of buffers that the network makes itself, and has as they are given."""
    stored = network.state_dict().keys()
    return [
        name
        for name, own in network.named_buffers()
        if name not in stored
        and isinstance(given := inside.get(name), Tensor)
        and given.shape == own.shape
        and torch.allclose(given.double(), own.detach().cpu().double(), rtol=1e-6, atol=0)
    ]


def _tied(
    missing: Iterable[str], inside: Mapping[str, Any], weights: Mapping[str, Any]
) -> list[str]:
    """Return what was left out because the network has it by another name too."""
    there = {memory for name in inside if (memory := _memory(weights.get(name)))}
    return [name for name in missing if _memory(weights[name]) in there]


def _memory(value: Any) -> tuple[Any, ...] | None:
    """Return what tells one tensor from another; None: it has no numbers."""
    if not isinstance(value, Tensor) or is_lazy(value) or not value.numel():
        return None
    return (value.data_ptr(), tuple(value.shape), value.stride()) if value.data_ptr() else None


# What is refused


def _requirelisted(
    missing: Iterable[str],
    surplus: Iterable[str],
    inside: Mapping[str, Any],
    expected: Mapping[str, Any],
    path: str,
    prefix: str,
) -> None:
    lacks = [f"{name} {_shape(expected.get(name))}".strip() for name in missing]
    more = [f"{name} {_shape(inside.get(name))}".strip() for name in surplus]
    if not (lacks or more):
        return
    parts = [
        f"it lacks {len(lacks)} of {len(expected)} that the network has: {listed(lacks)}"
        if lacks
        else "",
        f"it has {len(more)} that the network has not: {listed(more)}" if more else "",
    ]
    raise CheckpointError(
        f"{path} does not fit the network"
        + (f" (names after {prefix!r})" if prefix else "")
        + f": {'; '.join(part for part in parts if part)}. Give the --model (and --model-option)"
        " that it was trained as, --prefix if its names have another beginning, or --key if its"
        " weights are under another key"
    )


def _wrong_shapes(inside: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, str]:
    """Say of each weight of another shape what it is."""
    wrong = {}
    for name, given in inside.items():
        own = expected.get(name)
        if not (isinstance(given, Tensor) and isinstance(own, Tensor)) or is_lazy(own):
            continue
        is_number = own.ndim == 0 and given.shape == (1,)  # torch before 0.4
        if given.shape != own.shape and not is_number:
            wrong[name] = f"{name} is {tuple(given.shape)}, in the network {tuple(own.shape)}"
    return wrong


def _require_shapes(wrong: Mapping[str, str], path: str) -> None:
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the network: {listed(wrong.values(), '; ')}. Give the --model"
            " (and --model-option) that it was trained as"
        )


def _require_one_of_tied(inside: Mapping[str, Any], weights: Mapping[str, Any], path: str) -> None:
    """Refuse two tensors for what is one in the network: which of them counts, nobody can tell."""
    first: dict[tuple[Any, ...], str] = {}
    for name in weights:
        memory = _memory(weights[name])
        if memory is None or name not in inside:
            continue
        other = first.setdefault(memory, name)
        if other != name and not torch.equal(inside[other], inside[name]):
            raise CheckpointError(
                f"{path} does not fit the network: {other} and {name} are one tensor in the"
                " network, and two different ones in the file. Give a --model that does not tie"
                " them"
            )


def _kinds(inside: Mapping[str, Any], expected: Mapping[str, Any], path: str) -> str:
    """Say which kinds of numbers are read as others.

    Raises:
        CheckpointError: that would lose more than precision.
    """
    kinds = set()
    for name, given in inside.items():
        own = expected.get(name)
        if not (isinstance(given, Tensor) and isinstance(own, Tensor)) or given.dtype == own.dtype:
            continue
        kinds.add(f"{_kind(given)} read as {_kind(own)}")
        is_real = own.is_floating_point() or own.is_complex()
        is_quantised = given.dtype in _QUANTISED and is_real and given.numel() > 1
        loses = (given.is_complex() and not own.is_complex()) or is_quantised
        loses |= (
            given.is_floating_point()
            and not (own.is_floating_point() or own.is_complex())
            and not torch.equal(given, given.trunc())
        )
        if loses:
            raise CheckpointError(
                f"{path} does not fit the network: {name} is {_kind(given)}, in the network"
                f" {_kind(own)}. Give the --model that it was trained as"
            )
    return ", ".join(sorted(kinds))


# Whole numbers that weights are made of to be shorter; their scale is elsewhere.
_QUANTISED = frozenset({torch.int8, torch.uint8, torch.int32})


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) and not is_lazy(value) else ""
