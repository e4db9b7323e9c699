"""Reductions of a store: pure functions Dataset → Dataset, lazy on dask.

Importing this module also registers the accessor `ds.stiffness`. Neither torch nor ray is needed.
"""

from distributed_stiffness.analysis.accessor import StiffnessAccessor
from distributed_stiffness.analysis.classes import (
    class_matrix,
    within_between,
)
from distributed_stiffness.analysis.critical_length import critical_length
from distributed_stiffness.analysis.curves import checkpoint_curves
from distributed_stiffness.analysis.distance import (
    distance_edges,
    distance_profile,
    distance_row_sums,
)
from distributed_stiffness.analysis.equal_loss import at_equal_loss
from distributed_stiffness.analysis.one_pass import compute, compute_together
from distributed_stiffness.analysis.reduced import reduced
from distributed_stiffness.analysis.replicates import over_seeds
from distributed_stiffness.analysis.summary import Summary, summary
from distributed_stiffness.analysis.sums import row_sums
from distributed_stiffness.analysis.superclasses import superclass_contrast, superclass_matrix

__all__ = [
    "StiffnessAccessor",
    "Summary",
    "at_equal_loss",
    "checkpoint_curves",
    "class_matrix",
    "compute",
    "compute_together",
    "critical_length",
    "distance_edges",
    "distance_profile",
    "distance_row_sums",
    "over_seeds",
    "reduced",
    "row_sums",
    "summary",
    "superclass_contrast",
    "superclass_matrix",
    "within_between",
]
