"""Per-example gradients and their products, exact for every parameter of any network."""

from distributed_stiffness.gradients.class_means import class_cosine_matrix
from distributed_stiffness.gradients.explain import explain
from distributed_stiffness.gradients.loss_head import WholeLoss
from distributed_stiffness.gradients.matrices import (
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.self_check import self_check

__all__ = [
    "PerExampleGradients",
    "WholeLoss",
    "class_cosine_matrix",
    "cosine_matrix",
    "explain",
    "gradient_norms",
    "gram_matrix",
    "layer_cosines",
    "self_check",
]
