"""Per-example gradients of a block as rows, and the products of two blocks of rows.

A row is kept in the cheapest exact form. A linear layer that sees one position keeps its two
factors, A (its input) and D (the gradient of its output): g_i·g_j = (A_i·A_j + 1)(D_i·D_j), the 1
for the bias; its gradient, d·p numbers, is never made. All other parameters are laid side by side
in one dense row, so that one large product serves them all.

Axis letters: N rows, M columns, P parameters in dense form, d inputs, p outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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
    bias: bool

    def squared_norms(self) -> Tensor:
        """|g|² of each row, (N,) float64."""
        A2 = torch.linalg.vector_norm(self.A_Nd, dim=1, dtype=torch.float64).square()
        D2 = torch.linalg.vector_norm(self.D_Np, dim=1, dtype=torch.float64).square()
        return (A2 + self.bias) * D2

    def scaled(self, factor_N: Tensor) -> Factors:
        """Multiply each row by its factor."""
        return replace(self, D_Np=self.D_Np * factor_N.unsqueeze(1).to(self.D_Np.dtype))

    def gram(self, other: Factors) -> Tensor:
        """g_i·g_j for every pair, (N, M)."""
        product = self.A_Nd @ other.A_Nd.T
        if self.bias:
            product += 1
        return product.mul_(self.D_Np @ other.D_Np.T)

    def nbytes(self) -> int:
        """Bytes held."""
        return self.A_Nd.nbytes + self.D_Np.nbytes


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
            tuple(Factors(f.A_Nd[rows], f.D_Np[rows], f.bias) for f in self.factors),
            self.dense_NP[rows],
            self.norm[rows],
            self.loss[rows],
            self.correct[rows],
        )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, always in the same order."""
        for f in self.factors:
            yield f.A_Nd
            yield f.D_Np
        yield from (self.dense_NP, self.norm, self.loss, self.correct)

    def nbytes(self) -> int:
        """Bytes held by the gradients."""
        return sum(f.nbytes() for f in self.factors) + self.dense_NP.nbytes


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
    square = torch.linalg.vector_norm(dense_NP, dim=1, dtype=torch.float64).square()
    for f in factors:
        square = square + f.squared_norms()
    length = square.sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    return Rows(
        tuple(_cast(f.scaled(inverse), dtype) for f in factors),
        (dense_NP * inverse.unsqueeze(1).to(dense_NP.dtype)).to(dtype),
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
        tuple(Factors(empty(f.A_Nd), empty(f.D_Np), f.bias) for f in block.factors),
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


def _cast(f: Factors, dtype: torch.dtype) -> Factors:
    return Factors(f.A_Nd.to(dtype), f.D_Np.to(dtype), f.bias)
