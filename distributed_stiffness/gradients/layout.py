"""Whose each row is: where the examples stand in the tensors of one use of a parameter.

Networks carry examples first (N, T, d) or second (T, N, d), fold them with positions into one
dimension, take padding out, sort them, send them to experts. So it is not guessed from shapes: the
gradient that an example sends back, multiplied by a number that is the example's own, arrives so
multiplied at the example's rows and at no others. Powers of two are taken, which round nothing.

Axis letters: N examples, R rows of a use, T rows of an example, F numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# So many different powers of two, about 1, are told apart in a pass.
_DIGITS = 64
# A row must be its multiple to this, relative to its largest number; and is of no account where it
# is so much smaller than the largest of all rows.
_TOLERANCE, _NEGLIGIBLE = 1e-3, 1e-6


@dataclass(frozen=True)
class Layout:
    """How the rows of a use are those of N examples.

    Either row (o, i, t) of (outer, N, inner) is of example i; or `places` says it.
    """

    n: int
    outer: int = 1
    inner: int = 1
    places_NT: Tensor | None = None  # rows of each example; R: none

    @property
    def examples_outside(self) -> bool:
        """Whether the examples vary slowest."""
        return self.places_NT is None and self.outer == 1

    @property
    def rows(self) -> int:
        """T: the most that an example has."""
        return self.outer * self.inner if self.places_NT is None else self.places_NT.shape[1]

    def group(self, X_R: Tensor) -> Tensor:
        """Return (N, T, ...); rows that an example does not have are 0."""
        rest = X_R.shape[1:]
        if self.places_NT is not None:
            return torch.cat([X_R, X_R.new_zeros(1, *rest)])[self.places_NT]
        if self.outer == 1:
            return X_R.reshape(self.n, self.inner, *rest)
        X = X_R.reshape(self.outer, self.n, self.inner, *rest).movedim(1, 0)
        return X.flatten(1, 2)


@dataclass(frozen=True)
class Owners:
    """Whose the rows of a use are."""

    of_R: Tensor  # (R,) int64 on the CPU; −1: a row without a gradient, which is nobody's
    is_mixed: bool  # a row is of several examples: they depend on each other

    def layout(self, n: int) -> tuple[Layout, bool]:
        """Return the layout, and whether it is the only regular one that the rows allow."""
        rows = len(self.of_R)
        if n == 1:
            return Layout(1, 1, rows), True
        if rows and rows % n == 0:
            fitting = _divisors(rows // n)
            known = (self.of_R >= 0).nonzero().flatten()
            for few in (known[:: max(1, len(known) // 4096)], known):  # most fail at once
                fitting = [k for k in fitting if torch.equal(self.of_R[few], few // k % n)]
            if fitting:  # what rows without a gradient would add is 0 in all of them
                return Layout(n, rows // n // fitting[-1], fitting[-1]), len(fitting) == 1
        return Layout(n, places_NT=self._places(n)), False

    def _places(self, n: int) -> Tensor:
        known = (self.of_R >= 0).nonzero().flatten()
        order = self.of_R[known].argsort(stable=True)
        rows, owners = known[order], self.of_R[known][order]
        counts = torch.bincount(owners, minlength=n)
        first = counts.cumsum(0) - counts
        most = max(1, int(counts.max()) if n else 1)
        places = torch.full((n, most), len(self.of_R), device="cpu")
        places[owners, torch.arange(len(rows), device="cpu") - first[owners]] = rows
        return places


def multiples(n: int) -> list[Tensor]:
    """Return each example's numbers, pass by pass: (N,) float64, powers of two."""
    found, left = [], torch.arange(n, device="cpu")
    while True:
        found.append(torch.exp2((left % _DIGITS - _DIGITS // 2).double()))
        left = left // _DIGITS
        if not left.any():
            return found


def find_owners(grad_RF: Tensor, multiplied: Sequence[Tensor], n: int) -> Owners:
    """Tell whose each row is.

    Args:
        grad_RF: gradients of the rows, (R, F).
        multiplied: the same, with each example's part times its number in `multiples`.
        n: examples.
    """
    if not grad_RF.numel():  # no rows, or rows of no numbers
        return Owners(torch.full((len(grad_RF),), -1, device="cpu"), is_mixed=False)
    size = grad_RF.abs().amax(1)
    unit = grad_RF / torch.where(size > 0, size, 1.0).unsqueeze(1)
    owner = torch.zeros(len(size), dtype=torch.int64, device=size.device)
    is_good, square = size > 0, unit.square().sum(1).clamp(min=1e-30)
    for place, other in enumerate(multiplied):
        scaled = other / torch.where(size > 0, size, 1.0).unsqueeze(1)
        share = ((scaled * unit).sum(1) / square).clamp(min=1e-30)
        power = share.log2().round()
        times = torch.exp2(power)
        is_good &= (scaled - times.unsqueeze(1) * unit).abs().amax(1) <= _TOLERANCE * times
        digit = power.long() + _DIGITS // 2
        is_good &= (digit >= 0) & (digit < _DIGITS)
        owner += digit * _DIGITS**place
    is_good &= owner < n
    largest = float(size.max())
    is_mixed = bool((~is_good & (size > _NEGLIGIBLE * largest)).any())
    return Owners(torch.where(is_good, owner, -1).cpu(), is_mixed)


def _divisors(n: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})
