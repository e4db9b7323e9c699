"""What the modules of a network hold between calls, and how it is put back or left out."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distributed_stiffness.gradients.batches import tensors

BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD_HOOKS)
# Attributes of every module, which hold no state of a call.
_OF_MODULES = frozenset(nn.Module().__dict__)
# Two runs of a network on the same examples differ by less, relative to the largest output.
_SAME = 1e-5

# How a cache is empty: None, or a container without items; or not there.
_Way = Literal["emptied", "deleted"] | None
_WAYS: tuple[_Way, ...] = ("emptied", "deleted")
_LIBRARIES = ("builtins", "torch", "numpy", "collections", "functools", "types", "typing", "enum")


@dataclass(eq=False)
class Attribute:
    """What a module, or an object of it, holds under a name, as it was; or holds no more."""

    holder: MutableMapping[str, Any]
    name: str
    value: Any
    restore: Callable[[], Any]
    is_saved: bool  # in the state dict: a part of the network
    left_out: _Way = None

    def put_back(self) -> None:
        """Give the holder what it had."""
        if self.left_out is None:
            self.holder[self.name] = self.restore()
        elif self.left_out == "deleted":
            self.holder.pop(self.name, None)
        elif isinstance(self.value, Tensor):
            self.holder[self.name] = None
        else:
            self.value.clear()
            self.holder[self.name] = self.value

    def leave_out(self, way: _Way) -> None:
        """Leave it out from the next call on; None: put it back."""
        self.left_out = way

    @property
    def is_filled(self) -> bool:
        """Whether it holds something now."""
        now = self.holder.get(self.name)
        return isinstance(now, Tensor) or (isinstance(now, dict | list) and len(now) > 0)

    @property
    def may_be_cache(self) -> bool:
        """Whether it holds numbers that a call may have put there."""
        if self.is_saved:
            return False
        if isinstance(self.value, Tensor):
            return not isinstance(self.value, nn.Parameter) and _is_number(self.value)
        return isinstance(self.value, dict | list) and any(
            map(_is_number, pytree.tree_leaves(self.value))
        )


@dataclass
class New:
    """What a call has given to a module, or to an object of it."""

    holder: MutableMapping[str, Any]
    known: frozenset[str]
    may_be_cache = False

    def put_back(self) -> None:
        """Take it away."""
        for name in self.holder.keys() - self.known:
            del self.holder[name]


def _has_state(value: Any) -> bool:
    """Whether it is an object of the user's own, which may keep something."""
    is_own = type(value).__module__.partition(".")[0] not in _LIBRARIES
    return is_own and hasattr(value, "__dict__") and not callable(value)


@dataclass(eq=False)
class Hook:
    """A hook of the user's on a module of the copy."""

    hooks: MutableMapping[int, Any]
    key: int
    all: Mapping[int, Any]  # of the module, in their order
    without: set[int]  # of these, left out
    name: str  # of the module or parameter
    is_backward: bool

    @property
    def left_out(self) -> bool:
        """Whether it is left out."""
        return self.key in self.without

    def leave_out(self, way: _Way) -> None:
        """Call the module without it, or with it again."""
        (self.without.discard if way is None else self.without.add)(self.key)
        self.hooks.clear()
        self.hooks.update({k: h for k, h in self.all.items() if k not in self.without})


@contextlib.contextmanager
def looked_at(hooks: Sequence[Hook]) -> Iterator[set[Hook]]:
    """Note which forward hooks return something, or write into what they are shown."""
    acting: set[Hook] = set()

    def watched(hook: Hook) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            shown = tensors((args[1:], kwargs))
            before = [t._version for t in shown]
            found = hook.all[hook.key](*args, **kwargs)
            if found is not None or before != [t._version for t in shown]:
                acting.add(hook)
            return found

        return call

    forward = [hook for hook in hooks if not hook.is_backward]
    for hook in forward:
        hook.hooks[hook.key] = watched(hook)
    try:
        yield acting
    finally:
        for hook in forward:
            hook.hooks[hook.key] = hook.all[hook.key]


