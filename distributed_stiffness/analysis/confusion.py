"""Gradient confusion: how much the pairs that disagree most disagree.

Quantiles come from counts by value, in bins that are the upper half of a float32: its sign, its
exponent and seven bits of its fraction. So one pass is enough, whatever the size of the products,
and a quantile is within 1/128 of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.pairs import Splits, leading_dims
from distributed_stiffness.analysis.products import Block
from distributed_stiffness.analysis.selection import Selection, one_set
from distributed_stiffness.errors import DataError

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_BINS = 2**16
_NEGATIVE = 2**15  # code of the first bin below 0
_INFINITE = 0x7F80  # code of what is no finite number

_ATTRS = {
    "minimum": {
        "long_name": "smallest product of two gradients",
        "units": "1",
        "description": "Least g_i.g_j (kernel gram) or cosine over pairs of different examples.",
    },
    "confusion": {
        "long_name": "gradient confusion",
        "units": "1",
        "description": "Least bound, 0 or more, with every product of two different examples above"
        " its negative. It is an extreme: it grows with the number of examples.",
    },
    "product_quantile": {
        "long_name": "quantile of the products of two gradients",
        "units": "1",
        "description": "Of g_i.g_j (kernel gram) or the cosine over pairs of different examples;"
        " within 1/128 of its size.",
    },
}


def gradient_confusion(
    ds: xr.Dataset,
    *,
    quantiles: Sequence[float] = QUANTILES,
    kernels: Sequence[str] | None = None,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Return gradient confusion, and quantiles of products and cosines over pairs.

    confusion: the smallest η ≥ 0 with g_i·g_j ≥ −η for all i ≠ j (Sankararaman et al., ICML 2020,
    arXiv 1904.06963), so max(0, −minimum); its authors look at the least cosine too, which has no
    scale. Self-pairs are left out, each pair counts once, and the chunks are read once. Extremes
    and quantiles of pairs have no jackknife, so there are no standard errors.

    Args:
        ds: a store of pairs.
        quantiles: shares of the pairs, in [0, 1].
        kernels: as in `gradient_coherence`.
        splits: of rows and columns, as in `class_matrix`; both the same.

    Returns:
        Lazy Dataset over leading dimensions + (kernel): minimum and confusion; + (kernel,
        quantile): product_quantile (float64; NaN where a pair is not computed yet).

    Raises:
        DataError: the store keeps sums, a quantile is outside [0, 1], rows and columns are
            different examples, or the store lacks a kernel's numbers.
    """
    return confusion_of(one_set(ds, kernels, splits), quantiles)


def confusion_of(selection: Selection, quantiles: Sequence[float] = QUANTILES) -> xr.Dataset:
    """As `gradient_confusion`, of a selection."""
    selection.require_pairs("the smallest product of a pair")
    if not quantiles or not all(0 <= q <= 1 for q in quantiles):
        raise DataError(f"quantiles is {tuple(quantiles)!r}: expected shares from 0 to 1")
    counts, least = _counts(selection)
    n_lead = counts.ndim - 2
    found = da.map_blocks(
        partial(_quantiles, np.asarray(quantiles, dtype=np.float64)),
        counts,
        drop_axis=n_lead + 1,
        new_axis=n_lead + 1,
        chunks=(*counts.chunks[:-1], (len(quantiles),)),
        dtype=np.float64,
        meta=np.empty((0,) * counts.ndim),
    )
    # Products were counted in units of the largest possible one: float32 holds no very small ones.
    unit = np.stack(
        [
            _largest_norm(selection)[..., 0] ** 2
            if kernel == "gram"
            else np.ones(selection.norms.shape[:-1])
            for kernel in selection.kernels
        ],
        axis=-1,
    )
    dims = (*leading_dims(selection.chosen), "kernel")
    minimum = xr.DataArray(da.where(np.isfinite(least), least * unit, np.nan), dims=dims)
    variables = {
        "minimum": minimum,
        "confusion": -minimum.clip(max=0.0),
        "product_quantile": xr.DataArray(found * unit[..., None], dims=(*dims, "quantile")),
    }
    result = selection.described(variables, _ATTRS)
    shares = xr.DataArray(
        np.asarray(quantiles), dims="quantile", attrs={"long_name": "share of pairs below"}
    )
    return result.assign_coords(quantile=shares)


