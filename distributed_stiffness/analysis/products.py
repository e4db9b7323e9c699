"""Sums over each example's pairs in two kernels: what neighbouring measures are made of.

The kernels are the stored cosine C and the Gram K = |g_i||g_j| C_ij. An example whose gradient is
zero has no direction: it is left out of the cosine kernel, and is in the Gram with products of 0. A
pair that is not computed yet makes its sums NaN: these measures are of whole matrices.

Legend of the arrays, which are those of one checkpoint: E examples, K kernels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.identities import (
    COLUMN_IDENTITY,
    ROW_IDENTITY,
    places,
)
from distributed_stiffness.analysis.jackknife import (
    Examples,
    error_attrs,
    leave_one_out,
    spread,
)
from distributed_stiffness.analysis.pairs import (
    SQUARE_SUMS,
    WEIGHTED_SUMS,
    Labels,
    labels,
    leading_dims,
)
from distributed_stiffness.analysis.selection import KERNELS, Selection
from distributed_stiffness.analysis.sums import grouped_sums, membership

HANGS_ON = "it hangs on one example, or a pair is not computed yet"

Statistic = Callable[["Sums"], np.ndarray]
Change = Callable[["Sums"], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sums:
    """What each example adds to the sums over pairs, in each kernel; self-pairs apart."""

    member: np.ndarray  # (E, K) 1 where the example is in the kernel, else 0
    diagonal: np.ndarray  # (E, K) its product with itself
    squares: np.ndarray  # (E, K) of its products with others, added up; NaN: not asked for
    product: np.ndarray  # (E, K) row of K·K·1, K with its diagonal; NaN: too many examples
    by_class: np.ndarray  # (E, K, C) its products with the others of each class, added up
    groups: np.ndarray  # (E,) its class

    @classmethod
    def unpacked(cls, groups: np.ndarray, packed: np.ndarray) -> Sums:
        """Return the sums of `kernel_sums`, (E, K, 4 + C)."""
        member, diagonal, squares, product = (packed[..., k] for k in range(4))
        return cls(member, diagonal, squares, product, packed[..., 4:], groups)

    @cached_property
    def others(self) -> np.ndarray:
        """Products with all others, added up (E, K)."""
        return np.asarray(self.by_class.sum(-1))

    @cached_property
    def own(self) -> np.ndarray:
        """Products with the others of its class, added up (E, K)."""
        return np.asarray(self.by_class[np.arange(len(self.groups)), :, self.groups])

    @cached_property
    def one_hot(self) -> np.ndarray:
        """Its class (E, 1, C) float64."""
        n_classes = self.by_class.shape[-1]
        return np.asarray((self.groups[:, None] == np.arange(n_classes))[:, None], np.float64)

    def class_totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Return Σ of K·1 over each class (1, K, C), and the same without each example (E, …)."""
        row = (self.others + self.diagonal)[..., None] * self.one_hot
        total = row.sum(0, keepdims=True)
        return total, total - row - self.by_class


@dataclass(frozen=True)
class KernelSums:
    """A selection's sums by example, kernel and class, not computed yet."""

    selection: Selection
    packed: da.Array  # (lead…, E, K, 4 + C)

    def value_and_error(self, change: Change, names: Mapping[str, int]) -> list[xr.DataArray]:
        """Apply a statistic to the sums of all examples and to those without each.

        Args:
            change: from Sums to the values (K, …) and the values without each example (E, K, …).
            names: names and sizes of the dimensions after the kernel's.

        Returns:
            The values and their standard errors by jackknife over examples, lazy.
        """
        of, lead = self.selection, leading_dims(self.selection.chosen)
        both = leave_one_out(
            partial(_with_errors, change, of.examples),
            of.examples,
            (self.packed,),
            lead,
            {"kernel": len(of.kernels), **names, "what": 2},
        )
        return [both.isel(what=k) for k in range(2)]


def _with_errors(
    change: Change, examples: Examples, packed: np.ndarray, _: np.ndarray
) -> np.ndarray:
    value, without = change(Sums.unpacked(examples.groups, packed))
    variance = spread(without - value, examples.roles).sum(0)
    return np.stack([value, np.sqrt(variance)], axis=-1)


