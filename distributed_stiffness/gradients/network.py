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
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distributed_stiffness.errors import GradientError, ModelError, StiffnessError
from distributed_stiffness.gradients.batches import Nest, arguments, map_tensors, tensors
from distributed_stiffness.gradients.surroundings import NoLessThan, is_out_of_memory

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", *_BACKWARD_HOOKS)
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
        # The originals are kept: their `id` is nobody else's as long as they live.
        self._originals = [p for _, p in model.named_parameters()]
        self.held = {id(p): name for name, p in model.named_parameters()}
        _refuse_views(model)
        floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self._has_several = len(floating) > 1
        _convert(self.module, dtype)
        self._state = list(_state(self.module))
        if few is not None:
            self._leave_out(few)

    def in_dtype(self, dtype: torch.dtype) -> Network:
        """Return the same network in another format; itself, if it is its own."""
        if dtype == self.dtype:
            return self
        self._put_back()
        other = Network(self.module, dtype)
        other._originals = [*self._originals, *other._originals]
        other.held |= self.held
        other._has_several = self._has_several
        return other

    @contextlib.contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Enter a call, or several that belong together: from the state that was given."""
        self._put_back()
        with NoLessThan(self.dtype, self.held, no_more=self._has_several):
            yield self.module

    def _put_back(self) -> None:
        for attribute in self._state:
            attribute.put_back()

    def _leave_out(self, few: Nest) -> None:
        """Leave out what makes no difference: filled caches, hooks that only look on.

        A cache of what is made of parameters would hide their gradients; there the outputs alone
        must stay the same.
        """
        caches = [a for a in self._state if isinstance(a, _Attribute) and a.may_be_cache]
        hooks = list(_hooks(self.module))
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
        kept = [hook for hook in hooks if hook.is_backward and not hook.left_out]
        if kept:
            raise ModelError(
                f"a hook of the network changes gradients ({kept[0].name}), so that they are not"
                " those of the loss: remove it while gradients are compared"
            )

    def _tried(self, few: Nest, *, gradients: bool) -> list[Tensor | None] | None:
        """Return the outputs, and maybe some gradients; None where the network does not run."""
        inputs = map_tensors(lambda t: t.detach().clone().to(cast_dtype(t, self.dtype)), few)
        args, kwargs = arguments(inputs)
        try:
            with torch.enable_grad(), self.running() as module:
                found = [t for t in tensors(module(*args, **kwargs)) if t.is_floating_point()]
                outputs: list[Tensor | None] = [t.detach().clone() for t in found]
                if gradients:
                    parameters = [p for p in module.parameters() if p.requires_grad]
                    total = torch.stack([t.sin().sum() for t in found if t.requires_grad]).sum()
                    outputs += torch.autograd.grad(total, parameters, allow_unused=True)
        except Exception:  # whatever a network's own code raises
            return None
        return outputs


@contextlib.contextmanager
def saying(inputs: Nest) -> Iterator[None]:
    """Say in a sentence that a network, run in here, does not run on some inputs.

    Raises:
        ModelError: it does not.
    """
    try:
        yield
    except Exception as error:  # the user's own code: any type of error
        if isinstance(error, StiffnessError) or is_out_of_memory(error):
            raise
        kinds = ", ".join(
            f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors(inputs)
        )
        raise ModelError(
            f"the network does not run on these examples: {type(error).__name__}: {error}; they"
            f" were {kinds}"
        ) from error


@contextlib.contextmanager
def saying_backward() -> Iterator[None]:
    """Say in a sentence that a backward pass, made in here, does not run.

    Raises:
        GradientError: it does not.
    """
    try:
        yield
    except RuntimeError as error:  # of torch, or of the user's own code
        if isinstance(error, StiffnessError) or is_out_of_memory(error):
            raise
        raise GradientError(
            f"the network's backward pass does not run: {type(error).__name__}: {error}"
        ) from error


def private_copy(model: nn.Module, *, of_training: bool = False) -> nn.Module:
    """Return a copy of a network without what wraps it or its parts.

    Args:
        model: it is not changed.
        of_training: whether it stays what it is while the model is trained on: it has memory of
            its own, and hooks on gradients, which are the training's, hear nothing of it. Else the
            parameters have the memory of the model's.

    Raises:
        ModelError: the network cannot be copied.
    """
    model = _unwrapped(model)
    memo: dict[int, Any] = {}
    for part in model.modules():
        for p in part._parameters.values():
            if p is None or id(p) in memo or _is_wrapped(p) or is_lazy(p):
                continue
            values = p.detach().as_subclass(Tensor)
            alone = of_training or p.is_inference()
            memo[id(p)] = nn.Parameter(values.clone() if alone else values, p.requires_grad)
            for hook in () if of_training else (p._backward_hooks or {}).values():
                memo[id(p)].register_hook(hook)
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
        for kind in _BACKWARD_HOOKS if of_training else ():
            getattr(part, kind).clear()
    return copied


def _refuse_views(model: nn.Module) -> None:
    """Refuse attributes that are views of weights: in a copy they would be of nothing."""
    own = {id(p) for p in model.parameters()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value._is_view() and id(value._base) in own:
                raise ModelError(
                    f"{name or 'the network'} keeps {attribute!r}, a view of a weight, which no"
                    " copy of the network has: take it in forward, or by torch.nn.utils."
                    "parametrize"
                )


def _is_wrapped(p: Any) -> bool:
    """Whether other tensors hold a parameter's numbers."""
    return bool(is_traceable_wrapper_subclass(p))


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

