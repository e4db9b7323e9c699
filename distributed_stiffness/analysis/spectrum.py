"""The spectrum of the loss-gradient kernel: how many directions the gradients take up.

The kernel of n examples has the non-zero eigenvalues of the uncentred second moment of their
gradients, times n. It is the kernel of loss gradients, not the neural tangent kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock

import dask
import dask.array as da
import numpy as np
import scipy.sparse.linalg  # type: ignore[import-untyped]
import xarray as xr

from distributed_stiffness.analysis.pairs import Splits, leading_dims
from distributed_stiffness.analysis.products import (
    Sums,
    kernel_sums,
    named,
    of_whole_matrices,
    ratio,
)
from distributed_stiffness.analysis.selection import Selection, one_set
from distributed_stiffness.errors import DataError

EIGENVALUES = 20
MEMORY = 2**29  # bytes of a float32 matrix that is kept while its eigenvalues are sought
TOLERANCE = 1e-6  # relative, of an eigenvalue that is sought
# Matrices that are kept are looked at one at a time, whatever dask's threads are.
_ONE_AT_A_TIME = Lock()

_PARTICIPATION = {
    "participation_ratio": {
        "long_name": "participation ratio of the kernel",
        "units": "1",
        "description": "Squared trace divided by the sum of all squared products, self-pairs in"
        " both: how many equal eigenvalues would give both; 1 (all gradients along one line) to n.",
    }
}
_ATTRS = {
    "eigenvalue": {
        "long_name": "eigenvalue of the kernel",
        "units": "1",
        "description": "Largest first, self-pairs on the diagonal; 0 or more but for rounding.",
    },
    "share": {
        "long_name": "share of an eigenvalue in the trace",
        "units": "1",
        "description": "Eigenvalue divided by the sum of all; in [0, 1].",
    },
    "effective_rank": {
        "long_name": "effective rank of the kernel",
        "units": "1",
        "description": "Exponential of the entropy of the eigenvalues' shares, from 1 to n; NaN"
        " where not all eigenvalues are computed.",
    },
    "stable_rank": {
        "long_name": "stable rank of the gradients",
        "units": "1",
        "description": "Trace divided by the largest eigenvalue, from 1 to n.",
    },
}


def participation_ratio(
    ds: xr.Dataset, *, kernels: Sequence[str] | None = None, splits: Splits | None = None
) -> xr.Dataset:
    """Return (tr K)² / ‖K‖_F², an effective rank without eigenvalues; the chunks are read once.

    Args:
        ds: a store, of pairs or of sums.
        kernels: as in `gradient_coherence`.
        splits: of rows and columns, as in `class_matrix`; both the same.

    Returns:
        Lazy Dataset over leading dimensions + (kernel): participation_ratio, and
        participation_ratio_error by jackknife over examples (float64; NaN where a pair is not
        computed yet).

    Raises:
        DataError: rows and columns are different examples, or the store lacks a kernel's numbers.
    """
    return participation_of(one_set(ds, kernels, splits))


def participation_of(selection: Selection) -> xr.Dataset:
    """As `participation_ratio`, of a selection."""
    selection.require_squares("the participation ratio")
    sums = kernel_sums(selection, squares=True)
    pair = sums.value_and_error(_participation, {"value": 1})
    return selection.described(*named(pair, _PARTICIPATION))


def _participation(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratio (K, 1), and that without each example (E, K, 1)."""
    own = sums.diagonal**2
    trace, squares = sums.diagonal.sum(0), (sums.squares + own).sum(0)
    without = ratio((trace - sums.diagonal) ** 2, squares - 2 * sums.squares - own)
    return ratio(trace**2, squares)[:, None], without[..., None]


def spectrum(
    ds: xr.Dataset,
    k: int = EIGENVALUES,
    *,
    kernels: Sequence[str] | None = None,
    splits: Splits | None = None,
    memory: int = MEMORY,
) -> xr.Dataset:
    """Return the largest eigenvalues of the loss-gradient kernel, and its effective ranks.

    effective_rank: exp(−Σ p log p) of the shares p = λ / Σλ (Roy and Vetterli 2007); stable_rank:
    tr K / λ_1; participation_ratio: (tr K)² / ‖K‖_F². Self-pairs are the diagonal.

    Of up to 2,000 examples all eigenvalues are computed, and each chunk is read once. Of more, the
    k largest are sought by Lanczos iteration (scipy's eigsh) to a relative 1e-6: some 50 to 200
    products with the matrix, which is kept where it fits into `memory`, and else is read each time.
    Eigenvalues have no standard error: they cross.

    Args:
        ds: a store of pairs.
        k: how many eigenvalues.
        kernels: as in `gradient_coherence`.
        splits: of rows and columns, as in `class_matrix`; both the same.
        memory: in bytes, for the matrix of one checkpoint in float32; it takes twice that
            for a moment, when it is put together.

    Returns:
        Lazy Dataset over leading dimensions + (kernel, rank: 1 to k): eigenvalue and share; over
        leading dimensions + (kernel): effective_rank, stable_rank, participation_ratio and
        participation_ratio_error. float64; NaN where a pair is not computed yet, and effective_rank
        also of more than 2,000 examples.

    Raises:
        DataError: k is below 1, the store keeps sums, rows and columns are different examples, or
            the store lacks a kernel's numbers.
    """
    return spectrum_of(one_set(ds, kernels, splits), k, memory)


