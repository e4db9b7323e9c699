"""Per-example gradients and their products, exact for every parameter of any network."""

from distributed_stiffness.gradients.matrices import (
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
)
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.self_check import self_check

__all__ = [
    "PerExampleGradients",
    "class_cosine_matrix",
    "cosine_matrix",
    "gradient_norms",
    "gram_matrix",
    "self_check",
]
