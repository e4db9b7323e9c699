"""Neighbouring measures as their definitions say, of one kernel matrix, in float64.

Imports nothing of the package.
"""

from __future__ import annotations

import math

import numpy as np
import xarray as xr


def kernel(one: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One checkpoint's kernel, its diagonal exact, and the class of each example in it."""
    cosine = one["cosine"].values.astype(float)
    norms, labels = one["gradient_norm"].values, one["class_name"].values
    inside = [i for i in range(len(norms)) if name == "gram" or norms[i] > 0]
    K = np.empty((len(inside), len(inside)))
    for a, i in enumerate(inside):
        for b, j in enumerate(inside):
            K[a, b] = 1.0 if i == j else cosine[i, j]
            if name == "gram":
                K[a, b] *= norms[i] * norms[j]
    return K, labels[inside]


def without(K: np.ndarray, labels: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with one example deleted."""
    kept = [j for j in range(len(K)) if j != i]
    return K[np.ix_(kept, kept)], labels[kept]


def off_diagonal(K: np.ndarray) -> list[float]:
    return [K[i, j] for i in range(len(K)) for j in range(len(K)) if i != j]


def measures(K: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every smooth measure."""
    n, others = len(K), off_diagonal(K)
    product = math.fsum(others) / len(others)
    square = math.fsum(K[i, i] for i in range(n)) / n
    whole = math.fsum(K.ravel())
    return {
        "mean_product": product,
        "coherence": product / square,
        "m_coherence": whole / (n * square),
        "diversity": n * square / whole,
        "signal_to_noise": product / (square - product),
        "participation_ratio": (n * square) ** 2 / math.fsum((K**2).ravel()),
        "alignment": alignment(K, labels),
    } | {f"share of {c}": share(K, labels, c) for c in sorted(set(labels))}


def share(K: np.ndarray, labels: np.ndarray, name: str) -> float:
    """Product of a class's summed gradient with that of all, by the square of the latter."""
    return math.fsum(K[labels == name].ravel()) / math.fsum(K.ravel())


def alignment(K: np.ndarray, labels: np.ndarray) -> float:
    """Centred, by the matrices of the definition."""
    n, n_classes = len(K), len(set(labels))
    Y = np.array([[1.0 if a == b else -1 / (n_classes - 1) for b in labels] for a in labels])
    H = np.eye(n) - np.ones((n, n)) / n
    K, Y = H @ K @ H, H @ Y @ H
    return float((K * Y).sum() / np.linalg.norm(K) / np.linalg.norm(Y))


def errors(K: np.ndarray, labels: np.ndarray, n: int) -> dict[str, float]:
    """The jackknife's standard errors over n examples; those not in the kernel change nothing."""
    whole = measures(K, labels)
    deleted = [measures(*without(K, labels, i)) for i in range(len(K))]
    total = {}
    for name, value in whole.items():
        values = [some.get(name, 0.0) for some in deleted] + [value] * (n - len(K))
        mean = math.fsum(values) / n
        total[name] = math.sqrt((n - 1) / n * math.fsum((v - mean) ** 2 for v in values))
    return total