def spectrum_of(selection: Selection, k: int = EIGENVALUES, memory: int = MEMORY) -> xr.Dataset:
    """As `spectrum`, of a selection."""
    if k < 1:
        raise DataError(f"k is {k}: expected 1 or more eigenvalues")
    selection.require_pairs("a spectrum")
    k = min(k, len(selection.examples.groups))
    if selection.is_small:
        found = of_whole_matrices(selection, partial(_all_eigenvalues, k), (k + 1,))
    else:
        found = _largest(selection, k, memory)
    dims = (*leading_dims(selection.chosen), "kernel", "rank")
    values = xr.DataArray(found, dims=dims)
    eigenvalue = values.isel(rank=slice(k)).assign_coords(rank=np.arange(1, k + 1))
    ratios = participation_of(selection)
    trace = xr.DataArray(_traces(selection), dims=dims[:-1])
    largest = eigenvalue.isel(rank=0, drop=True)
    result = selection.described(
        {
            "eigenvalue": eigenvalue,
            "share": eigenvalue / trace.where(trace > 0),
            "effective_rank": values.isel(rank=k),
            "stable_rank": trace / largest.where(largest > 0),
        },
        _ATTRS,
    )
    result["rank"].attrs = {"long_name": "rank of the eigenvalue, the largest first"}
    return result.assign(ratios.data_vars)


def _traces(selection: Selection) -> np.ndarray:
    """Return the trace of each kernel (lead…, K)."""
    squares = selection.norms**2
    return np.stack(
        [
            (squares if kernel == "gram" else member).sum(-1)
            for kernel, member in zip(
                selection.kernels, np.moveaxis(selection.members, -1, 0), strict=True
            )
        ],
        axis=-1,
    )


def _all_eigenvalues(k: int, matrix: np.ndarray) -> np.ndarray:
    """Return the k largest eigenvalues and the effective rank (k + 1,)."""
    if not np.isfinite(matrix).all():
        return np.full(k + 1, np.nan)
    eigenvalues = np.linalg.eigvalsh(matrix)[::-1]
    positive = eigenvalues[eigenvalues > 0]  # rounding makes zeros negative
    shares = positive / positive.sum()
    rank = np.exp(-(shares * np.log(shares)).sum()) if positive.size else np.nan
    return np.append(eigenvalues[:k], rank)


def _largest(selection: Selection, k: int, memory: int) -> da.Array:
    """Return the k largest eigenvalues and NaN for the effective rank (lead…, K, k + 1), lazy."""
    cosine = selection.cosines()
    lead = cosine.shape[:-2]
    found = np.empty((*lead, len(selection.kernels)), dtype=object)
    for at in np.ndindex(lead):
        # A function without arguments: dask would compute an array among them, whole.
        seek = partial(_seek, cosine[at], selection.norms[at], selection.kernels, k, memory)
        of_checkpoint = dask.delayed(lambda seek=seek: seek(), traverse=False)()
        values = da.from_delayed(of_checkpoint, (len(selection.kernels), k + 1), np.float64)
        for kernel in range(len(selection.kernels)):
            found[(*at, kernel)] = values[kernel]
    return _nested(found)


def _nested(arrays: np.ndarray) -> da.Array:
    """Stack an array of dask arrays along its dimensions."""
    if arrays.ndim == 0:
        return arrays.item()
    return da.stack([_nested(np.asarray(part)) for part in arrays])


def _seek(
    cosine: da.Array, norms: np.ndarray, kernels: Sequence[str], k: int, memory: int
) -> np.ndarray:
    with _ONE_AT_A_TIME:
        if cosine.nbytes <= memory:
            cosine = da.from_array(cosine.compute(scheduler="threads"), chunks=cosine.chunks)
        return np.stack([_lanczos(cosine, norms, kernel, k) for kernel in kernels])


def _lanczos(cosine: da.Array, norms: np.ndarray, kernel: str, k: int) -> np.ndarray:
    n = len(norms)
    scale = norms if kernel == "gram" else np.ones(n)

    def product(vector: np.ndarray) -> np.ndarray:
        whole = da.dot(cosine, scale * vector.ravel()).compute(scheduler="threads")
        return np.asarray(scale * whole)

    start = np.random.default_rng(0).standard_normal(n)
    out = np.full(k + 1, np.nan)
    if np.isfinite(product(start)).all():
        operator = scipy.sparse.linalg.LinearOperator((n, n), matvec=product, dtype=np.float64)
        found = scipy.sparse.linalg.eigsh(
            operator, k, which="LA", v0=start, tol=TOLERANCE, return_eigenvectors=False
        )
        out[:k] = np.sort(found)[::-1]
    return out
