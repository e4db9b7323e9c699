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
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
        longest = _LONGEST_FOLD_ONEDNN if _is_for_onednn(rows) else _LONGEST_FOLD
        return min(longest, max(_SHORTEST_FOLD, rows.shape[1] // _FOLDS))

    def product(self, X_NP: Tensor, Y_MP: Tensor) -> Tensor:
        """X Yᵀ, (N, M), float32 whatever the operands are; within `fast_float32`."""
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
            with _switched(_CUDA_PRODUCTS, "tf32"):
                return X_NP @ Y_MP.T
        return X_NP @ Y_MP.T

    def operand(self, rows: Tensor) -> Tensor:
        """Return rows as `add_product` takes them: cast once for all their products."""
        return rows.float() if self._is_bf16_on_cpu(rows) else rows

    def add_product(self, total: Tensor, X_NP: Tensor, Y_MP: Tensor) -> None:
        """Add X Yᵀ of two operands to (N, M), float32; within `fast_float32`."""
        if self._is_bf16_on_cpu(X_NP):
            total += _bf16_product(X_NP, Y_MP)
        elif _is_for_onednn(X_NP):
            total.addmm_(X_NP, Y_MP.T)  # MKL would add its own short sums one by one
        else:
            total += self.product(X_NP, Y_MP)

    @property
    def of_factors(self) -> Precision:
        """The mode in which factors are multiplied, which stay float32 where rows are bfloat16."""
        return FLOAT32 if self.name == "bf16" else self

    def _is_bf16_on_cpu(self, rows: Tensor) -> bool:
        return self.name == "bf16" and not rows.is_cuda


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
# Where torch keeps a precision of float32: backend and operation. The older switches (`allow_tf32`,
# `set_float32_matmul_precision`) write the same places, but cannot be read once a newer one is set.
_CPU_PRODUCTS, _CPU_CONVOLUTIONS, _CPU_RECURRENT = (
    ("mkldnn", operation) for operation in ("matmul", "conv", "rnn")
)
_CUDA_PRODUCTS = ("cuda", "matmul")
_CUDA_CONVOLUTIONS, _CUDA_RECURRENT = ("cuda", "conv"), ("cuda", "rnn")
_TRIAL = threading.Lock()  # a trial changes a setting of the process for a moment


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
    """X Yᵀ, (N, M), by the fastest routine that torch has on this device."""
    with fast_float32():
        return X_NP @ Y_MP.T


def _is_for_onednn(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and onednn_multiplies()


@functools.cache
def onednn_multiplies() -> bool:
    """Whether oneDNN multiplies gradients on this CPU, as torch's own routine is much slower.

    torch multiplies by MKL, which uses half of an AVX-512 unit of a processor that is not Intel's:
    205 GFLOP/s against 450 on two cores of an AMD Zen 5. It goes to oneDNN where that has leave to
    round the operands to bfloat16 (`fp32_precision`); what cannot do so by AMX does not, and
    multiplies in full. A rule by processor, not by a clock: every replica of a kind of node makes
    the same bits.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_rival = "Intel" not in capabilities.get("cpu_name", "Intel")
    has_amx = any(there for name, there in capabilities.items() if name.startswith("amx"))
    is_faster = is_rival and bool(capabilities.get("avx512_f")) and not has_amx
    return is_faster and leave_is_not_taken()


def leave_is_not_taken() -> bool:
    """Whether oneDNN multiplies float32 in full also where it need not.

    Tried on whole numbers of 9 bits, of which bfloat16 has 8, and whose sums float32 holds exactly.
    """
    whole = torch.arange(4096, dtype=torch.float32, device="cpu")
    numbers = (7 * whole % 509).reshape(64, 64)
    with _TRIAL, _switched(_CPU_PRODUCTS, "bf16"):
        return torch.equal((numbers @ numbers).double(), numbers.double() @ numbers.double())


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
    with _switched(_CPU_PRODUCTS, "bf16"):
        return X_NP.float() @ Y_MP.float().T


@contextlib.contextmanager
def _switched(place: tuple[str, str], precision: str) -> Iterator[None]:
    """Set the precision of float32 in one place for a while."""
    before = torch._C._get_fp32_precision_getter(*place)
    if before == precision:  # to write it would part it from the switch that it follows
        yield
        return
    torch._C._set_fp32_precision_setter(*place, precision)
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter(*place, before)


@dataclass(eq=False)
class _Shared:
    """Settings of the process that any number of threads may want at a time.

    The first that comes sets them, the last that goes restores what was.
    """

    wanted: Callable[[], Sequence[tuple[tuple[str, str], str]]]  # place, precision
    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    settings: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self._set()
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.settings.close()

    def _set(self) -> None:
        with contextlib.ExitStack() as settings:
            for setting in self.wanted():
                settings.enter_context(_switched(*setting))
            self.settings = settings.pop_all()  # all of them, or none


_FULL = _Shared(
    lambda: [
        (place, "ieee")
        for place in (
            _CUDA_PRODUCTS,
            _CUDA_CONVOLUTIONS,
            _CUDA_RECURRENT,
            _CPU_PRODUCTS,
            _CPU_CONVOLUTIONS,
            _CPU_RECURRENT,
        )
    ]
)
_ONEDNN = _Shared(lambda: [(_CPU_PRODUCTS, "bf16")] if onednn_multiplies() else [])


def full_float32() -> contextlib.AbstractContextManager[None]:
    """Multiply float32 numbers in full, whatever is set.

    torch has TF32 on for convolutions on CUDA, with 10-bit mantissas, and a user may have allowed
    bfloat16 on a CPU.
    """
    return _FULL.entered()


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Multiply float32 numbers in full, by the fastest routine that does.

    For what is made of a pass, not for the pass: a network's own code is not run inside.
    """
    with _FULL.entered(), _ONEDNN.entered():
        yield
