"""A network as a function of its inputs: a private copy that starts every call from one state.

The user's module is never run but in a trial on a few examples where it has hooks of its own, and
never changed. The copy has the memory of its parameters. What a call leaves behind on a module
(caches, counters, kept activations, statistics) is put back before the next one: else a second
call would not be the function that the first one was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distributed_stiffness.errors import GradientError, ModelError, StiffnessError
from distributed_stiffness.gradients.batches import (
    Nest,
    arguments,
    as_nest,
    map_tensors,
    tensors,
)
from distributed_stiffness.gradients.module_state import (
    BACKWARD_HOOKS,
    Attribute,
    alike,
    hooks_of,
    leave_out,
    looked_at,
    state_of,
)
from distributed_stiffness.gradients.surroundings import NoLessThan, is_out_of_memory

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
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
        detached: list[Tensor] = []
        self.module, self.dtype = private_copy(model, detached=detached), dtype
        # They are kept: their `id` is nobody else's as long as they live.
        self._originals = [*model.parameters(), *detached]
        self.held = {id(p): f"the weight {name!r}" for name, p in model.named_parameters()}
        _refuse_views(model)
        floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self._has_several = len(floating) > 1
        _convert(self.module, dtype)
        self._state = list(state_of(self.module))
        if few is not None:
            self._leave_out(few)
        self.held |= {id(t): "a tensor that was made of weights before" for t in detached}

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

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        inputs: Iterable[Tensor | GradientEdge],
        directions: Sequence[Tensor] | None = None,
        *,
        again: bool = False,
    ) -> list[Tensor | None]:
        """Return the gradients of what a call has made; None where it does not depend on an input.

        What checkpointed activations make again here is made as the call has made it: calls of
        torch by edges, unlike those by tensors, leave a mode on.

        Args:
            outputs: at least one, which requires a gradient.
            inputs: tensors that the call has used, or edges of its graph.
            directions: like the outputs; None: they are single numbers.
            again: whether there will be another such pass.

        Raises:
            GradientError: the backward pass does not run.
        """
        edges = [get_gradient_edge(t) if isinstance(t, Tensor) else t for t in inputs]
        ends = [get_gradient_edge(t) for t in outputs]
        mode = NoLessThan(self.dtype, self.held, no_more=self._has_several)
        with saying_backward("network"), mode:
            found = torch.autograd.grad(
                ends, edges, directions, allow_unused=True, retain_graph=again
            )
        return list(found)

    def _put_back(self) -> None:
        for attribute in self._state:
            attribute.put_back()

    def _leave_out(self, few: Nest) -> None:
        """Leave out hooks that only look on, and filled caches.

        Without such a hook outputs and gradients stay what they are. Without a cache of what is
        made of parameters the outputs do, and more gradients arrive than did (it has hidden them),
        or the call fills it again.
        """
        hooks = list(hooks_of(self.module))
        if hooks:
            with looked_at(hooks) as acting:
                expected = self._tried(few)
            idle = [hook for hook in hooks if hook not in acting]
            if expected is not None and idle:
                leave_out(idle, lambda: alike(self._tried(few), expected))
        kept = [hook for hook in hooks if hook.is_backward and not hook.left_out]
        if kept:
            raise ModelError(
                f"a hook of the network changes gradients ({kept[0].name}), so that they are not"
                " those of the loss: remove it while gradients are compared"
            )
        caches = [a for a in self._state if isinstance(a, Attribute) and a.may_be_cache]
        before = self._tried(few) if caches else None
        if before is None:
            return

        def is_one(cache: Attribute) -> bool:
            found = self._tried(few)
            outputs = None if found is None else found[: len(found) - self._n_gradients]
            is_same = alike(outputs, before[: len(before) - self._n_gradients])
            return is_same and (cache.is_filled or not alike(found, before))

        for cache in caches:
            leave_out([cache], functools.partial(is_one, cache))

    @property
    def _n_gradients(self) -> int:
        return sum(p.requires_grad for p in self.module.parameters())

    def _tried(self, few: Nest) -> list[Tensor | None] | None:
        """Return outputs, then gradients; None where the network does not run."""
        inputs = map_tensors(lambda t: t.detach().clone().to(cast_dtype(t, self.dtype)), few)
        args, kwargs = arguments(inputs)
        try:
            with torch.enable_grad(), self.running() as module:
                outputs = as_nest(module(*args, **kwargs))
                found = [t for t in tensors(outputs) if t.is_floating_point()]
                parameters = [p for p in module.parameters() if p.requires_grad]
                total = torch.stack([t.sin().sum() for t in found if t.requires_grad]).sum()
                gradients = self.differentiate([total], parameters)
        except Exception:  # whatever a network's own code raises
            return None
        return [*(t.detach().clone() for t in found), *gradients]


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
def saying_backward(of: str) -> Iterator[None]:
    """Say in a sentence that a backward pass of a network or a loss, made in here, does not run.

    Raises:
        GradientError: it does not.
    """
    try:
        yield
    except RuntimeError as error:  # of torch, or of the user's own code
        if isinstance(error, StiffnessError) or is_out_of_memory(error):
            raise
        raise GradientError(
            f"the {of}'s backward pass does not run: {type(error).__name__}: {error}"
        ) from error


def private_copy(
    model: nn.Module, *, of_training: bool = False, detached: list[Tensor] | None = None
) -> nn.Module:
    """Return a copy of a network without what wraps it or its parts.

    Args:
        model: it is not changed.
        of_training: whether it stays what it is while the model is trained on: it has memory of
            its own, and hooks on gradients, which are the training's, hear nothing of it. Else the
            parameters have the memory of the model's.
        detached: is given the copies that have lost the history of what they were copied from.

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
        with torch.inference_mode(False), _WithoutHistory(detached):
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
        for kind in BACKWARD_HOOKS if of_training else ():
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

    def __init__(self, detached: list[Tensor] | None) -> None:
        super().__init__()
        self._detached = detached

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
            memo[id(tensor)] = copied = tensor.detach().clone()
            if self._detached is not None and tensor.grad_fn is not None:
                self._detached.append(copied)
            return copied
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