def named(
    pair: Sequence[xr.DataArray], attrs: Mapping[str, Mapping[str, str]], dim: str = "value"
) -> tuple[dict[str, xr.DataArray], dict[str, Mapping[str, str]]]:
    """Give values and errors along `dim` their names and descriptions: NAME and NAME_error."""
    variables, described = {}, {}
    for k, (name, text) in enumerate(attrs.items()):
        variables[name], described[name] = pair[0].isel({dim: k}), text
        error = f"{name}_error"
        variables[error], described[error] = pair[1].isel({dim: k}), error_attrs(text, HANGS_ON)
    return variables, described


def kernel_sums(
    selection: Selection, *, squares: bool = False, product: bool = False
) -> KernelSums:
    """Add up each example's products with the others, by class; the chunks are read once.

    Args:
        selection: of `one_set`.
        squares: the sums of squares too.
        product: K·K·1 too, of the pairs of up to `WHOLE` examples; else NaN.
    """
    by_class = {"cosine": _cosines_by_class(selection)}
    of_squares: dict[str, da.Array] = {}
    if squares or "gram" in selection.kernels:
        found, n = _products(selection), len(selection.groups)
        by_class["gram"] = found[..., :n]
        of_squares = {"cosine": found[..., n], "gram": found[..., n + 1]} if squares else {}
    whole = product and selection.keeps_pairs and selection.is_small
    of_products = _second_products(selection) if whole else None
    packed = []
    for k, kernel in enumerate(selection.kernels):
        chunks = by_class[kernel].chunks[:-1]
        member = da.from_array(selection.members[..., k], chunks=chunks)
        unknown = da.full_like(member, np.nan)
        columns = [
            member,
            da.from_array(selection.norms**2, chunks=chunks) if kernel == "gram" else member,
            of_squares.get(kernel, unknown),
            unknown if of_products is None else of_products[..., k],
        ]
        of_kernel = [*(column[..., None] for column in columns), by_class[kernel]]
        packed.append(da.concatenate(of_kernel, axis=-1))
    return KernelSums(selection, da.stack(packed, axis=-2))


def _cosines_by_class(selection: Selection) -> da.Array:
    """Return the sums of cosines (lead…, E, C); NaN where a pair is missing."""
    sums = grouped_sums(selection.chosen, "class_name").sides[0]
    member = (selection.norms > 0).astype(np.float64)
    pairs = member * (member.sum(-1, keepdims=True) - 1)
    complete = sums[..., 2].sum(-1) == pairs
    return da.where(complete[..., None], sums[..., 0], np.nan)


@dataclass(frozen=True)
class Block:
    """What a block of pairs must know of its rows and columns."""

    labels: Labels
    row_norms: np.ndarray  # (…, i)
    column_norms: np.ndarray  # (…, j)

    @classmethod
    def of(cls, selection: Selection) -> Block:
        """Return what is known of all rows and columns."""
        chosen = selection.chosen
        rows, columns = (chosen[of].values for of in (ROW_IDENTITY, COLUMN_IDENTITY))
        of_pairs = labels(selection.chosen, selection.groups)
        return cls(of_pairs, selection.norms, selection.norms[..., places(rows, columns)])

    def cut(self, block_info: Any) -> Block:
        """Return the part of one block, from what dask's map_blocks says of its first array."""
        places: list[Any] = [slice(*place) for place in block_info[0]["array-location"]]
        *lead, i, j = places
        return Block(
            self.labels.of_block(block_info), self.row_norms[*lead, i], self.column_norms[*lead, j]
        )


def _products(selection: Selection) -> da.Array:
    """Return each example's sums in the Gram by class, and of squares: (lead…, E, C + 2)."""
    found, n = _weighted(selection), len(selection.groups)
    norms = da.from_array(selection.norms[..., None], chunks=(*found.chunks[:-1], 1))
    parts = [found[..., :n] * norms, found[..., [n]], found[..., [n + 1]] * norms**2]
    return da.concatenate(parts, axis=-1)


def _weighted(selection: Selection) -> da.Array:
    """As `weighted_sums`, of pairs or of the sums in their place; NaN where a pair is missing."""
    chosen, groups = selection.chosen, selection.groups
    if selection.keeps_pairs:
        return weighted_sums(chosen["cosine"].data, Block.of(selection), len(groups))
    pairs = grouped_sums(chosen, "class_name").sides[0][..., 3].sum(-1)
    weighted, squares = (chosen[f"row_{name}"].data for name in (WEIGHTED_SUMS, SQUARE_SUMS))
    by_class = da.einsum("...c,cg->...g", weighted, membership(chosen, groups))
    complete = pairs == len(selection.examples.groups) - 1
    found = da.concatenate([by_class, squares], axis=-1)
    return da.where(complete[..., None], found, np.nan)


