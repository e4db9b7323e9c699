"""How far the gradients of examples agree: coherence, diversity, signal to noise.

All follow from three numbers of a kernel: its sum off the diagonal T, its trace and its size n.
With the Gram they are the published measures; with the cosine kernel they are the same measures of
unit gradients, in which no example counts more for its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.pairs import Splits
from distributed_stiffness.analysis.products import Sums, kernel_sums, named, ratio
from distributed_stiffness.analysis.selection import Selection, one_set

_ATTRS = {
    "mean_product": {
        "long_name": "mean product of two gradients",
        "units": "1",
        "description": "Mean of g_i.g_j (kernel gram) or of their cosine over ordered pairs,"
        " self-pairs left out: an unbiased estimate of the squared norm of the mean gradient.",
    },
    "coherence": {
        "long_name": "gradient coherence",
        "units": "1",
        "description": "Mean product of two different examples divided by the mean product of an"
        " example with itself, at most 1: 1 where all gradients are one, 0 where they are"
        " orthogonal on average. Self-pairs are in the divisor alone.",
    },
    "m_coherence": {
        "long_name": "m-coherence",
        "units": "1",
        "description": "Sum of the whole kernel divided by its trace, self-pairs in both: how many"
        " examples, itself one, the mean example's step helps. 1 where gradients are orthogonal, n"
        " where they are one, below 1 where they are opposed. It grows with n.",
    },
    "diversity": {
        "long_name": "gradient diversity",
        "units": "1",
        "description": "Sum of squared norms divided by the squared norm of the sum, self-pairs in"
        " both: 1 / m-coherence. Times n it bounds the batch size that still speeds SGD up.",
    },
    "signal_to_noise": {
        "long_name": "gradient signal to noise",
        "units": "1",
        "description": "Squared norm of the mean gradient divided by the total variance of one"
        " example's gradient, both estimated without self-pairs' bias; below 0 where the first is"
        " lost in the second. Its inverse is the simple noise scale.",
    },
}
_SHARE = {
    "long_name": "share of a class in the sum of gradients",
    "units": "1",
    "description": "Product of the class's summed gradient with that of all, divided by the"
    " latter's square, self-pairs in both; the classes' shares add up to 1, and one below 0 is of a"
    " class that the common step harms.",
}


def gradient_coherence(
    ds: xr.Dataset, *, kernels: Sequence[str] | None = None, splits: Splits | None = None
) -> xr.Dataset:
    """Return how far the gradients of one set of examples agree, with standard errors.

    coherence: E_{i≠j}[g_i·g_j] / E|g_i|² and m_coherence: |Σg|² / Σ|g|² = 1 + (n − 1)·coherence
    (Chatterjee and Zielinski, arXiv 2008.01217; coherent gradients of Chatterjee, ICLR 2020, with
    the shares of classes in |Σg|²); diversity: Σ|g|² / |Σg|² (Yin et al., AISTATS 2018);
    signal_to_noise: |E g|² / tr Var g, unbiased in both, the scalar kin of Liu et al. (ICLR 2020),
    whose own is by parameter, and the inverse of the simple noise scale (McCandlish et al. 2018).

    Self-pairs count in m_coherence, diversity and shares, as their definitions say, and nowhere
    else. Errors are by jackknife over examples, all of them one sample.

    Args:
        ds: a store, of pairs or of sums.
        kernels: "gram" (the published measures), "cosine" (of unit gradients; zero gradients left
            out), or both; None: those that the store has the numbers for.
        splits: of rows and columns, as in `class_matrix`; both the same.

    Returns:
        Lazy Dataset over leading dimensions + (kernel): mean_product, coherence, m_coherence,
        diversity, signal_to_noise (float64; NaN where a pair is not computed yet); with
        class_name also class_share; and of each its NAME_error.

    Raises:
        DataError: rows and columns are different examples, or the store lacks a kernel's numbers.
    """
    return coherence_of(one_set(ds, kernels, splits))


def coherence_of(selection: Selection) -> xr.Dataset:
    """As `gradient_coherence`, of a selection."""
    sums = kernel_sums(selection)
    variables, attrs = named(sums.value_and_error(_agreement, {"value": len(_ATTRS)}), _ATTRS)
    names = selection.groups.names
    shares = sums.value_and_error(_class_shares, {"class_name": len(names)})
    stacked = [share.expand_dims("value", axis=-1) for share in shares]
    more, more_attrs = named(stacked, {"class_share": _SHARE})
    result = selection.described(variables | more, attrs | more_attrs)
    return result.assign_coords(class_name=names)


def _agreement(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (K, V) of _ATTRS, and those without each example (E, K, V)."""
    total, trace, n = sums.others.sum(0), sums.diagonal.sum(0), sums.member.sum(0)
    without = total - 2 * sums.others, trace - sums.diagonal, n - sums.member
    return _values(total, trace, n), _values(*without)


def _values(total: np.ndarray, trace: np.ndarray, n: np.ndarray) -> np.ndarray:
    product, square = ratio(total, n * (n - 1)), ratio(trace, n)
    m_coherence = 1 + ratio(total, trace)
    return np.stack(
        [
            product,
            ratio(product, square),
            m_coherence,
            ratio(np.ones_like(total), m_coherence),
            ratio(product, square - product),
        ],
        axis=-1,
    )


def _class_shares(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares (K, C), and those without each example (E, K, C)."""
    total, without = sums.class_totals()
    share = ratio(total, total.sum(-1, keepdims=True))
    return share[0], ratio(without, without.sum(-1, keepdims=True))
