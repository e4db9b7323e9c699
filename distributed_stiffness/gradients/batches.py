"""Examples: nests (tuples, lists, dicts) of tensors, each with the examples first.

Inputs and targets may be single tensors or such nests. What a notebook holds otherwise, a data set
or an iterable of batches, is stacked once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, default_collate

from distributed_stiffness.errors import ModelError

Nest = Any  # a tensor, or tuples, lists and dicts of tensors
Examples = Any  # (inputs, targets), a Dataset of such pairs, or an iterable of batches of them


def from_numpy(array: np.ndarray) -> Nest:
    """Return an array as a tensor; a structured array as tensors by the names of its fields."""
    if array.dtype.names:
        return {n: torch.from_numpy(np.array(array[n], order="C")) for n in array.dtype.names}
    return torch.from_numpy(array)


def map_tensors(function: Callable[[Tensor], Tensor], nest: Nest) -> Nest:
    """Apply `function` to every tensor; anything else stays."""
    return pytree.tree_map_only(Tensor, function, nest)


def tensors(nest: Nest) -> list[Tensor]:
    """Return every tensor of a nest, in its order."""
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


def count_examples(nest: Nest) -> int:
    """Return N."""
    return len(tensors(nest)[0])


def take(nest: Nest, rows: slice | Tensor) -> Nest:
    """Select examples."""
    return map_tensors(lambda t: t[rows], nest)


def join(nests: Sequence[Nest]) -> Nest:
    """Lay the examples of several nests one after the other; what is no tensor is the first's."""
    if len(nests) == 1:
        return nests[0]
    return pytree.tree_map(
        lambda first, *more: torch.cat([first, *more]) if isinstance(first, Tensor) else first,
        *nests,
    )


def prepare(nest: Nest, dtype: torch.dtype, device: torch.device) -> Nest:
    """Move to the device; floating tensors (not indices) are cast to `dtype`."""
    return map_tensors(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), nest)


def call(model: nn.Module, inputs: Nest) -> Any:
    """Run the network on its inputs: as one argument, several (tuple, list), or by name (dict)."""
    args, kwargs = arguments(inputs)
    return as_nest(model(*args, **kwargs))


def as_nest(outputs: Any) -> Nest:
    """Return what a network returned, a dataclass among it, as a nest whose tensors are found."""
    kind = type(outputs)
    if dataclasses.is_dataclass(outputs) and kind not in pytree.SUPPORTED_NODES:
        names = [field.name for field in dataclasses.fields(outputs)]

        def built(values: Iterable[Any], _: Any) -> Any:
            made = object.__new__(kind)
            for name, value in zip(names, values, strict=True):
                object.__setattr__(made, name, value)
            return made

        pytree.register_pytree_node(kind, lambda o: ([getattr(o, n) for n in names], None), built)
    return outputs


def arguments(inputs: Nest) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as the arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def require_examples_first(outputs: Nest, n: int) -> None:
    """Check that a network returned the examples that it was given.

    Raises:
        ModelError: it did not.
    """
    found = tensors(outputs)
    if not found:
        raise ModelError(
            f"the network returned {type(outputs).__name__}, expected a tensor with N first (for"
            " cross_entropy, logits), or a tuple, a dict or a dataclass of such"
        )
    odd = next((t for t in found if t.layout != torch.strided), None)
    if odd is not None:
        raise ModelError(
            f"the network returned a tensor of layout {odd.layout}: expected dense ones;"
            " t.to_dense() in the network makes them"
        )
    if isinstance(outputs, Tensor) and (outputs.dim() == 0 or len(outputs) != n):
        raise ModelError(
            f"the network returned shape {tuple(outputs.shape)} for {n} examples, expected N first"
        )


def pair(examples: Examples) -> tuple[Nest, Nest]:
    """Return (inputs, targets) with all examples in memory.

    Args:
        examples: a pair (inputs, targets), N first; a map-style `Dataset` of such pairs; or an
            iterable of batches of them, such as a `DataLoader`.

    Raises:
        ModelError: they are anything else, or not as many inputs as targets.
    """
    if not _is_pair(examples):
        batches = list(stream(examples))
        if not batches:
            raise ModelError("there are no examples")
        examples = join(batches)
    return _checked(examples)


def stream(examples: Examples, size: int = 256) -> Iterator[tuple[Nest, Nest]]:
    """Yield examples batch by batch; arguments as `pair`, and iterators may be of any length."""
    if _is_pair(examples):
        inputs, targets = _checked(examples)
        for start in range(0, count_examples(inputs), size):
            yield (
                take(inputs, slice(start, start + size)),
                take(targets, slice(start, start + size)),
            )
    elif isinstance(examples, Dataset) and hasattr(examples, "__len__"):
        for start in range(0, len(examples), size):
            stop = min(start + size, len(examples))
            items = [examples[i] for i in range(start, stop)]
            try:
                batch = default_collate(items)
            except (TypeError, RuntimeError) as error:
                raise ModelError(
                    f"items {start} to {stop - 1} of the data set cannot be stacked"
                    f" ({str(error).splitlines()[0]}): expected pairs (input, target) of tensors,"
                    " arrays or numbers, of one shape each"
                ) from error
            yield _checked(batch)
    elif isinstance(examples, Iterable) and not isinstance(examples, Mapping | Tensor | str):
        for batch in examples:
            yield _checked(batch)
    else:
        raise ModelError(_expected(examples))


def _is_pair(examples: Examples) -> bool:
    """A list of two batches is taken for batches, a tuple of two for inputs and targets."""
    if isinstance(examples, list) and len(examples) == 2:
        return not any(isinstance(part, tuple | list) for part in examples)
    return isinstance(examples, tuple)


def _checked(examples: Any) -> tuple[Nest, Nest]:
    if not isinstance(examples, tuple | list) or len(examples) != 2:
        raise ModelError(_expected(examples))
    inputs, targets = examples
    for leaf in pytree.tree_leaves((inputs, targets)):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise ModelError("examples hold a tensor on the meta device, which has no numbers")
        if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.is_nested):
            raise ModelError(
                f"examples hold a tensor of layout {leaf.layout}: expected dense ones, N first;"
                " t.to_dense(), or padding, makes them"
            )
        if leaf is not None and not isinstance(leaf, Tensor):
            raise ModelError(
                f"examples hold a {type(leaf).__module__}.{type(leaf).__name__}: expected torch"
                " tensors, N first; torch.from_numpy makes them of arrays"
            )
    # Targets may be None: a network that returns its loss takes them among its inputs.
    found = [len(t) if t.dim() else 0 for t in tensors(inputs)]
    wanted = [len(t) if t.dim() else 0 for t in tensors(targets)]
    if not found:
        raise ModelError("the inputs hold no tensor")
    if not found[0]:
        raise ModelError("there are no examples")
    if any(n != found[0] for n in found + wanted):
        raise ModelError(
            f"{found[0]} inputs, but {next(n for n in found + wanted if n != found[0])} targets"
            " or other inputs: every tensor needs the examples first"
        )
    return inputs, targets


def _expected(examples: Any) -> str:
    return (
        f"examples are a {type(examples).__name__}: expected (inputs, targets), N first, a Dataset"
        " of such pairs, or an iterable of batches"
    )
