"""A network as a function of its inputs: a private copy that starts every call from one state.

The user's module is never run but in a trial on a few examples where it has hooks of its own, and
never changed. The copy has the memory of its parameters. What a call leaves behind on a module
(caches, counters, kept activations, statistics) is put back before the next one: else a second
call would not be the function that the first one was.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients.batches import Nest, arguments, map_tensors, tensors
from distributed_stiffness.gradients.surroundings import NoLessThan

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# Attributes of every module, which hold no state of a call.
_OF_MODULES = frozenset(nn.Module().__dict__)
# Two runs of a network on the same examples differ by less, relative to the largest output.
_SAME = 1e-5
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Network:
    """A copy of a network that computes in one floating-point format, or a longer one.

    Args:
        model: in any mode; it is not changed.
        dtype: float32 or float64.
        few: inputs of a few examples, N first, on which is tried what may be left out (caches that
            are filled already, hooks that only look on); None leaves nothing out.

    Raises:
        ModelError: the network cannot be copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, few: Nest | None = None) -> None:
        self.module, self.dtype = private_copy(model), dtype
        _convert(self.module, dtype)
        self._state = list(_state(self.module))
        if few is not None:
            self._leave_out(few)

    def in_dtype(self, dtype: torch.dtype) -> Network:
        """Return the same network in another format; itself, if it is its own."""
        if dtype == self.dtype:
            return self
        self._put_back()
        return Network(self.module, dtype)

    @contextlib.contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Enter a call, or several that belong together: from the state that was given."""
        self._put_back()
        with NoLessThan(self.dtype):
            yield self.module

    def _put_back(self) -> None:
        for attribute in self._state:
            attribute.put_back()

    def _leave_out(self, few: Nest) -> None:
        """Leave out what makes no difference: filled caches, hooks that only look on.

        A cache of what is made of parameters would hide their gradients; there the outputs alone
        must stay the same.
        """
        caches = [attribute for attribute in self._state if attribute.may_be_cache]
        hooks = [hook for module in self.module.modules() for hook in _hooks(module)]
        for parts, gradients in ((hooks, True), (caches, False)):
            expected = self._tried(few, gradients=gradients) if parts else None
            if expected is None:
                continue

            def is_same(
                expected: Sequence[Tensor | None] = expected, gradients: bool = gradients
            ) -> bool:
                found = self._tried(few, gradients=gradients)
                return found is not None and _alike(found, expected)

            _leave_out(parts, is_same)

    def _tried(self, few: Nest, *, gradients: bool) -> list[Tensor | None] | None:
        """Return the outputs, and maybe some gradients; None where the network does not run."""
        inputs = map_tensors(lambda t: t.detach().clone().to(cast_dtype(t, self.dtype)), few)
        args, kwargs = arguments(inputs)
        try:
            with torch.set_grad_enabled(gradients), self.running() as module:
                found = [t for t in tensors(module(*args, **kwargs)) if t.is_floating_point()]
                outputs: list[Tensor | None] = [t.detach().clone() for t in found]
                if gradients:
                    parameters = [p for p in module.parameters() if p.requires_grad]
                    total = torch.stack([t.sin().sum() for t in found if t.requires_grad]).sum()
                    outputs += torch.autograd.grad(total, parameters, allow_unused=True)
        except Exception:  # whatever a network's own code raises
            return None
        return outputs


def private_copy(model: nn.Module, *, shared: bool = True) -> nn.Module:
    """Return a copy of a network without what wraps it or its parts, and without backward hooks.

    Args:
        model: it is not changed.
        shared: whether the parameters have the memory of the model's.

    Raises:
        ModelError: the network cannot be copied.
    """
    model = _unwrapped(model)
    memo: dict[int, Any] = {}
    for part in model.modules():
        for p in part._parameters.values():
            if p is not None and type(p) is nn.Parameter and id(p) not in memo:
                values = p.detach()
                alone = not shared or p.is_inference()
                memo[id(p)] = nn.Parameter(values.clone() if alone else values, p.requires_grad)
    try:
        with torch.inference_mode(False), _WithoutHistory():
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # the user's own code: any type of error
        raise ModelError(
            f"the network, a {type(model).__name__}, cannot be copied by copy.deepcopy"
            f" ({type(error).__name__}: {error}), which keeps yours as it is: keep locks, files,"
            " generators and the like out of its attributes"
        ) from error
    for part in copied.modules():
        for name, child in part._modules.items():
            if child is not None:
                part._modules[name] = _unwrapped(child)
        for kind in _BACKWARD_HOOKS:
            getattr(part, kind).clear()
    return copied


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what torch.compile or data parallelism wraps."""
    while isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod"):
        inside = module.module if isinstance(module, _WRAPPERS) else module._orig_mod
        assert isinstance(inside, nn.Module)
        module = inside
    return module


