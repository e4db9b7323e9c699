"""Per-example gradients of a block as rows, and the products of two blocks of rows.

A row is kept in the cheapest exact form. A weight that meets few positions T keeps its factors, A
(the layer's inputs) and D (the gradients of its outputs): g_i·g_j = Σ_ts (A_it·A_js + b_i b_j)
(D_it·D_js) with b the input of the bias, which is 1; its gradient, d·p numbers, is never made. All
other parameters are laid side by side in one dense row, so that one large product serves them all.

Axis letters: N rows, M columns, P parameters in dense form, T positions, d inputs, p outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_stiffness.gradients.precision import FLOAT32, Precision, fast_float32
from distributed_stiffness.tiling import pieces

# Products of positions with positions are made for so many pairs that they stay in the cache.
_PRODUCTS_IN_CACHE = {"cpu": 2**20, "cuda": 2**26}
# A block of up to four strips, each of so many columns, is multiplied with itself strip by strip:
# what is below their squares on the diagonal is not made. A larger one is halved.
_STRIPS = 4
_STRIP, _STRIP_CUDA, _STRIP_OF_FACTORS = 128, 1024, 512
# A product of factors runs over so many numbers at a time: of a picture's even background all terms
# are alike, and a long sum of such rounds them all the same way (docs/design/0002-numbers.md).
_FOLD_OF_FACTORS = 256
# Short sums that are added up before they meet the total.
_SUMS = 64
# Rows within this size (and its inverse) need no scaling before they are multiplied.
_SAFE = 1e10


@dataclass(frozen=True)
class Factors:
    """The gradients of one weight (and its bias) in factored form."""

    A_NTd: Tensor
    D_NTp: Tensor  # or indices (N, T): then each D_t is the unit vector of that index
    b_NT: Tensor  # input of the bias; 0 where that is not in play

    @property
    def n_positions(self) -> int:
        """T."""
        return self.A_NTd.shape[1]

    def input_norms(self) -> Tensor:
        """Return (Σ_t |A_t|² + b_t²)^½ of each row, (N,) float64."""
        return torch.hypot(_norms(self.A_NTd), _norms(self.b_NT))

    def norms(self) -> Tensor:
        """Return the norm of each row's gradient, (N,) float64."""
        if self.n_positions == 1 and self.D_NTp.dim() == 3:
            return self.input_norms() * _norms(self.D_NTp)
        # The largest of each is taken out: squares of products would leave float64's range.
        A, D = self.A_NTd.double(), self.D_NTp
        A = torch.cat([A, self.b_NT.double().unsqueeze(2)], 2)
        size_A = _largest(A)
        A = A / _or_one(size_A)[:, None, None]
        inputs = torch.bmm(A, A.transpose(1, 2))
        if D.dim() == 2:
            outputs, size_D = (D.unsqueeze(2) == D.unsqueeze(1)).double(), torch.ones_like(size_A)
        else:
            size_D = _largest(D.double())
            D = D.double() / _or_one(size_D)[:, None, None]
            outputs = torch.bmm(D, D.transpose(1, 2))
        square = (inputs * outputs).sum((1, 2)).clamp(min=0)
        return square.sqrt() * size_A * size_D

    def scaled(self, factor_N: Tensor, input_norm_N: Tensor) -> Factors:
        """Multiply each row by its factor, and bring its inputs near norm 1.

        Else a product of two A's would overflow or underflow where activations are very large, as
        in a network that diverges, or very small. A power of two is taken: it rounds nothing.
        """
        if self.D_NTp.dim() == 2:
            return Factors(_times(self.A_NTd, factor_N), self.D_NTp, self.b_NT)
        size = _or_one(input_norm_N)
        power_N = torch.exp2(-torch.log2(size).round().clamp(-126, 126))
        return Factors(
            _times(self.A_NTd, power_N),
            _times(self.D_NTp, factor_N / power_N),
            _times(self.b_NT, power_N),
        )

    def gram(self, other: Factors, precision: Precision = FLOAT32) -> Tensor:
        """g_i·g_j for every pair, (N, M) float32."""
        T, S, m = self.n_positions, other.n_positions, len(other.b_NT)
        if T == S == 1:
            return self._products(other, precision)
        result = torch.empty(len(self.b_NT), m, device=self.b_NT.device)
        rows = max(1, _PRODUCTS_IN_CACHE[_kind(self.b_NT)] // (T * S * m))
        for start in range(0, len(result), rows):
            part = slice(start, start + rows)
            products = self.take(part)._products(other, precision)
            result[part] = products.view(-1, T, m, S).sum(3).sum(1)
        return result

    def _products(self, other: Factors, precision: Precision) -> Tensor:
        """(A_it·A_js + b_i b_j)(D_it·D_js) for every pair of positions, (N·T, M·S)."""
        inputs = _product_of_factors(self.A_NTd, other.A_NTd, precision)
        inputs.addr_(self.b_NT.flatten(), other.b_NT.flatten())
        if self.D_NTp.dim() == 2:
            same = self.D_NTp.flatten().unsqueeze(1) == other.D_NTp.flatten()
            return inputs.mul_(same)
        return inputs.mul_(_product_of_factors(self.D_NTp, other.D_NTp, precision))

    def centred(self) -> Factors:
        """Return the same gradient with the mean input as a position of its own.

        Σ_t D_t ⊗ A_t = Σ_t D_t ⊗ (A_t − Ā) + (Σ_t D_t) ⊗ Ā. Where inputs are alike and Σ_t D_t is
        about 0, as for the keys of attention, the terms on the left cancel, and a product of two
        such sums would lose twice the digits.
        """
        mean = self.A_NTd.mean(1, keepdim=True)
        return Factors(
            torch.cat([self.A_NTd - mean, mean], 1),
            torch.cat([self.D_NTp, self.D_NTp.sum(1, keepdim=True)], 1),
            torch.cat([torch.zeros_like(self.b_NT), self.b_NT[:, :1]], 1),
        )

    def padded(self, n_positions: int) -> Factors:
        """Return the same gradients with positions of zeros behind the others."""
        more = n_positions - self.n_positions
        if more <= 0:
            return self
        return self.map(lambda t: torch.cat([t, t.new_zeros(len(t), more, *t.shape[2:])], 1))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, D and b."""
        return self.A_NTd, self.D_NTp, self.b_NT

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Apply `function` to A, D and b."""
        return Factors(*map(function, self.tensors()))

    def take(self, rows: slice) -> Factors:
        """Select rows."""
        return self.map(lambda t: t[rows])

    def to(self, dtype: torch.dtype) -> Factors:
        """Cast A, b, and D unless it holds indices."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _product_of_factors(X_NTd: Tensor, Y_MSd: Tensor, precision: Precision) -> Tensor:
    """Return the products of all positions with all positions, (N·T, M·S) float32."""
    X, Y, precision = X_NTd.flatten(0, 1), Y_MSd.flatten(0, 1), precision.of_factors
    first, *others = pieces(slice(0, max(1, X.shape[1])), _FOLD_OF_FACTORS)
    total = precision.product(X[:, first], Y[:, first])
    for part in others:
        precision.add_product(total, X[:, part], Y[:, part])
    return total


@dataclass(frozen=True)
class Rows:
    """The gradients of a block of examples, each of unit norm, and what was scaled away.

    The factors have unit norm together with `dense_scale_N` times the dense part: to scale a
    product is cheaper than to scale the rows.
    """

    factors: tuple[Factors, ...]
    dense_NP: Tensor  # (N, 0) where everything is factored
    dense_scale_N: Tensor  # float32
    norm: Tensor  # (N,) float64, true scale; 0 where the gradient is 0
    loss: Tensor  # (N,) float64
    correct: Tensor  # (N,) bool

    def __len__(self) -> int:
        return len(self.norm)

    def __getitem__(self, rows: slice) -> Rows:
        return self.map(lambda t: t[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Apply `function` to every tensor."""
        return Rows(
            tuple(f.map(function) for f in self.factors),
            *map(function, (self.dense_NP, self.dense_scale_N)),
            *map(function, (self.norm, self.loss, self.correct)),
        )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, always in the same order."""
        for f in self.factors:
            yield from f.tensors()
        yield from (self.dense_NP, self.dense_scale_N, self.norm, self.loss, self.correct)

    def nbytes(self) -> int:
        """Bytes held by the gradients."""
        factors = sum(t.nbytes for f in self.factors for t in f.tensors())
        return factors + self.dense_NP.nbytes

    def empty(self, n: int) -> Rows:
        """Return room for n rows of this kind."""
        return self.map(lambda t: torch.empty(n, *t.shape[1:], dtype=t.dtype, device=t.device))

    def is_like(self, other: Rows) -> bool:
        """Whether rows are of one form, but for the number of positions."""
        return (self.dense_NP.shape[1], self.dense_NP.dtype, len(self.factors)) == (
            other.dense_NP.shape[1],
            other.dense_NP.dtype,
            len(other.factors),
        ) and all(
            f.A_NTd.shape[2] == g.A_NTd.shape[2]
            for f, g in zip(self.factors, other.factors, strict=True)
        )

    def with_room_for(self, other: Rows) -> Rows:
        """Return these rows with as many positions as others have: sequences differ in length."""
        positions = [f.n_positions for f in other.factors]
        if all(f.n_positions >= n for f, n in zip(self.factors, positions, strict=True)):
            return self
        padded = [f.padded(n) for f, n in zip(self.factors, positions, strict=True)]
        return replace(self, factors=tuple(padded))

    def put(self, places: slice | Tensor, other: Rows) -> None:
        """Write other rows at some places, but for the dense part where it is there already."""
        theirs = other
        if self.factors:
            padded = [
                g.padded(f.n_positions) for f, g in zip(self.factors, other.factors, strict=True)
            ]
            theirs = replace(other, factors=tuple(padded))
        for target, source in zip(self.tensors(), theirs.tensors(), strict=True):
            if isinstance(places, Tensor) or target[places].data_ptr() != source.data_ptr():
                target[places] = source


def unit_rows(
    factors: Sequence[Factors],
    dense_NP: Tensor,
    dense_square_N: Tensor,
    *,
    scale: Tensor,
    loss: Tensor,
    correct: Tensor,
    precision: Precision,
    into: Tensor | None = None,
) -> Rows:
    """Scale each row to unit norm; `scale` (N,) goes into the norm.

    Args:
        factors: of each weight in factored form.
        dense_NP: the other parameters' gradients, side by side.
        dense_square_N: |dense row|², float64.
        scale: by which each gradient was divided, (N,) float64.
        loss: (N,).
        correct: (N,).
        precision: of the rows.
        into: where the dense rows go; `dense_NP` itself where no copy is needed.
    """
    factor_norms = [f.norms() for f in factors]
    square = dense_square_N.clone()
    for norm in factor_norms:
        square += norm.square()
    length = square.sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    dense_NP, dense_scale = _dense(dense_NP, inverse, precision, into)
    scaled = [f.scaled(inverse, f.input_norms()) for f in factors]
    return Rows(
        # Factors are few numbers and stay float32: two roundings would multiply.
        tuple(f.to(torch.float32) for f in scaled),
        dense_NP,
        dense_scale,
        length * scale,
        loss,
        correct,
    )


def _dense(
    dense_NP: Tensor, inverse: Tensor, precision: Precision, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dense rows as they are held and their scales."""
    sizes = inverse[inverse > 0]
    is_safe = not len(sizes) or (float(sizes.min()) > 1 / _SAFE and float(sizes.max()) < _SAFE)
    if dense_NP.dtype == precision.rows and is_safe:
        return dense_NP, inverse.float()
    unit = _times(dense_NP, inverse).to(precision.rows)
    if precision.rows == torch.bfloat16:
        # Rounded rows are not of unit norm: what each is short of it goes into its scale, as far
        # as it is the dense part's.
        length = _norms(_times(dense_NP, inverse))
        scale = length / _or_one(_norms(unit.float()))
    else:
        scale = torch.ones_like(inverse)
    return (unit if into is None else into.copy_(unit)), scale.float()


def collect(
    make: Callable[[slice, Sequence[Rows] | None], list[Rows]],
    rows: slice,
    size: int,
    into: Sequence[Rows] | None = None,
    *,
    finish: Callable[[list[Rows]], None] | None = None,
    finished_together: int = 1,
) -> list[Rows]:
    """Make rows batch by batch, each where it belongs in the whole.

    Args:
        make: makes the rows of some examples, one block for each recipe; the dense part into given
            room, if any.
        rows: the examples.
        size: examples of a batch.
        into: room for all of them; new room where not given.
        finish: is called with all of them when as many more examples are made, and at the end.
        finished_together: so many.
    """
    whole, n = None if into is None else list(into), rows.stop - rows.start
    for batch in pieces(rows, size):
        place = slice(batch.start - rows.start, batch.stop - rows.start)
        made = make(batch, whole and [room[place] for room in whole])
        if whole is not None and place.start == 0 and not whole[0].is_like(made[0]):
            whole = None  # room of another form
        if whole is None:
            whole = made if len(made[0]) == n else [block.empty(n) for block in made]
        for k, block in enumerate(made):
            whole[k] = whole[k].with_room_for(block)
            whole[k].put(place, block)
        is_enough = place.start // finished_together < place.stop // finished_together
        if finish is not None and (is_enough or place.stop == n):
            finish(whole)
    return whole or []


def cosine(
    rows: Rows, columns: Rows, precision: Precision = FLOAT32, into: Tensor | None = None
) -> Tensor:
    """cos(g_i, g_j) for every pair, (N, M), within [−1, 1]; 0 where a gradient is 0.

    Of a block with itself (the same object) only one triangle is computed, and mirrored.

    Args:
        rows: N.
        columns: M.
        precision: of the rows.
        into: where the cosines go, (N, M) float32.
    """
    symmetric, device = rows is columns, rows.norm.device
    is_there = into is not None and into.device == device
    room = into if is_there else None
    total = torch.empty(len(rows), len(columns), device=device) if room is None else room
    with fast_float32():
        _fold(rows.dense_NP, columns.dense_NP, precision, total, symmetric=symmetric)
        blocks = _blocks(len(rows), len(columns), _STRIP_OF_FACTORS, symmetric=symmetric)
        for above, left in blocks:
            part = total[above, left]
            part *= rows.dense_scale_N[above].unsqueeze(1)
            part *= columns.dense_scale_N[left]
            for f, g in zip(rows.factors, columns.factors, strict=True):
                part += f.take(above).gram(g.take(left), precision)
            part.clamp_(-1.0, 1.0)
    if symmetric:
        _mirror(total)
    return total if into is None or is_there else into.copy_(total)


def folded_product(X_NP: Tensor, Y_MP: Tensor, precision: Precision = FLOAT32) -> Tensor:
    """X Yᵀ as a sum of products over some elements at a time, (N, M) float32.

    A float32 sum over millions of products loses digits that a sum of short sums keeps (3e-7
    against 1.5e-6 at P = 270,000), and so does a sum of very many short sums. Of X with itself (the
    same object) one triangle is computed, and mirrored.
    """
    symmetric = X_NP is Y_MP
    total = torch.empty(len(X_NP), len(Y_MP), device=X_NP.device)
    with fast_float32():
        _fold(X_NP, Y_MP, precision, total, symmetric=symmetric)
    return _mirror(total) if symmetric else total


def _fold(
    X_NP: Tensor, Y_MP: Tensor, precision: Precision, total: Tensor, *, symmetric: bool
) -> None:
    """Write X Yᵀ; of X with itself (`symmetric`) the upper triangle."""
    fold = precision.fold(X_NP)
    strip = _STRIP_CUDA if X_NP.is_cuda else _STRIP
    blocks = list(_blocks(len(X_NP), len(Y_MP), strip, symmetric=symmetric))
    total.zero_()
    for sums in pieces(slice(0, X_NP.shape[1]), fold * _SUMS):
        some = total if sums.start == 0 else torch.zeros_like(total)
        for part in pieces(sums, fold):
            # All blocks of one part of the rows in turn, while it is in the cache.
            X = precision.operand(X_NP[:, part])
            Y = X if symmetric else precision.operand(Y_MP[:, part])
            for above, left in blocks:
                precision.add_product(some[above, left], X[above], Y[left])
        if some is not total:
            total += some


def _blocks(n: int, m: int, width: int, *, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into blocks: itself; or, of a symmetric one, those of the upper triangle."""
    if symmetric:
        yield from _upper_blocks(slice(0, n), width)
    else:
        yield slice(0, n), slice(0, m)


def _upper_blocks(rows: slice, width: int) -> Iterator[tuple[slice, slice]]:
    """Halve the square, whose upper right quarter is a block; cut small ones into strips.

    oneDNN lays out the right operand of every product anew, and likes many rows by few columns; MKL
    likes large squares.
    """
    if rows.stop - rows.start <= _STRIPS * width:
        for left in pieces(rows, width):
            yield slice(rows.start, left.stop), left
        return
    middle = (rows.start + rows.stop) // 2
    first, second = slice(rows.start, middle), slice(middle, rows.stop)
    yield from _upper_blocks(first, width)
    yield first, second
    yield from _upper_blocks(second, width)


def _mirror(matrix: Tensor) -> Tensor:
    """Write the upper triangle over the lower one.

    A product of rows with themselves need not be symmetric to the last bit.
    """
    for left in pieces(slice(0, len(matrix)), _STRIP):
        square = matrix[left, left]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[left, : left.start] = matrix[: left.start, left].T
    return matrix


def _norms(X: Tensor) -> Tensor:
    """Return the norm of each row, (N,) float64."""
    norms: Tensor = torch.linalg.vector_norm(X.flatten(1), dim=1, dtype=torch.float64)
    return norms


def _largest(X_NTd: Tensor) -> Tensor:
    return X_NTd.abs().amax((1, 2)) if X_NTd.numel() else X_NTd.new_zeros(len(X_NTd))


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)


def _times(X: Tensor, factor_N: Tensor) -> Tensor:
    """Multiply each row by its factor, which is cut off at the largest number of X's dtype."""
    factor_N = factor_N.clamp(max=torch.finfo(X.dtype).max).to(X.dtype)
    return X * factor_N.reshape(-1, *[1] * (X.dim() - 1))


def _kind(tensor: Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"
