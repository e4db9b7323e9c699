"""What a user has switched in torch does not reach into a call, and a call leaves nothing switched.

Switches of a network's own code, such as an autocast region or a cast to half precision, are met
where its calls are made: `NoLessThan`.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distributed_stiffness.errors import ModelError

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as in a fresh process, and put back random states and defaults afterwards.

    Gradients are on; inference mode and autocasting are off; new tensors are float32 on the CPU.
    """
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  # whoever uses it
    dtype = torch.get_default_dtype()
    on_cpu = torch.get_default_device().type == "cpu"
    try:
        with (
            torch.random.fork_rng(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.autograd.set_detect_anomaly(False),
            contextlib.nullcontext() if on_cpu else torch.device("cpu"),
        ):
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def in_fresh_surroundings(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: it computes `undisturbed`."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with undisturbed():
            return function(*args, **kwargs)

    return inside


class NoLessThan(TorchFunctionMode):
    """Compute in a floating-point format or a longer one, whatever the code that is run says.

    Networks cast (`x.float()`, `x.to(torch.bfloat16)`), autocast, and keep constants of a dtype of
    their own. While this mode is active a cast to a shorter format is one to `dtype`, and
    arguments in a shorter one are cast to it: the numbers are those that the code means, as well as
    `dtype` can hold them.

    Args:
        dtype: the format.
        held: parameters by `id` that the code must not take: those of which a network has copies.
        no_more: whether casts to a longer format are casts to `dtype` too.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        held: Mapping[int, str] = MappingProxyType({}),
        *,
        no_more: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self._held = dtype, held
        kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        self._instead = {k: dtype for k in kinds if k.itemsize < dtype.itemsize or no_more}
        self._instead.pop(dtype, None)
        self._instead_of: dict[Any, Callable[..., Any]] = {F.batch_norm: _batch_norm}
        if dtype == torch.float64:
            self._instead[torch.complex64] = torch.complex128
            self._instead_of |= dict.fromkeys(_GROUPED_PRODUCTS, _grouped_product)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Make the call with longer numbers."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute, such as `x.shape`
            return func(*args, **kwargs)
        if self._held:
            self._require_own((*args, *kwargs.values()))
        func = self._instead_of.get(func, func)
        if name in _CASTS and _CASTS[name] in self._instead and len(args) == 1:
            return args[0].to(self.dtype)
        kept = args[: is_write(func)]  # what is written stays what it is
        args = (*kept, *(self._long(value) for value in args[len(kept) :]))
        kwargs = {k: v if k == "out" else self._long(v) for k, v in kwargs.items()}
        if torch._C._is_any_autocast_enabled():
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        makes = isinstance(output, Tensor) and not any(isinstance(a, Tensor) for a in args)
        return self._long(output) if makes and not kept else output

    def _require_own(self, values: Iterable[Any]) -> None:
        for value in values:
            if id(value) in self._held:
                raise ModelError(
                    f"the network or its loss takes {self._held[id(value)]} past the module that"
                    " holds it (by a closure, a patched method, a hook, a global name, or an"
                    " attribute that keeps what was made of it), so that no copy of the network can"
                    " be run in its place: reach layers by attributes of the module, make of"
                    " weights what is needed in forward, and give a loss that takes weights as a"
                    " WholeLoss of the model that it is given"
                )
            if type(value) in (list, tuple):
                self._require_own(value)

    def _long(self, value: Any) -> Any:
        """Return a dtype, a tensor, or tensors in lists, without what is shorter."""
        if isinstance(value, Tensor):
            return value.to(self._instead[value.dtype]) if value.dtype in self._instead else value
        if isinstance(value, torch.dtype):
            return self._instead.get(value, value)
        if type(value) in (list, tuple) and any(isinstance(v, Tensor) for v in value):
            return type(value)(map(self._long, value))
        return value


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, of one example in running statistics spelt out.

    There torch 2.14 takes a gradient for channels last that is not, on a CPU.
    """
    if training or len(x) != 1 or running_mean is None or running_var is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _grouped_product(
    x: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """Rows by groups times a matrix a group, which torch has not for float64."""
    del out_dtype
    if x.dim() != 2 or weights.dim() != 3 or offs is None or bias is not None:
        raise NotImplementedError("a grouped product of another kind, in float64")
    parts, start = [], 0
    for group, stop in enumerate(offs.tolist()):
        if stop > start:
            parts.append(x[start:stop] @ weights[group])
        start = stop
    parts.append(x.new_zeros(len(x) - start, weights.shape[2]))  # rows of no group
    return torch.cat(parts)


_GROUPED_PRODUCTS = [
    function
    for function in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if function is not None
]
_CASTS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}


def is_write(func: Callable[..., Any]) -> bool:
    """Whether a call writes its first argument: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING


_WRITING = {
    "__setitem__",
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod")),
}

_OUT_OF_MEMORY = (
    "can't allocate memory", "bad_alloc", "out of memory", "Cannot allocate memory",
    "could not create a primitive",  # oneDNN, where it cannot have room for its code
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: torch has several."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
