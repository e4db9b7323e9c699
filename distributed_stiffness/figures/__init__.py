"""Figures of a study: functions from a Dataset to a matplotlib Figure, and `draw_all`.

They use matplotlib's Figure without pyplot: they run without a display and leave nothing open.
"""

from distributed_stiffness.figures.curves import stiffness_curves
from distributed_stiffness.figures.folder import draw_all
from distributed_stiffness.figures.heatmap import (
    class_matrices,
    learning_rate_matrices,
    superclass_matrices,
)
from distributed_stiffness.figures.profile import profiles
from distributed_stiffness.figures.style import save
from distributed_stiffness.figures.views import VIEWS, View, views_in_words

__all__ = [
    "VIEWS",
    "View",
    "class_matrices",
    "draw_all",
    "learning_rate_matrices",
    "profiles",
    "save",
    "stiffness_curves",
    "superclass_matrices",
    "views_in_words",
]