def state_of(root: nn.Module) -> Iterator[Attribute | New]:
    """Yield all that the modules of a network hold beside parameters and modules."""
    seen: set[int] = set()
    known: dict[int, _Numbers] = {}
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it holds its tensors out of Python's sight
        yield from _held(vars(module), seen, known, without=_OF_MODULES)
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        yield from _held(module._buffers, seen, known, saved=saved)


def _held(
    holder: MutableMapping[str, Any],
    seen: set[int],
    known: dict[int, _Numbers],
    without: Collection[str] = (),
    saved: Collection[str] = (),
) -> Iterator[Attribute | New]:
    yield New(holder, frozenset(holder))
    for name, value in list(holder.items()):
        if name in without:
            continue
        yield Attribute(holder, name, value, _snapshot(value, known), name in saved)
        if id(value) not in seen and _has_state(value):
            seen.add(id(value))
            yield from _held(vars(value), seen, known)


def hooks_of(root: nn.Module) -> Iterator[Hook]:
    """Yield the hooks of a network that are not torch's own."""
    for name, module in root.named_modules():
        for kind in _HOOKS:
            # torch's own make weights (weight_norm, spectral_norm, prune).
            yield from _of_place(
                getattr(module, kind),
                f"{kind[1:-1]} of {name or 'the network'}",
                is_backward=kind in BACKWARD_HOOKS,
            )
    for name, p in root.named_parameters():
        yield from _of_place(p._backward_hooks or {}, f"of {name}", is_backward=True)


def _of_place(hooks: MutableMapping[int, Any], name: str, *, is_backward: bool) -> Iterator[Hook]:
    whole, without = dict(hooks), set[int]()
    for key, hook in whole.items():
        if not str(getattr(hook, "__module__", "") or "").startswith("torch."):
            yield Hook(hooks, key, whole, without, name, is_backward)


def leave_out(parts: Sequence[Attribute | Hook], is_good: Callable[[], bool]) -> None:
    """Leave out all of them, or else each that can be, as far as that is good."""
    for some in (parts, *([part] for part in parts if len(parts) > 1)):
        for way in _WAYS:
            for part in some:
                part.leave_out(way)
            if is_good():
                if some is parts:
                    return
                break
            for part in some:
                part.leave_out(None)


def _snapshot(value: Any, known: dict[int, _Numbers]) -> Callable[[], Any]:
    """Return what gives a value back as it is now.

    Tensors are `known` by their `id`: one that has several holders stays one.
    """
    if isinstance(value, Tensor):
        return known.setdefault(id(value), _Numbers(value)).restored
    if isinstance(value, dict):
        parts = {k: _snapshot(v, known) for k, v in value.items()}

        def restored_dict() -> Any:
            values = {k: part() for k, part in parts.items()}
            value.clear()
            value.update(values)
            return value

        return restored_dict
    if isinstance(value, list | deque):
        items = [_snapshot(v, known) for v in value]

        def restored_list() -> Any:
            values = [item() for item in items]
            value.clear()
            value.extend(values)
            return value

        return restored_list
    if isinstance(value, set):
        members = frozenset(value)

        def restored_set() -> Any:
            value.clear()
            value.update(members)
            return value

        return restored_set
    return lambda: value


class _Numbers:
    """A tensor as it was, also after something was written into it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._numbers = tensor.detach().clone()

    def restored(self) -> Tensor:
        """Return the tensor, or another one with its numbers if it has been written to."""
        if self._tensor._version != self._version:
            self._tensor = self._numbers.clone()
            self._version = self._tensor._version
        return self._tensor


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def alike(found: Sequence[Tensor | None] | None, expected: Sequence[Tensor | None] | None) -> bool:
    """Whether two runs gave the same, but for rounding; None: it did not run."""
    if found is None or expected is None or len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or not torch.allclose(
            a, b, rtol=_SAME, atol=_SAME * _largest(b), equal_nan=True
        ):
            return False
    return True


def _largest(t: Tensor) -> float:
    return float(t.abs().nan_to_num(0.0, 0.0).max()) if t.numel() else 0.0
