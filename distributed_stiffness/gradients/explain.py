"""What the gradients of a network cost, parameter by parameter, and by which rule they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from distributed_stiffness.gradients.batches import Examples, count_examples, pair, take
from distributed_stiffness.gradients.budget import fit, free_memory
from distributed_stiffness.gradients.evidence import EXAMPLES
from distributed_stiffness.gradients.loss_head import Loss, WholeLoss
from distributed_stiffness.gradients.per_example import FACTOR_BYTES, PerExampleGradients
from distributed_stiffness.gradients.recipe import Recipe
from distributed_stiffness.gradients.surroundings import in_fresh_surroundings
from distributed_stiffness.plan import Plan, in_words

FORMS = {
    "factors": "factors: inputs and output gradients are kept, the gradient is never made",
    "row": "row: the gradient is made, and multiplied with all others as one row",
    "torch.func": "torch.func: no rule; another pass, differentiated by vmap(grad)",
    "one by one": "one by one: no rule, nor torch.func; a backward pass for each example",
    "unused": "unused: takes no part in the loss; its gradient is 0",
}


@dataclass(frozen=True)
class Cost:
    """What a weight (with its bias) or another parameter costs."""

    parameters: tuple[str, ...]
    numbers: int  # of the parameters
    rule: str  # by which calls take it, or why there is no rule
    form: str  # a key of FORMS
    positions: int | None  # T, where that is told
    making: int  # multiply-adds that make one example's gradient
    pair: int  # multiply-adds of a pair of examples
    bytes: int  # held for an example
    share: float  # of all multiply-adds of the matrix


@dataclass(frozen=True)
class Explanation:
    """The table, and what holds for the whole network.

    `str()` lays it out for people, `to_json()` for machines.
    """

    costs: tuple[Cost, ...]
    pass_work: int  # multiply-adds of forward and backward pass, for one example
    pass_share: float  # of all multiply-adds
    n_examples: int
    loss_head: str
    precision: str
    plan: Plan

    @property
    def work(self) -> float:
        """Multiply-adds of the whole matrix."""
        made = self.plan.gradients_per_example
        making = self.pass_work + sum(cost.making for cost in self.costs)
        return self.n_examples * made * making + self.n_examples**2 / 2 * sum(
            cost.pair for cost in self.costs
        )

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can say."""
        return asdict(self) | {"multiply_adds": self.work}

    def __str__(self) -> str:
        return "\n".join([*_table(self._cells()), "", *self._notes()])

    def _cells(self) -> Iterator[tuple[str, ...]]:
        yield ("parameters", "numbers", "rule", "form", "T", "making", "pair", "held", "share")
        for cost in self.costs:
            first, *others = cost.parameters
            yield (
                first + "".join(f", {name.rpartition('.')[2]}" for name in others),
                f"{cost.numbers:,}",
                cost.rule,
                cost.form,
                "" if cost.positions is None else str(cost.positions),
                _short(cost.making),
                _short(cost.pair),
                in_words(cost.bytes),
                f"{cost.share:.1%}",
            )
        work = (_short(self.pass_work), "", "", f"{self.pass_share:.1%}")
        yield ("forward and backward pass", "", "", "", "", *work)

    def _notes(self) -> Iterator[str]:
        yield (
            f"{self.n_examples:,} examples: {_short(self.work)} multiply-adds in all; making is for"
            " one example, pair for two"
        )
        forms = {cost.form for cost in self.costs}
        yield from (text for form, text in FORMS.items() if form in forms)
        yield f"loss: {self.loss_head}"
        yield f"precision: {self.precision}"
        held = min(self.plan.panel_rows, self.n_examples)
        yield (
            f"memory: {in_words(held * self.plan.row_bytes)} of {in_words(self.plan.memory)} for"
            f" the gradients of {held:,} examples at a time"
            + (
                f", each made {self.plan.gradients_per_example:.1f} times"
                if self.plan.gradients_per_example > 1
                else ""
            )
        )
        yield f"checks: {self.plan.described_checks()}"


@in_fresh_surroundings
def explain(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    *,
    n_examples: int | None = None,
    parameters: Sequence[str] | str | None = None,
    precision: str = "float32",
    memory: int | None = None,
) -> Explanation:
    """Say by which rule each gradient is made, and what it costs, without making the matrix.

    Args:
        model: as in `cosine_matrix`.
        loss: as in `cosine_matrix`.
        examples: one at least.
        n_examples: for a matrix of so many; None: as many as there are `examples`.
        parameters: as in `cosine_matrix`.
        precision: as in `cosine_matrix`.
        memory: as in `cosine_matrix`.

    Raises:
        GradientError: per-example gradients are not defined.
        ModelError: the network does not fit the examples.
        StudyError: the memory holds no block of gradients.
    """
    few = pair(examples)
    n = n_examples or count_examples(few[0])
    sample = take(few, slice(EXAMPLES))
    gradients = PerExampleGradients(model, loss, sample, parameters=parameters, precision=precision)
    gradients, plan = fit(gradients, n_examples=n, memory=memory or free_memory())
    recipe = gradients.recipe
    pass_work = gradients.work().passes
    costs = list(_costs(gradients, recipe, pass_work))
    made = plan.gradients_per_example

    def work(cost: Cost) -> float:
        return n * made * cost.making + n**2 / 2 * cost.pair

    total = max(1.0, n * made * pass_work + sum(map(work, costs)))
    return Explanation(
        costs=tuple(replace(cost, share=work(cost) / total) for cost in costs),
        pass_work=pass_work,
        pass_share=n * made * pass_work / total,
        n_examples=n,
        loss_head=_loss_head(loss),
        precision=gradients.precision.name,
        plan=plan,
    )


def _costs(gradients: PerExampleGradients, recipe: Recipe, pass_work: int) -> Iterator[Cost]:
    itemsize = gradients.precision.rows.itemsize
    joined = {name: layer for layer in recipe.layers.values() for name in layer.names[1:]}
    for name in gradients.parameters:
        layer, rule = recipe.layers.get(name), recipe.rules[name]
        if name in recipe.factored_parameters:
            if layer is not None:
                yield Cost(
                    layer.names, layer.numbers, rule, "factors", layer.positions, 0,
                    layer.factored_work, layer.factored_numbers * FACTOR_BYTES, 0.0,
                )  # fmt: skip
            continue
        form, making = "row", recipe.making_work[name]
        if name in recipe.functional:
            form, making = "torch.func", 2 * pass_work
        elif name in recipe.one_by_one:
            form, making = "one by one", 2 * pass_work
        elif name in recipe.unused:
            yield Cost((name,), recipe.numbers[name], rule, "unused", None, 0, 0, 0, 0.0)
            continue
        place = layer or joined.get(name)
        yield Cost(
            (name,), recipe.numbers[name], rule, form, None if place is None else place.positions,
            making, recipe.numbers[name], recipe.numbers[name] * itemsize, 0.0,
        )  # fmt: skip


def _loss_head(loss: Loss) -> str:
    if isinstance(loss, WholeLoss):
        return (
            "in the network's own precision, unscaled: well-fitted examples may lose their signs;"
            " give a loss of (outputs, targets) if there is one"
        )
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return f"{name}, in float64 and with every example scaled to unit norm at the outputs"


def _short(number: float) -> str:
    """Return a number with three digits, such as 4.72M."""
    for unit in ("", "K", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    cells = list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    texts = (0, 2, 3)  # columns that are not numbers
    lines = [
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
