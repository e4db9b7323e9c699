"""Arrays, from whatever a user keeps examples in; what cannot be one is refused by what it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distributed_stiffness.data.examples import structured
from distributed_stiffness.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = (list, tuple, str, int, float, np.generic)
_OF_NUMPY = ("torch.float16", "torch.float32", "torch.float64")


def as_inputs(given: Any) -> np.ndarray:
    """Return inputs as an array, N first; several by name as a structured one.

    Raises:
        DataError: they are no numbers, have several shapes, or are sparse.
    """
    if isinstance(given, Mapping):
        parts = {str(name): as_array(part, f"inputs {name!r}") for name, part in given.items()}
        single = [name for name, part in parts.items() if not part.ndim]
        if single:
            raise DataError(f"inputs {single[0]!r} are one value: expected N of them")
        return structured(parts)
    return as_array(given, "inputs")


def as_array(given: Any, what: str) -> np.ndarray:
    """Return an array, or a list of them of one shape, as one in memory.

    Args:
        given: an array or tensor anywhere, or a sequence.
        what: it is, for messages ("labels").

    Raises:
        DataError: it is none.
    """
    torch = sys.modules.get("torch")  # where nobody has imported it, this is no tensor
    if torch is not None and isinstance(given, torch.Tensor):
        return _of_tensor(given, what)
    _refuse_kinds(given, what)
    # Plain lists and numbers NumPy knows; of anything else it must not look into each part.
    if isinstance(given, list | tuple) and given and not isinstance(given[0], _PLAIN):
        parts = [as_array(part, what) for part in given]
        shapes = sorted({part.shape for part in parts})
        if len(shapes) > 1:
            raise DataError(_of_several_shapes(what, shapes))
        return np.stack(parts)
    if not (isinstance(given, Sequence | np.generic) or hasattr(given, "__array__")):
        raise DataError(f"{what} are a {type(given).__name__}: expected an array, tensor or list")
    try:
        array = np.asarray(given)
    except ValueError as error:  # lists in lists
        raise DataError(f"{what} cannot be made one array ({error}): pad them to one shape") from (
            error
        )
    except Exception as error:  # the user's own object
        raise DataError(
            f"{what} are a {type(given).__name__} and no array: {type(error).__name__}: {error}"
        ) from error
    if array.dtype == object and array.ndim and all(np.ndim(part) for part in array.flat):
        return as_array(list(array), what)
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _of_tensor(given: Tensor, what: str) -> np.ndarray:
    if (
        given.is_nested
        or str(given.layout) != "torch.strided"
        or given.is_quantized
        or given.is_meta
    ):
        kind = "nested" if given.is_nested else str(given.layout).removeprefix("torch.")
        kind = (
            "quantized" if given.is_quantized else "on the meta device" if given.is_meta else kind
        )
        raise DataError(
            f"{what} are a tensor that is {kind}: expected a dense one, such as .to_dense() returns"
        )
    tensor = given.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and str(tensor.dtype) not in _OF_NUMPY:
        tensor = tensor.float()  # bfloat16 and smaller
    return np.asarray(tensor.numpy(), order="C")


def _refuse_kinds(given: Any, what: str) -> None:
    """Refuse what NumPy would take for something else."""
    module = type(given).__module__
    if module.startswith("PIL."):
        raise DataError(
            f"{what} are images of PIL: expected numbers as the network takes them, such as"
            " torchvision.transforms.v2.functional.pil_to_tensor(image) / 255"
        )
    if hasattr(given, "nnz") and hasattr(given, "toarray"):
        raise DataError(
            f"{what} are sparse ({type(given).__name__}): expected a dense array, such as"
            " .toarray() returns"
        )
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise DataError(f"{what} have masked values: expected numbers, such as .filled(0) returns")


def _of_several_shapes(what: str, shapes: list[tuple[int, ...]]) -> str:
    return (
        f"{what} have several shapes, such as {shapes[0]} and {shapes[-1]}, and cannot be stacked:"
        " expected one shape for all; pad or crop them"
    )
