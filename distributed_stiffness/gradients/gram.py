"""Per-example gradients of a block as rows, and the products of two blocks of rows.

A row is kept in the cheapest exact form. A linear layer that sees one position keeps its two
factors, A (its input) and D (the gradient of its output): g_i·g_j = (A_i·A_j + b_i b_j)(D_i·D_j)
with b the input of the bias, which is 1; its gradient, d·p numbers, is never made. All other
parameters are laid side by side in one dense row, so that one large product serves them all.

Axis letters: N rows, M columns, P parameters in dense form, d inputs, p outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Partial sums of this many products are added up one after the other: a float32 sum over millions
# of products loses digits that a sum of short sums keeps (3e-7 against 1.5e-6 at P = 270,000).
FOLD = 4096


@dataclass(frozen=True)
class Factors:
    """The gradients of one linear layer in factored form."""

    A_Nd: Tensor
    D_Np: Tensor
    b_N: Tensor  # 0 where the bias is not in play

    def input_norms(self) -> Tensor:
        """Return (|A|² + b²)^½ of each row, (N,) float64."""
        return torch.hypot(_norms(self.A_Nd), self.b_N.double())

    def output_norms(self) -> Tensor:
        """Return |D| of each row, (N,) float64."""
        return _norms(self.D_Np)

    def scaled(self, factor_N: Tensor, input_norm_N: Tensor) -> Factors:
        """Multiply each row by its factor, and bring its inputs near norm 1.

        Else a product of two A's would overflow or underflow where activations are very large, as
        in a network that diverges, or very small. A power of two is taken: it rounds nothing.
        """
        size = torch.where(input_norm_N > 0, input_norm_N, 1.0)
        power_N = torch.exp2(-torch.log2(size).round().clamp(-126, 126))
        return Factors(
            _times(self.A_Nd, power_N),
            _times(self.D_Np, factor_N / power_N),
            self.b_N * power_N.to(self.b_N.dtype),
        )

    def gram(self, other: Factors) -> Tensor:
        """g_i·g_j for every pair, (N, M)."""
        product = (self.A_Nd @ other.A_Nd.T).addr_(self.b_N, other.b_N)
        return product.mul_(self.D_Np @ other.D_Np.T)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, D and b."""
        return self.A_Nd, self.D_Np, self.b_N

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Apply `function` to A, D and b."""
        return Factors(*map(function, self.tensors()))


@dataclass(frozen=True)
class Rows:
    """The gradients of a block of examples, each scaled to unit norm, and what was scaled away."""

    factors: tuple[Factors, ...]
    dense_NP: Tensor  # (N, 0) where everything is factored
    norm: Tensor  # (N,) float64, true scale; 0 where the gradient is 0
    loss: Tensor  # (N,) float64
    correct: Tensor  # (N,) bool

    def __len__(self) -> int:
        return len(self.norm)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(
            tuple(f.map(lambda t: t[rows]) for f in self.factors),
            self.dense_NP[rows],
            self.norm[rows],
            self.loss[rows],
            self.correct[rows],
        )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, always in the same order."""
        for f in self.factors:
            yield from f.tensors()
        yield from (self.dense_NP, self.norm, self.loss, self.correct)

    def nbytes(self) -> int:
        """Bytes held by the gradients."""
        factors = sum(t.nbytes for f in self.factors for t in f.tensors())
        return factors + self.dense_NP.nbytes


def unit_rows(
    factors: Sequence[Factors],
    dense_NP: Tensor,
    *,
    scale: Tensor,
    loss: Tensor,
    correct: Tensor,
    dtype: torch.dtype,
) -> Rows:
    """Scale each row to unit norm and cast it to `dtype`; `scale` (N,) goes into the norm."""
    square = _norms(dense_NP).square()
    input_norms = [f.input_norms() for f in factors]
    for f, size in zip(factors, input_norms, strict=True):
        square = square + (size * f.output_norms()).square()
    length = square.sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    scaled = [f.scaled(inverse, size) for f, size in zip(factors, input_norms, strict=True)]
    return Rows(
        tuple(f.map(lambda t: t.to(dtype)) for f in scaled),
        _times(dense_NP, inverse).to(dtype),
        length * scale,
        loss,
        correct,
    )


def concatenate(blocks: Iterable[Rows], n: int) -> Rows:
    """Put blocks, n rows in all, one below the other; holds one block beside the result."""
    filled, start = None, 0
    for block in blocks:
        filled = filled or _empty_like(block, n)
        rows = slice(start, start := start + len(block))
        for source, target in zip(block.tensors(), filled.tensors(), strict=True):
            target[rows] = source
    if filled is None or start != n:
        raise AssertionError(f"{start} rows came, {n} were announced")
    return filled


def _empty_like(block: Rows, n: int) -> Rows:
    def empty(t: Tensor) -> Tensor:
        return torch.empty(n, *t.shape[1:], dtype=t.dtype, device=t.device)

    return Rows(
        tuple(f.map(empty) for f in block.factors),
        empty(block.dense_NP),
        empty(block.norm),
        empty(block.loss),
        empty(block.correct),
    )


def cosine(rows: Rows, columns: Rows) -> Tensor:
    """cos(g_i, g_j) for every pair, (N, M), within [−1, 1]; 0 where a gradient is 0."""
    total = folded_product(rows.dense_NP, columns.dense_NP)
    for f, g in zip(rows.factors, columns.factors, strict=True):
        total += f.gram(g)
    return total.clamp_(-1.0, 1.0)


def folded_product(X_NP: Tensor, Y_MP: Tensor) -> Tensor:
    """X Yᵀ as a sum of products over `FOLD` elements at a time, (N, M)."""
    total = torch.zeros(len(X_NP), len(Y_MP), dtype=X_NP.dtype, device=X_NP.device)
    for start in range(0, X_NP.shape[1], FOLD):
        total += X_NP[:, start : start + FOLD] @ Y_MP[:, start : start + FOLD].T
    return total


def _norms(X_NP: Tensor) -> Tensor:
    """Return the norm of each row, (N,) float64."""
    norms: Tensor = torch.linalg.vector_norm(X_NP, dim=1, dtype=torch.float64)
    return norms


def _times(X_NP: Tensor, factor_N: Tensor) -> Tensor:
    """Multiply each row by its factor, which is cut off at the largest number of X's dtype."""
    factor_N = factor_N.clamp(max=torch.finfo(X_NP.dtype).max)
    return X_NP * factor_N.unsqueeze(1).to(X_NP.dtype)
