"""Reductions of a store: pure functions Dataset → Dataset, lazy on dask.

Importing this module also registers the accessor `ds.stiffness`. Neither torch nor ray is needed.
"""

from distributed_stiffness.analysis.accessor import StiffnessAccessor
from distributed_stiffness.analysis.alignment import kernel_alignment
from distributed_stiffness.analysis.blocks import split_blocks
from distributed_stiffness.analysis.classes import (
    class_matrix,
    within_between,
)
from distributed_stiffness.analysis.coherence import gradient_coherence
from distributed_stiffness.analysis.confusion import gradient_confusion
from distributed_stiffness.analysis.critical_length import critical_length
from distributed_stiffness.analysis.curves import checkpoint_curves
from distributed_stiffness.analysis.distance import (
    distance_edges,
    distance_profile,
    distance_row_sums,
)
from distributed_stiffness.analysis.equal_loss import (
    at_equal_loss,
    at_equal_losses,
    common_losses,
)
from distributed_stiffness.analysis.metric import Distance, distances_of
from distributed_stiffness.analysis.neighbours import neighbours
from distributed_stiffness.analysis.one_pass import compute, compute_together
from distributed_stiffness.analysis.paired import paired_curves, paired_differences
from distributed_stiffness.analysis.reduced import reduced
from distributed_stiffness.analysis.replicates import over_seeds
from distributed_stiffness.analysis.spectrum import participation_ratio, spectrum
from distributed_stiffness.analysis.summary import Summary, summary
from distributed_stiffness.analysis.sums import row_sums
from distributed_stiffness.analysis.superclasses import superclass_contrast, superclass_matrix
from distributed_stiffness.analysis.teaching import teaching, teaching_extremes

__all__ = [
    "Distance",
    "StiffnessAccessor",
    "Summary",
    "at_equal_loss",
    "at_equal_losses",
    "checkpoint_curves",
    "class_matrix",
    "common_losses",
    "compute",
    "compute_together",
    "critical_length",
    "distance_edges",
    "distance_profile",
    "distance_row_sums",
    "distances_of",
    "gradient_coherence",
    "gradient_confusion",
    "kernel_alignment",
    "neighbours",
    "over_seeds",
    "paired_curves",
    "paired_differences",
    "participation_ratio",
    "reduced",
    "row_sums",
    "spectrum",
    "split_blocks",
    "summary",
    "superclass_contrast",
    "superclass_matrix",
    "teaching",
    "teaching_extremes",
    "within_between",
]
