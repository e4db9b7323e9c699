"""Calls after which whose a row is may follow from the examples' values, not from shapes alone.

A network may take padding out, sort its examples, send them to experts, or read numbers into Python
and go another way for some. Whose the rows of later uses are is then found for every batch anew;
where no such call was made it is found once for all batches of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

_MOVING = frozenset(
    (
        "index_select", "gather", "take", "take_along_dim", "masked_select", "masked_scatter",
        "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_put",
        "index_reduce", "index_fill", "sort", "msort", "topk", "unique", "unique_consecutive",
        "nonzero", "argwhere", "repeat_interleave", "searchsorted", "bucketize", "bincount",
        "_pack_padded_sequence", "pack_padded_sequence", "grouped_mm", "_grouped_mm",
        # into Python
        "item", "tolist", "numpy", "__int__", "__index__", "__float__",
        "__bool__", "__contains__", "__array__", "__complex__",
        # which example, or position, has what
        "argmax", "argmin", "argsort", "one_hot",
    )
)  # fmt: skip


def may_move(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call on what depends on the examples may move rows by their values.

    Args:
        func: a torch function.
        args: of which some depend on the examples.
        kwargs: of the call.
    """
    name = getattr(func, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        return len(args) > 1 and _picks(args[1])
    if name == "where":
        return len(args) == 1 and not kwargs  # which are true
    if name == "embedding":
        return len(args) > 1 and not isinstance(args[1], nn.Parameter)
    if name == "select":
        return len(args) > 1 and args[1] == 0
    return name.rstrip("_") in _MOVING or name in _MOVING


def _picks(index: Any) -> bool:
    """Whether an index picks rows: tensors, lists, or a number in front."""
    parts = index if isinstance(index, tuple) else (index,)
    picks = any(isinstance(part, Tensor | list) for part in parts)
    return picks or (bool(parts) and isinstance(parts[0], int) and not isinstance(parts[0], bool))
