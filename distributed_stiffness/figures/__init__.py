"""Figures of a study: functions from a Dataset to a matplotlib Figure, and `draw_all`.

They use matplotlib's Figure without pyplot: they run without a display and leave nothing open.
"""

from distributed_stiffness.figures.blocks import block_curves
from distributed_stiffness.figures.curves import stiffness_curves
from distributed_stiffness.figures.equal_loss import equal_loss_curves
from distributed_stiffness.figures.folder import draw_all
from distributed_stiffness.figures.heatmap import (
    class_matrices,
    learning_rate_matrices,
    superclass_matrices,
)
from distributed_stiffness.figures.neighbours import neighbour_curves
from distributed_stiffness.figures.paired import paired_figure
from distributed_stiffness.figures.pictures import pictures_of
from distributed_stiffness.figures.profile import profiles
from distributed_stiffness.figures.spectrum import spectra
from distributed_stiffness.figures.style import save
from distributed_stiffness.figures.teaching import teaching_examples
from distributed_stiffness.figures.views import VIEWS, View, views_in_words

__all__ = [
    "VIEWS",
    "View",
    "block_curves",
    "class_matrices",
    "draw_all",
    "equal_loss_curves",
    "learning_rate_matrices",
    "neighbour_curves",
    "paired_figure",
    "pictures_of",
    "profiles",
    "save",
    "spectra",
    "stiffness_curves",
    "superclass_matrices",
    "teaching_examples",
    "views_in_words",
]