def _largest_norm(selection: Selection) -> np.ndarray:
    """Return the largest norm of each checkpoint (lead…, 1); 1 where all are 0."""
    largest = selection.norms.max(-1, keepdims=True)
    return np.where(largest > 0, largest, 1.0)


def _counts(selection: Selection) -> tuple[da.Array, da.Array]:
    """Return pairs by bin (lead…, K, bins), and the least product (lead…, K)."""
    cosine, kernels = selection.chosen["cosine"].data, selection.kernels
    every, largest = Block.of(selection), _largest_norm(selection)
    scaled = Block(every.labels, every.row_norms / largest, every.column_norms / largest)
    n = cosine.ndim
    blocks = da.map_blocks(
        _counts_of_block,
        cosine,
        every=scaled,
        kernels=kernels,
        new_axis=[n, n + 1],
        chunks=(
            *cosine.chunks[:-2],
            (1,) * cosine.numblocks[-2],
            (1,) * cosine.numblocks[-1],
            (len(kernels),),
            (_BINS + 1,),
        ),
        dtype=np.float64,
        meta=np.empty((0,) * (n + 2)),
    )
    return blocks[..., :_BINS].sum(axis=(n - 2, n - 1)), blocks[..., _BINS].min(axis=(n - 2, n - 1))


def _counts_of_block(
    cosine: np.ndarray, *, every: Block, kernels: Sequence[str], block_info: Any
) -> np.ndarray:
    """Count one block's pairs i < j by value, in each kernel.

    Returns:
        (…, 1, 1, K, bins + 1) float64; the last is the least value, infinite where no pair is.
    """
    block = every.cut(block_info)
    out = np.zeros((*cosine.shape[:-2], 1, 1, len(kernels), _BINS + 1))
    out[..., _BINS] = np.inf
    rows, columns = block.labels.rows, block.labels.columns
    if rows.min() >= columns.max():  # the mirror of pairs that are counted elsewhere
        return out
    once = None if rows.max() < columns.min() else rows[:, None] < columns
    for at in np.ndindex(cosine.shape[:-2]):
        for k, kernel in enumerate(kernels):
            values = _values(cosine[at], block, at, kernel, once)
            if values.size:
                codes = (values.view(np.uint32) >> 16).astype(np.int64)
                out[(*at, 0, 0, k)][:_BINS] = np.bincount(codes, minlength=_BINS)
                out[(*at, 0, 0, k, _BINS)] = values.min()
    return out


def _values(
    cosine: np.ndarray, block: Block, at: tuple[int, ...], kernel: str, once: np.ndarray | None
) -> np.ndarray:
    """Return the products of a block's pairs, one after the other, float32."""
    cosine = cosine.astype(np.float32, copy=False)
    of_rows, of_columns = block.row_norms[at], block.column_norms[at]
    if kernel == "gram":
        x = cosine * of_rows.astype(np.float32)[:, None]
        x *= of_columns.astype(np.float32)
        return np.ascontiguousarray(x if once is None else x[once]).ravel()
    if not (of_rows.all() and of_columns.all()):
        there = (of_rows > 0)[:, None] & (of_columns > 0)
        once = there if once is None else once & there
    return np.ascontiguousarray(cosine if once is None else cosine[once]).ravel()


def _edges() -> np.ndarray:
    """Return the edges of the bins of finite numbers, ascending."""
    codes = np.arange(_INFINITE + 1, dtype=np.uint32)
    above = (codes << 16).view(np.float32).astype(np.float64)
    above[-1] = np.finfo(np.float32).max
    return np.concatenate([-above[:0:-1], above])


def _quantiles(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return quantiles (…, q) from counts (…, bins); NaN where pairs are missing."""
    negative = counts[..., _NEGATIVE : _NEGATIVE + _INFINITE][..., ::-1]
    ordered = np.concatenate([negative, counts[..., :_INFINITE]], axis=-1)
    edges, lead = _edges(), counts.shape[:-1]
    out = np.full((*lead, len(shares)), np.nan)
    for at in np.ndindex(lead):
        below = np.cumsum(ordered[at])
        total = counts[at].sum()
        if total == 0 or below[-1] != total:
            continue
        wanted = np.ceil(shares * total * (1 - 1e-12)).clip(min=1)  # ranks, from 1
        place = np.searchsorted(below, wanted)
        inside = (wanted - (below[place] - ordered[at][place])) / ordered[at][place]
        out[at] = edges[place] + inside * (edges[place + 1] - edges[place])
    return out
