"""In which precision gradients and their products are computed, by name.

| name | forward and backward | rows | products of rows |
|---|---|---|---|
| float32 | float32 | float32 | float32, folded over at most 8,192 elements |
| float64 | float64 | float32 | the same |
| bf16 | float32 | bfloat16 | bfloat16, summed in float32 |
| bf16x3 | float32 | float32 | each as two bfloat16, three products, summed in float32; CUDA |
| tf32 | float32 | float32 | TF32, summed in float32; CUDA |

The loss head is float64 in all (loss_head.py). What each loses is measured for every matrix
(error_bound.py), and written down in docs/design/0002-numbers.md.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed_stiffness.errors import StudyError

# Partial sums of so many products are added up one after the other: a quarter of a row, which
# keeps the most digits, within what a product needs to run at its full rate.
_SHORTEST_FOLD, _FOLDS, _LONGEST_FOLD = 64, 4, 8192
# oneDNN adds up to 2,048 products before it looks at memory: half of that keeps MKL's digits.
_LONGEST_FOLD_ONEDNN = 1024
# bfloat16 products need longer sums to run at their full rate, and lose nothing to them.
_FOLD_BF16 = {"cpu": 2**14, "cuda": 2**16}


@dataclass(frozen=True)
class Precision:
    """A precision mode."""

    name: str
    network: torch.dtype  # forward and backward
    rows: torch.dtype  # unit rows
    cuda_only: bool = False

    def fold(self, rows: Tensor) -> int:
        """Return over how many elements one product may run."""
        if self.name == "bf16":
            return _FOLD_BF16["cuda" if rows.is_cuda else "cpu"]
        longest = _LONGEST_FOLD if _onednn_for(rows) is None else _LONGEST_FOLD_ONEDNN
        return min(longest, max(_SHORTEST_FOLD, rows.shape[1] // _FOLDS))

    def operand(self, X_NP: Tensor) -> Tensor:
        """Lay out rows as `product` likes them, once for many products."""
        return X_NP if _onednn_for(X_NP) is None else X_NP.contiguous()

    def product(self, X_NP: Tensor, Y_MP: Tensor) -> Tensor:
        """X Yᵀ, (N, M), float32 whatever the operands are."""
        if self.name == "bf16x3":
            high_x, low_x = _two_parts(X_NP)
            high_y, low_y = _two_parts(Y_MP)
            product = _bf16_product(high_x, high_y)
            product += _bf16_product(high_x, low_y)
            product += _bf16_product(low_x, high_y)
            return product
        if X_NP.dtype == torch.bfloat16:
            return _bf16_product(X_NP, Y_MP)
        if self.name == "tf32":
            with _switched(torch.backends.cuda.matmul, "allow_tf32", True):
                return X_NP @ Y_MP.T
        return product_of_rows(X_NP, Y_MP)


FLOAT32 = Precision("float32", torch.float32, torch.float32)
_MODES = {
    mode.name: mode
    for mode in (
        FLOAT32,
        Precision("float64", torch.float64, torch.float32),
        Precision("bf16", torch.float32, torch.bfloat16),
        Precision("bf16x3", torch.float32, torch.float32, cuda_only=True),
        Precision("tf32", torch.float32, torch.float32, cuda_only=True),
    )
}
PRECISIONS = tuple(_MODES)
_CPU_PRODUCTS: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (not in the stubs)


def precision_mode(name: str, device: torch.device | str | None = None) -> Precision:
    """Look a mode up.

    Raises:
        StudyError: there is no mode of that name, or not on that device.
    """
    if name not in _MODES:
        raise StudyError(f"unknown precision {name!r}: expected one of {', '.join(PRECISIONS)}")
    mode = _MODES[name]
    if device is not None and mode.cuda_only and torch.device(device).type != "cuda":
        others = ", ".join(m.name for m in _MODES.values() if not m.cuda_only)
        raise StudyError(
            f"precision {name!r} needs a CUDA device, the network is on {device}: move it there, or"
            f" take one of {others}"
        )
    return mode


def product_of_rows(X_NP: Tensor, Y_MP: Tensor) -> Tensor:
    """X Yᵀ, (N, M): of float32 rows by the fastest routine that torch has on this device."""
    by_onednn = _onednn_for(X_NP)
    if by_onednn is None or not X_NP.numel() or not Y_MP.numel():
        return X_NP @ Y_MP.T
    return by_onednn(X_NP.contiguous(), Y_MP.contiguous())


def _onednn_for(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    is_for_it = rows.device.type == "cpu" and rows.dtype == torch.float32
    return onednn_product() if is_for_it else None


@functools.cache
def onednn_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return oneDNN's X Yᵀ of contiguous float32 rows where torch's own product is much slower.

    torch multiplies by MKL, which uses half of an AVX-512 unit of a processor that is not Intel's:
    205 GFLOP/s against 450 on two cores of an AMD Zen 5. torch compiles linear layers to this
    routine of oneDNN; there is no public name for it. A rule by processor, not by a clock: every
    replica of a kind of node makes the same bits.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_rival = "Intel" not in capabilities.get("cpu_name", "Intel")
    if not (is_rival and capabilities.get("avx512_f")):
        return None

    def product(X_NP: Tensor, Y_MP: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(X_NP, Y_MP, None, "none", [], "")
        return found

    few = torch.arange(6.0).reshape(2, 3)
    try:
        is_right = torch.equal(product(few, few), few @ few.T)
    except Exception:  # built without oneDNN, or another version of torch: whatever it raises
        return None
    return product if is_right else None


def _two_parts(X: Tensor) -> tuple[Tensor, Tensor]:
    """X as a sum of two bfloat16, to 16 bits of its mantissa."""
    high = X.bfloat16()
    return high, (X - high).bfloat16()


def _bf16_product(X_NP: Tensor, Y_MP: Tensor) -> Tensor:
    if X_NP.is_cuda:
        product: Tensor = torch.mm(X_NP, Y_MP.T, out_dtype=torch.float32)
        return product
    # A CPU's product of bfloat16 tensors rounds its sums to bfloat16. float32 tensors that hold
    # bfloat16 numbers go through the same units without a loss, and the sums stay float32.
    with _switched(_CPU_PRODUCTS, "fp32_precision", "bf16"):
        return X_NP.float() @ Y_MP.float().T


@contextlib.contextmanager
def _switched(backend: Any, switch: str, value: Any) -> Iterator[None]:
    """Set a switch of a torch backend for a while."""
    before = getattr(backend, switch)
    setattr(backend, switch, value)
    try:
        yield
    finally:
        setattr(backend, switch, before)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 off: torch has it on for convolutions, with 10-bit mantissas."""
    with (
        _switched(torch.backends.cudnn, "allow_tf32", False),
        _switched(torch.backends.cuda.matmul, "allow_tf32", False),
    ):
        yield
