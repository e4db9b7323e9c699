"""Where the examples stand in the tensors of one use of a parameter.

Most networks keep examples first. Others carry them second (T, N, d), or fold them with positions
into one dimension: (N·T, d), examples outside, or (T·N, d), examples inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The examples are dimension `axis`, which they may share with `fold` positions each."""

    axis: int = 0
    fold: int = 1
    outside: bool = True  # the examples' index varies slower than the positions'

    @property
    def plain(self) -> bool:
        """Whether the examples are the first dimension, alone."""
        return self.axis == 0 and self.fold == 1

    def first(self, X: Tensor) -> Tensor:
        """Bring the examples to the front; positions stay where they are."""
        if self.fold == 1:
            return X.movedim(self.axis, 0)
        sizes = (-1, self.fold) if self.outside else (self.fold, -1)
        X = X.reshape(*X.shape[: self.axis], *sizes, *X.shape[self.axis + 1 :])
        return X.movedim(self.axis if self.outside else self.axis + 1, 0)

    def beside(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a parameter that lay beside X, beside one example of `first(X)`."""
        positions = () if self.fold == 1 else (1,)
        return (*shape[: self.axis], *positions, *shape[self.axis + 1 :])

    def per_example(self, rows: Tensor) -> Tensor:
        """Sum what was computed for every row, (N·fold, …), over the rows of each example."""
        sizes = (-1, self.fold) if self.outside else (self.fold, -1)
        return rows.reshape(*sizes, *rows.shape[1:]).sum(1 if self.outside else 0)


PLAIN = Layout()


def candidates(two: Sequence[int], three: Sequence[int]) -> list[Layout]:
    """Return the layouts that fit a tensor's shapes for 2 and for 3 examples; none if none does."""
    if len(two) != len(three):
        return []
    changed = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(changed) != 1:
        return []
    (axis,) = changed
    fold, rest = divmod(two[axis], 2)
    if rest or three[axis] != 3 * fold:
        return []
    if fold == 1:
        return [Layout(axis)]
    return [Layout(axis, fold), Layout(axis, fold, outside=False)]


def choose(fitting: Sequence[Layout], grads_by_example: Sequence[Tensor]) -> Layout:
    """Choose by what one example's loss alone sends back: it must stay on that example's rows.

    Args:
        fitting: of `candidates`, at least one.
        grads_by_example: gradient at the use's output of the loss of example 0, of 1, ….
    """
    for layout in fitting:
        if all(
            not layout.first(grad)[[j for j in range(len(grads_by_example)) if j != i]].any()
            for i, grad in enumerate(grads_by_example)
        ):
            return layout
    return fitting[0]  # examples depend on each other: the self-check says so
