"""Stiffness of neural networks: all pairs of a validation set, every checkpoint, on a Ray cluster.

What is imported here is imported when it is first used, so that `distributed_stiffness.analysis`
needs neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_stiffness.engine import Run, add_distances, run_study
    from distributed_stiffness.gradients import (
        WholeLoss,
        class_cosine_matrix,
        cosine_matrix,
        explain,
        gradient_norms,
        gram_matrix,
        layer_cosines,
    )
    from distributed_stiffness.importing import measure_checkpoints
    from distributed_stiffness.study import Study
    from distributed_stiffness.verify import verify_store
    from distributed_stiffness.watching import lightning_callback, watch

_HOMES = {
    "Run": "engine",
    "add_distances": "engine",
    "run_study": "engine",
    "Study": "study",
    "WholeLoss": "gradients",
    "class_cosine_matrix": "gradients",
    "cosine_matrix": "gradients",
    "explain": "gradients",
    "gradient_norms": "gradients",
    "gram_matrix": "gradients",
    "layer_cosines": "gradients",
    "lightning_callback": "watching",
    "measure_checkpoints": "importing",
    "verify_store": "verify",
    "watch": "watching",
}

__all__ = [
    "Run",
    "Study",
    "WholeLoss",
    "add_distances",
    "class_cosine_matrix",
    "cosine_matrix",
    "explain",
    "gradient_norms",
    "gram_matrix",
    "layer_cosines",
    "lightning_callback",
    "measure_checkpoints",
    "run_study",
    "verify_store",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