# How a cache is empty: None, or a container without items; or not there.
_Way = Literal["emptied", "deleted"] | None
_WAYS: tuple[_Way, ...] = ("emptied", "deleted")
_LIBRARIES = ("builtins", "torch", "numpy", "collections", "functools", "types", "typing", "enum")


@dataclass
class _Attribute:
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
class _New:
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


@dataclass
class _Hook:
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


def _state(root: nn.Module) -> Iterator[_Attribute | _New]:
    seen: set[int] = set()
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it holds its tensors out of Python's sight
        yield from _held(vars(module), seen, without=_OF_MODULES)
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        yield from _held(module._buffers, seen, saved=saved)


def _held(
    holder: MutableMapping[str, Any],
    seen: set[int],
    without: Collection[str] = (),
    saved: Collection[str] = (),
) -> Iterator[_Attribute | _New]:
    yield _New(holder, frozenset(holder))
    for name, value in list(holder.items()):
        if name in without:
            continue
        yield _Attribute(holder, name, value, _snapshot(value), name in saved)
        is_plain = type(value).__module__.partition(".")[0] not in _LIBRARIES
        if (
            is_plain
            and hasattr(value, "__dict__")
            and not callable(value)
            and id(value) not in seen
        ):
            seen.add(id(value))  # an object of the user's own, with a state of its own
            yield from _held(vars(value), seen)


def _hooks(root: nn.Module) -> Iterator[_Hook]:
    for name, module in root.named_modules():
        for kind in _HOOKS:
            # torch's own make weights (weight_norm, spectral_norm, prune).
            yield from _hooks_of(
                getattr(module, kind),
                f"{kind[1:-1]} of {name or 'the network'}",
                is_backward=kind in _BACKWARD_HOOKS,
            )
    for name, p in root.named_parameters():
        yield from _hooks_of(p._backward_hooks or {}, f"of {name}", is_backward=True)


def _hooks_of(hooks: MutableMapping[int, Any], name: str, *, is_backward: bool) -> Iterator[_Hook]:
    whole, without = dict(hooks), set[int]()
    for key, hook in whole.items():
        if not str(getattr(hook, "__module__", "") or "").startswith("torch."):
            yield _Hook(hooks, key, whole, without, name, is_backward)


def _leave_out(parts: Sequence[_Attribute | _Hook], is_same: Callable[[], bool]) -> None:
    """Leave out all of them, or each that can be, so that the network stays the same."""
    for some in (parts, *([part] for part in parts if len(parts) > 1)):
        for way in _WAYS:
            for part in some:
                part.leave_out(way)
            if is_same():
                break
            for part in some:
                part.leave_out(None)
        else:
            continue
        if some is parts:
            return


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
            a, b, rtol=_SAME, atol=_SAME * _largest(b), equal_nan=True
        ):
            return False
    return True


def _largest(t: Tensor) -> float:
    return float(t.abs().nan_to_num(0.0, 0.0).max()) if t.numel() else 0.0