def weighted_sums(cosine: da.Array, every: Block, n_groups: int) -> da.Array:
    """Sum each row's pairs, weighted with the norms of the columns; the chunks are read once.

    Args:
        cosine: (lead…, N, M).
        every: of all rows and columns.
        n_groups: C.

    Returns:
        (lead…, N, C + 2): cosine · norm over the columns of each class; over all columns, cosine²
        and (cosine · norm)². NaN where a pair is missing.
    """
    size = n_groups + len(KERNELS)
    return da.map_blocks(
        _weighted_of_block,
        cosine,
        every=every,
        size=size,
        new_axis=cosine.ndim,
        chunks=(*cosine.chunks[:-1], (1,) * cosine.numblocks[-1], (size,)),
        dtype=np.float64,
        meta=np.empty((0,) * (cosine.ndim + 1)),
    ).sum(axis=cosine.ndim - 1)


def _weighted_of_block(
    cosine: np.ndarray, *, every: Block, size: int, block_info: Any
) -> np.ndarray:
    """As `weighted_sums`, of one block: (…, i, 1, size) float64."""
    block = every.cut(block_info)
    order = np.argsort(block.labels.column_groups, kind="stable")
    present, starts = np.unique(block.labels.column_groups[order], return_index=True)
    out = np.zeros((*cosine.shape[:-1], 1, size))
    for rows, slab in block.labels.slabs():
        self_pairs = slab.self_pairs()
        for at in np.ndindex(cosine.shape[:-2]):
            x = cosine[at][rows].astype(np.float64)
            if self_pairs is not None:
                x[self_pairs] = 0
            norms, into = block.column_norms[at], out[at][rows, 0]
            squares = np.square(x)
            with np.errstate(invalid="ignore"):  # NaN: a pair that is missing
                into[:, -2] = squares.sum(1)
                into[:, -1] = squares @ norms**2
            x *= norms
            into[:, present] = np.add.reduceat(x[:, order], starts, axis=1)
    return out


def kernel_matrix(cosine: np.ndarray, norms: np.ndarray, kernel: str) -> np.ndarray:
    """Return one checkpoint's kernel (E, E) float64, from its cosines; the diagonal is exact."""
    matrix = cosine.astype(np.float64)
    if kernel == "gram":
        matrix *= norms[:, None]
        matrix *= norms
    np.fill_diagonal(matrix, norms**2 if kernel == "gram" else norms > 0)
    return matrix


def of_whole_matrices(
    selection: Selection, function: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]
) -> da.Array:
    """Apply a function to each kernel of each checkpoint: (lead…, K, *shape), lazy.

    Args:
        selection: of up to `WHOLE` examples.
        function: from a kernel (E, E) float64, which may hold NaN, to an array of `shape`.
        shape: of what the function returns.
    """
    whole = selection.whole()
    n_lead = whole.ndim - 2
    return da.map_blocks(
        _of_one_matrix,
        whole,
        function=function,
        norms=selection.norms,
        kernels=selection.kernels,
        drop_axis=(n_lead, n_lead + 1),
        new_axis=tuple(range(n_lead, n_lead + 1 + len(shape))),
        chunks=(*whole.chunks[:-2], (len(selection.kernels),), *((n,) for n in shape)),
        dtype=np.float64,
        meta=np.empty((0,) * (n_lead + 1 + len(shape))),
    )


def _of_one_matrix(
    cosine: np.ndarray,
    *,
    function: Callable[[np.ndarray], np.ndarray],
    norms: np.ndarray,
    kernels: Sequence[str],
    block_info: Any,
) -> np.ndarray:
    places: list[Any] = [slice(*place) for place in block_info[0]["array-location"]]
    here, lead = norms[tuple(places[:-2])], cosine.shape[:-2]
    made = [
        [function(kernel_matrix(cosine[at], here[at], kernel)) for kernel in kernels]
        for at in np.ndindex(lead)
    ]
    found = np.asarray(made)
    return found.reshape(*lead, *found.shape[1:])


def _second_products(selection: Selection) -> da.Array:
    """Return K·K·1 of each kernel: (lead…, E, K)."""
    n = len(selection.examples.groups)
    return da.moveaxis(of_whole_matrices(selection, _twice, (n,)), -1, -2)


def _twice(matrix: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN: a pair that is missing
        return np.asarray(matrix @ matrix.sum(1))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide; NaN where the divisor is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), below)
    out = np.full(above.shape, np.nan)
    np.divide(above, below, out=out, where=below != 0)
    return out
