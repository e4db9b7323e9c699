"""Examples: data sets by name, as arrays with labels and class names."""

from distributed_stiffness.data.catalogue import NAMES, load
from distributed_stiffness.data.examples import LabelledData, Split
from distributed_stiffness.data.labels import permute_labels, require_every_class, subset
from distributed_stiffness.data.preprocessing import Preprocessing

__all__ = [
    "NAMES",
    "LabelledData",
    "Preprocessing",
    "Split",
    "load",
    "permute_labels",
    "require_every_class",
    "subset",
]
