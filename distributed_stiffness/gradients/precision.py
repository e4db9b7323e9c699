"""In which precision gradients and their products are computed, by name.

| name | forward and backward | Gram |
|---|---|---|
| float32 | float32 | float32 over unit rows, folded over blocks of 4,096 elements |
| float64 | float64 | the same |

The loss head is float64 in both (loss_head.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from distributed_stiffness.errors import StudyError


@dataclass(frozen=True)
class Precision:
    """A precision mode."""

    name: str
    network: torch.dtype  # forward and backward
    rows: torch.dtype  # unit rows and their products


_MODES = {
    "float32": Precision("float32", torch.float32, torch.float32),
    "float64": Precision("float64", torch.float64, torch.float32),
}
PRECISIONS = tuple(_MODES)


def precision_mode(name: str) -> Precision:
    """Look a mode up.

    Raises:
        StudyError: there is no mode of that name.
    """
    if name not in _MODES:
        raise StudyError(f"unknown precision {name!r}: expected one of {', '.join(PRECISIONS)}")
    return _MODES[name]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 off: torch has it on for convolutions, with 10-bit mantissas."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
