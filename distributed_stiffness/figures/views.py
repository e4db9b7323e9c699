"""Every view of a study: its name, what to see in it, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from distributed_stiffness.analysis import Summary
from distributed_stiffness.figures.blocks import block_curves
from distributed_stiffness.figures.curves import stiffness_curves
from distributed_stiffness.figures.equal_loss import equal_loss_curves
from distributed_stiffness.figures.heatmap import class_matrices, superclass_matrices
from distributed_stiffness.figures.neighbours import neighbour_curves
from distributed_stiffness.figures.paired import paired_figure
from distributed_stiffness.figures.pictures import pictures_of
from distributed_stiffness.figures.profile import profiles
from distributed_stiffness.figures.spectrum import spectra
from distributed_stiffness.figures.teaching import teaching_examples

# Sections of the report.
CLASSES = "Classes"
TRAINING, MEANS = "Over training", "Means"
DISTANCE = "Input distance"
NEIGHBOURS = "Neighbouring measures"
EXAMPLES = "Single examples"


@dataclass(frozen=True, kw_only=True)
class View:
    """One figure of a study."""

    name: str
    title: str
    caption: str  # what to see
    draw: Callable[[Any], Figure]  # of a summary that has what it needs
    needs: str = "class_matrix"  # the field of a summary without which there is no such figure
    in_report: bool = True
    alone: Mapping[str, Any] = field(default_factory=dict)  # fields of it where one step is there
    section: str = "More views"  # of the report; sections come in the order of their first views

    @property
    def sentence(self) -> str:
        """What is drawn: the first sentence of the caption."""
        return self.caption.partition(". ")[0].removesuffix(".") + "."

    def is_of(self, numbers: Summary) -> bool:
        """Whether a study has the numbers for it."""
        return getattr(numbers, self.needs) is not None

    def of(self, numbers: Summary) -> View:
        """Return the view as a study shows it: over training only where there are several steps."""
        one_step = numbers.curves.sizes.get("iteration", 1) == 1
        return replace(self, **self.alone) if one_step else self


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
            section=CLASSES,
        ),
        View(
            name="class_matrices_cosine",
            title="Class matrices, cosine stiffness",
            caption="Each cell is the mean cosine of the pairs of two classes: how much they help"
            " each other, not only how often.",
            draw=lambda numbers: class_matrices(numbers.class_matrix, "cosine"),
            section=CLASSES,
        ),
        View(
            name="superclass_matrices_sign",
            title="Super-class matrices, sign stiffness",
            caption="Each cell is the mean sign of the pairs of two super-classes, which no label"
            " told the network. A diagonal that stands out more than its classes alone would make"
            " it shows that it found them.",
            draw=lambda numbers: superclass_matrices(numbers.superclass_matrix, "sign"),
            needs="superclass_matrix",
            section=CLASSES,
        ),
        View(
            name="superclass_matrices_cosine",
            title="Super-class matrices, cosine stiffness",
            caption="Each cell is the mean cosine of the pairs of two super-classes.",
            draw=lambda numbers: superclass_matrices(numbers.superclass_matrix, "cosine"),
            needs="superclass_matrix",
            section=CLASSES,
        ),
        View(
            name="stiffness_curves",
            title="Stiffness over training",
            caption="Above, the means within and between classes, each ± one standard error over"
            " examples (the band); below, loss and accuracy on the same axis of steps. Stiffness"
            " that falls towards 0 while the validation loss turns upwards is the paper's mark of"
            " over-fitting.",
            draw=lambda numbers: stiffness_curves(numbers.within_between, numbers.curves),
            section=TRAINING,
            alone={
                "section": MEANS,
                "title": "Stiffness, loss and accuracy",
                "caption": "Above, the means within and between classes, each ± one standard error"
                " over examples; below, loss and accuracy.",
            },
        ),
        View(
            name="split_blocks",
            title="Stiffness of training and validation pairs",
            caption="Means within and between classes for pairs of two training examples, of a"
            " training and a validation example, and of two validation examples. The paper (v3)"
            " finds the three alike; where training pairs part from the others, the network treats"
            " what it was trained on differently. Bands are ± one standard error over examples.",
            draw=lambda numbers: block_curves(numbers.blocks),
            needs="blocks",
            section=TRAINING,
            alone={"section": MEANS},
        ),
        View(
            name="equal_loss",
            title="Learning rates at equal training loss",
            caption="Means within and between classes against the learning rate, where each run"
            " first reaches the same training loss. Version 1 of the paper finds that"
            " between-class stiffness grows with the rate, version 2 that stiffness falls. Between"
            " two checkpoints numbers are interpolated in the logarithm of the loss; bars are ± one"
            " standard error over examples, of these networks: other seeds may differ by more.",
            draw=lambda numbers: equal_loss_curves(numbers.equal_loss),
            needs="equal_loss",
            section=TRAINING,
        ),
        View(
            name="permuted",
            title="Two studies of the same examples",
            caption="Means of this store and of another one of the same examples, such as of"
            " networks that were trained on permuted labels (--against), and their difference pair"
            " by pair. Its bands, ± one standard error, keep what both networks share: the"
            " examples.",
            draw=lambda numbers: paired_figure(numbers.paired),
            needs="paired",
            section=TRAINING,
            alone={"section": MEANS},
        ),
        View(
            name="distance_profile",
            title="Stiffness against input distance",
            caption=_DISTANCE.format(pairs="two examples of one class"),
            draw=lambda numbers: profiles(numbers.distance_profile, length=numbers.critical_length),
            needs="distance_profile",
            section=DISTANCE,
        ),
        View(
            name="distance_profile_between",
            title="Stiffness against input distance, between classes",
            caption=_DISTANCE.format(pairs="two examples of different classes"),
            draw=lambda numbers: profiles(numbers.distance_profile, relation="between"),
            needs="distance_profile",
            in_report=False,
            section=DISTANCE,
        ),
        View(
            name="distance_profile_all",
            title="Stiffness against input distance, all pairs",
            caption=_DISTANCE.format(pairs="any two examples"),
            draw=lambda numbers: profiles(numbers.distance_profile, relation="all"),
            needs="distance_profile",
            in_report=False,
            section=DISTANCE,
        ),
        View(
            name="neighbours",
            title="Neighbouring measures over training",
            caption="Gradient coherence, m-coherence, diversity, signal to noise, effective rank,"
            " alignment with the labels, and confusion where pairs are stored. Solid lines and dots"
            " are of products of gradients, as their authors define them, in which large gradients"
            " count for more; dashed lines and open dots of cosines. Where the two part, a few"
            " examples with large gradients decide.",
            draw=lambda numbers: neighbour_curves(numbers.neighbours),
            needs="neighbours",
            alone={"title": "Neighbouring measures"},
            section=NEIGHBOURS,
        ),
        View(
            name="spectrum",
            title="Spectrum of the loss-gradient kernel",
            caption="The largest eigenvalues as shares of their sum. A"
            " step down after one less than the number of classes says that the gradients know"
            " their labels and little more; a long tail, that each example has a direction of its"
            " own. The effective rank is the exponential of the shares' entropy.",
            draw=lambda numbers: spectra(numbers.spectrum),
            needs="spectrum",
            section=NEIGHBOURS,
        ),
        View(
            name="teaching_examples",
            title="Examples that teach most and conflict most",
            caption="The examples whose mean cosine with their own class, and with the other"
            " classes, is highest and lowest (at the last step, where there are several), with"
            " their position in the data set"
            " and that mean. Below 0, a step on the example raises the others' loss on average."
            " Without the data set at hand there are no pictures.",
            draw=lambda numbers: teaching_examples(
                numbers.teaching,
                partial(pictures_of, numbers.attrs, directory=numbers.data_directory),
            ),
            needs="teaching",
            section=EXAMPLES,
        ),
    )
}


def views_in_words() -> list[str]:
    """Return a line for each view: its name and one sentence."""
    width = max(map(len, VIEWS))
    return [f"{name:<{width}}  {view.sentence}" for name, view in VIEWS.items()]