class _WithoutHistory(TorchFunctionMode):
    """Let copy.deepcopy copy tensors that are results of others, without their history."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Copy a tensor, or make the call."""
        if func is Tensor.__deepcopy__ and (args[0].grad_fn is not None or args[0].is_inference()):
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and buffers: floating-point ones to `dtype`, complex ones to its like."""
    if any(cast_dtype(t, dtype) != t.dtype for t in (*module.parameters(), *module.buffers())):
        module._apply(lambda t: t.to(cast_dtype(t, dtype)))  # type: ignore[no-untyped-call]


def cast_dtype(t: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the format that a tensor of a network takes with `dtype`."""
    if t.is_floating_point():
        return dtype
    return _COMPLEX[dtype] if t.is_complex() else t.dtype


# State


@dataclass
class _Attribute:
    """What a module holds under a name, as it was, and what may be left out of it."""

    holder: MutableMapping[str, Any]  # vars(module), or its buffers
    name: str
    value: Any
    restore: Callable[[], Any]
    is_left_out: bool = False

    def put_back(self) -> None:
        """Give the module what it had."""
        if not self.is_left_out:
            self.holder[self.name] = self.restore()
        elif isinstance(self.value, Tensor):
            self.holder[self.name] = None
        else:
            self.value.clear()
            self.holder[self.name] = self.value

    @property
    def may_be_cache(self) -> bool:
        """Whether it holds numbers that a call may have put there."""
        if isinstance(self.value, Tensor):
            return not isinstance(self.value, nn.Parameter) and _is_number(self.value)
        return isinstance(self.value, dict | list) and any(
            map(_is_number, pytree.tree_leaves(self.value))
        )


@dataclass
class _New:
    """Attributes that a call has given to a module."""

    module: nn.Module
    known: frozenset[str]

    is_left_out = may_be_cache = False

    def put_back(self) -> None:
        """Take them away."""
        there = vars(self.module)
        for name in there.keys() - self.known:
            del there[name]


@dataclass
class _Hook:
    """A hook of the user's on a module of the copy."""

    hooks: MutableMapping[int, Any]
    key: int
    all: Mapping[int, Any]  # of the module, in their order
    left_out: set[int]  # of these

    @property
    def is_left_out(self) -> bool:
        """Whether the module is called without it."""
        return self.key in self.left_out

    @is_left_out.setter
    def is_left_out(self, value: bool) -> None:
        (self.left_out.add if value else self.left_out.discard)(self.key)
        self.hooks.clear()
        self.hooks.update({k: h for k, h in self.all.items() if k not in self.left_out})


def _state(root: nn.Module) -> Iterator[_Attribute | _New]:
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it holds its tensors out of Python's sight
        names = [name for name in vars(module) if name not in _OF_MODULES]
        yield _New(module, frozenset(vars(module)))
        for holder, known in ((vars(module), names), (module._buffers, list(module._buffers))):
            for name in known:
                value = holder[name]
                yield _Attribute(holder, name, value, _snapshot(value))


def _hooks(module: nn.Module) -> Iterator[_Hook]:
    for kind in _HOOKS:
        hooks = getattr(module, kind)
        whole, left_out = dict(hooks), set[int]()
        for key, hook in whole.items():
            # torch's own make weights (weight_norm, spectral_norm, prune).
            if not str(getattr(hook, "__module__", "") or "").startswith("torch."):
                yield _Hook(hooks, key, whole, left_out)


def _leave_out(parts: Sequence[_Attribute | _New | _Hook], is_same: Callable[[], bool]) -> None:
    """Leave out all of them, or each that can be, so that the network stays the same."""
    for part in parts:
        part.is_left_out = True
    if is_same():
        return
    for part in parts:
        part.is_left_out = False
    for part in parts if len(parts) > 1 else ():
        part.is_left_out = True
        part.is_left_out = is_same()


def _snapshot(value: Any) -> Callable[[], Any]:
    """Return what gives a value back as it is now."""
    if isinstance(value, Tensor):
        return _Numbers(value).restored
    if isinstance(value, dict):
        parts = {k: _snapshot(v) for k, v in value.items()}

        def restored_dict() -> Any:
            values = {k: part() for k, part in parts.items()}
            value.clear()
            value.update(values)
            return value

        return restored_dict
    if isinstance(value, list | deque):
        items = [_snapshot(v) for v in value]

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


def _alike(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether two runs gave the same, but for rounding."""
    if len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or not torch.allclose(
            a, b, rtol=_SAME, atol=_SAME * float(b.abs().max()) if b.numel() else 0, equal_nan=True
        ):
            return False
    return True
