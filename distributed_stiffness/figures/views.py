"""Every view of a study: its name, what to see in it, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from distributed_stiffness.analysis import Summary
from distributed_stiffness.figures.curves import stiffness_curves
from distributed_stiffness.figures.heatmap import class_matrices, superclass_matrices
from distributed_stiffness.figures.profile import profiles


@dataclass(frozen=True, kw_only=True)
class View:
    """One figure of a study."""

    name: str
    title: str
    caption: str  # what to see
    draw: Callable[[Any], Figure]  # of a summary that has what it needs
    needs: str = "class_matrix"  # the field of a summary without which there is no such figure
    in_report: bool = True

    @property
    def sentence(self) -> str:
        """What is drawn: the first sentence of the caption."""
        return self.caption.partition(". ")[0].removesuffix(".") + "."

    def is_of(self, numbers: Summary) -> bool:
        """Whether a study has the numbers for it."""
        return getattr(numbers, self.needs) is not None


_DISTANCE = (
    "Mean stiffness of {pairs} against the cosine distance of their inputs. Bands, and the bars at"
    " ξ, are ± one standard error over examples. A triangle marks the critical length ξ, the zero"
    " of a line fitted to all bins; without one the line does not fall by more than two of its"
    " errors, or reaches zero outside the distances that occur."
)

VIEWS: Mapping[str, View] = {
    view.name: view
    for view in (
        View(
            name="class_matrices_sign",
            title="Class matrices, sign stiffness",
            caption="Each cell is the share of pairs of two classes that help each other, minus the"
            " share that harm each other; self-pairs are left out. Look at the diagonal first (a"
            " class with itself), then for blocks of classes that help (red) or harm (blue) each"
            " other. White is 0, and all panels have one scale.",
            draw=lambda numbers: class_matrices(numbers.class_matrix, "sign"),
        ),
        View(
            name="class_matrices_cosine",
            title="Class matrices, cosine stiffness",
            caption="Each cell is the mean cosine of the pairs of two classes: how much they help"
            " each other, not only how often.",
            draw=lambda numbers: class_matrices(numbers.class_matrix, "cosine"),
        ),
        View(
            name="superclass_matrices_sign",
            title="Super-class matrices, sign stiffness",
            caption="Each cell is the mean sign of the pairs of two super-classes, which no label"
            " told the network. A diagonal that stands out more than its classes alone would make"
            " it shows that it found them.",
            draw=lambda numbers: superclass_matrices(numbers.superclass_matrix, "sign"),
            needs="superclass_matrix",
        ),
        View(
            name="superclass_matrices_cosine",
            title="Super-class matrices, cosine stiffness",
            caption="Each cell is the mean cosine of the pairs of two super-classes.",
            draw=lambda numbers: superclass_matrices(numbers.superclass_matrix, "cosine"),
            needs="superclass_matrix",
        ),
        View(
            name="stiffness_curves",
            title="Stiffness over training",
            caption="Above, the means within and between classes, each ± one standard error over"
            " examples (the band); below, loss and accuracy on the same axis of steps. Stiffness"
            " that falls towards 0 while the validation loss turns upwards is the paper's mark of"
            " over-fitting.",
            draw=lambda numbers: stiffness_curves(numbers.within_between, numbers.curves),
        ),
        View(
            name="distance_profile",
            title="Stiffness against input distance",
            caption=_DISTANCE.format(pairs="two examples of one class"),
            draw=lambda numbers: profiles(numbers.distance_profile, length=numbers.critical_length),
            needs="distance_profile",
        ),
        View(
            name="distance_profile_between",
            title="Stiffness against input distance, between classes",
            caption=_DISTANCE.format(pairs="two examples of different classes"),
            draw=lambda numbers: profiles(numbers.distance_profile, relation="between"),
            needs="distance_profile",
            in_report=False,
        ),
        View(
            name="distance_profile_all",
            title="Stiffness against input distance, all pairs",
            caption=_DISTANCE.format(pairs="any two examples"),
            draw=lambda numbers: profiles(numbers.distance_profile, relation="all"),
            needs="distance_profile",
            in_report=False,
        ),
    )
}


def views_in_words() -> list[str]:
    """Return a line for each view: its name and one sentence."""
    width = max(map(len, VIEWS))
    return [f"{name:<{width}}  {view.sentence}" for name, view in VIEWS.items()]
