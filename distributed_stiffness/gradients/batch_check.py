"""A check of every batch while it is at hand, by a way that shares nothing with rules and layouts.

Of some examples of the batch, drawn at random, the unit gradients are added up with random signs.
Plain autograd gives the same sum in one backward pass, parameter by parameter: it is the gradient
of Σ ±loss_i / |g_i|. One of those examples is run alone, the others in two halves, drawn at
random: rows that depend on the company which they were made in are found too, as are rows
of other examples, and parameters whose use was not seen. (A directional derivative by forward mode
would cost as much, lacks kernels, and names no parameter: docs/design/0009-checks.md.)

Axis letters: N examples of the batch, K that are checked, T positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distributed_stiffness.certainty import allowed_error
from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients.batches import Nest, count_examples, take
from distributed_stiffness.gradients.gram import Factors, Rows
from distributed_stiffness.gradients.kinks import Kinks
from distributed_stiffness.gradients.recipe import Layer, Recipe, laid_out
from distributed_stiffness.gradients.reference import Reference, real_numbers

if TYPE_CHECKING:
    from distributed_stiffness.gradients.per_example import PerExampleGradients

CHECKED_SHARE = 0.1  # of each batch, and one at least, unless a plan says otherwise
# Examples among which a fault is looked for; others are added where fewer differ.
_SUSPECTS = 4
# What rounding leaves of a sum of K unit gradients, over √K, by the dtype of the rows.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}
# Two right ways agree to this in float64; and an example with itself in other company.
EXACT, INDEPENDENT = 1e-7, 1e-5


@dataclass(frozen=True, eq=False)
class Drawn:
    """Examples of a batch that are checked, and the signs of their gradients in the sum."""

    places: Tensor  # (K,) int64, in the order of the draw, on the CPU
    signs: Tensor  # (K,) float64

    def companies(self) -> list[Drawn]:
        """Return one example alone, and two halves of the others; of few, these together."""
        n = len(self.signs)
        parts = self._cut(1, (n + 1) // 2 if n > 8 else n)
        return [part for part in parts if len(part.signs)]

    def halves(self) -> list[Drawn]:
        """Return the first half and the second."""
        return self._cut(len(self.signs) // 2)

    def _cut(self, *places: int) -> list[Drawn]:
        edges = (0, *places, len(self.signs))
        parts = [slice(*edge) for edge in itertools.pairwise(edges)]
        return [Drawn(self.places[part], self.signs[part]) for part in parts]

    def among_others(self, n: int) -> Drawn:
        """Add others of the batch's N, where there are fewer than tell a fault of company."""
        free = torch.ones(n, dtype=torch.bool, device="cpu")
        free[self.places] = False
        others = free.nonzero().flatten()[: max(0, _SUSPECTS - len(self.places))]
        signs = torch.ones(len(others), dtype=torch.float64, device="cpu")
        return Drawn(torch.cat([self.places, others]), torch.cat([self.signs, signs]))

    @staticmethod
    def of(n: int, share: float, random: torch.Generator, less_wanted: Tensor) -> Drawn:
        """Draw a share of N examples, rounded by chance, those of `less_wanted` last."""
        chance = float(torch.rand((), generator=random, device="cpu"))
        k = min(n, math.floor(share * n + chance + 1e-9))
        order = torch.randperm(n, generator=random, device="cpu")
        if len(less_wanted):
            last = torch.isin(order, less_wanted.cpu())
            order = torch.cat([order[~last], order[last]])
            k = min(k, max(1, int((~last).sum())))
        signs = torch.randint(0, 2, (k,), generator=random, device="cpu") * 2 - 1
        return Drawn(order[:k], signs.double())


@dataclass(frozen=True)
class Difference:
    """What lies between the two sums, by parameter, in units of a gradient's norm."""

    by_parameter: Mapping[str, float]

    @property
    def size(self) -> float:
        """Of all parameters together; NaN where a number is none."""
        return math.sqrt(sum(value**2 for value in self.by_parameter.values()))


class BatchCheck:
    """Compares some rows of one batch with plain autograd, and finds out why they differ.

    Args:
        gradients: that make the rows; what they make wrong is noted there.
        inputs: of the batch, N first, on the device.
        targets: of the batch.
        share: of the examples, which is compared.
    """

    def __init__(
        self, gradients: PerExampleGradients, inputs: Nest, targets: Nest, share: float
    ) -> None:
        self._gradients, self._inputs, self._targets = gradients, inputs, targets
        self._share = share
        self.is_read_anew = False  # whose the rows are was found in this batch itself

    def agrees(self, made: Sequence[tuple[Recipe, Rows]], kinks: Kinks | None) -> bool:
        """Whether the rows stand; if not, they are to be made again, another way.

        Args:
            made: rows, each of the parameters of a recipe.
            kinks: of the pass: examples near one are the last to be drawn, since plain autograd in
                float32 may put them on another side.

        Raises:
            GradientError: examples depend on each other, or no way gives the right gradients.
        """
        gradients = self._gradients
        near = torch.empty(0, device="cpu") if kinks is None else kinks.examples()
        n = count_examples(self._inputs)
        for _, rows in made:
            if not torch.isfinite(rows.norm).all():
                raise GradientError(said_infinite(rows.norm))
        drawn = Drawn.of(n, self._share, gradients.random, near)
        if not len(drawn.signs):
            return True
        found = self._difference(drawn, made)
        if found.size <= gradients.tolerance * math.sqrt(len(drawn.signs)):
            if self.is_read_anew:
                gradients.distrust_shapes()
            return True
        if not self.is_read_anew and n > 1:
            self.is_read_anew = True
            return False
        worst = self._worst(drawn, made)
        drawn = worst.among_others(n)
        few = take((self._inputs, self._targets), drawn.places)
        exact = gradients.in_float64
        require_independence(exact, few)
        alone = _by_rules(exact, few, drawn.signs)
        wrong = {n: size for n, size in alone.items() if not size <= EXACT * len(drawn.signs)}
        if wrong and gradients.take_another_way(wrong):
            return False
        if wrong:
            raise GradientError(said_wrong(wrong))
        self._require_no_company(exact, few, drawn)
        # Rounding, which the error bound measures: of other batches so much is expected.
        size = self._difference(worst, made).size / math.sqrt(len(worst.signs))
        allowed = allowed_error(gradients.precision.name)
        if gradients.rounding_is_refused and not size <= allowed:
            raise GradientError(
                f"rounding moves gradients by {size:.2g} of their length, above the {allowed:g}"
                " that is allowed: try precision='float64', or a loss of (outputs, targets) in"
                " place of a WholeLoss; allow_error=True gives the numbers all the same"
            )
        gradients.tolerance = max(gradients.tolerance, 2 * size)
        if self.is_read_anew:  # as these rows were: made again they are the same
            gradients.distrust_shapes()
        return True

    def _difference(self, drawn: Drawn, made: Sequence[tuple[Recipe, Rows]]) -> Difference:
        return compare(drawn, self._inputs, self._targets, made, self._gradients.plain)

    def _worst(self, drawn: Drawn, made: Sequence[tuple[Recipe, Rows]]) -> Drawn:
        """Return the few examples that differ most, by halving."""
        while len(drawn.signs) > _SUSPECTS:
            sizes = {half: self._difference(half, made).size for half in drawn.halves()}
            drawn = max(sizes, key=lambda half: _or_infinite(sizes[half]))
        return drawn

    def _require_no_company(
        self, exact: PerExampleGradients, few: tuple[Nest, Nest], drawn: Drawn
    ) -> None:
        """Compare examples in the company of the batch with the same alone, in float64."""
        everyone = torch.arange(len(drawn.signs), device="cpu")
        company = exact.unit_of(self._inputs, self._targets, drawn.places)
        for one, other in zip(company, exact.unit_of(*few, everyone), strict=True):
            for name in one:
                size = float(torch.linalg.vector_norm(one[name] - other[name]))
                if not size <= INDEPENDENT:
                    raise GradientError(said_dependence(name, size))


def require_independence(exact: PerExampleGradients, few: tuple[Nest, Nest]) -> None:
    """Compare the sum of a few examples' gradients with the sum of each one's alone.

    Both are plain autograd's.

    Args:
        exact: gradients in float64.
        few: inputs and targets.

    Raises:
        GradientError: they differ: the examples depend on each other.
    """
    require_same_sum(exact, few, *exact.plain.gradients(*few))


def require_same_sum(
    exact: PerExampleGradients, few: tuple[Nest, Nest], unit_NP: Tensor, norms_N: Tensor
) -> None:
    """The same, of examples whose gradients alone are known.

    Args:
        exact: gradients in float64.
        few: inputs and targets.
        unit_NP: of each alone, of unit norm.
        norms_N: at true scale.

    Raises:
        GradientError: see there.
    """
    n = len(norms_N)
    if n < 2:
        return
    factors = torch.ones(n, dtype=torch.float64, device="cpu")
    factors[1::2] = -1.0
    together = exact.plain.unit_sums(few[0], few[1], norms_N.cpu(), factors)
    apart = exact.plain.by_name(factors.to(unit_NP.device) @ unit_NP)
    for name, total in together.items():
        size = float(torch.linalg.vector_norm(real_numbers(total) - apart[name]))
        if not size <= INDEPENDENT * n:
            raise GradientError(said_dependence(name, size))


def _by_rules(
    exact: PerExampleGradients, few: tuple[Nest, Nest], signs_K: Tensor
) -> dict[str, float]:
    """Return how far the rules are from plain autograd, by parameter, in float64."""
    made, scale = exact.scaled(*few)
    length = norm_of(made)
    expected = exact.plain.unit_sums(*few, length * scale, signs_K)
    weights = signs_K.to(length.device) * torch.where(length > 0, 1 / length, 0.0)
    return {
        name: float(
            torch.linalg.vector_norm(torch.tensordot(weights.to(g.dtype), g, 1) - expected[name])
        )
        for name, g in made.items()
    }


def said_infinite(norm_N: Tensor) -> str:
    """Say that gradients are not finite."""
    bad = (~torch.isfinite(norm_N)).nonzero().flatten().tolist()
    return (
        f"the gradients of {len(bad)} of {len(norm_N)} examples are not finite (the first of them"
        f" is number {bad[0]} of its batch): the network is not differentiable there, as a square"
        " root at 0 is not, or its numbers are too large"
    )


def said_dependence(name: str, size: float) -> str:
    """Say that examples depend on each other."""
    module = name.rpartition(".")[0] or "the network"
    return (
        f"the gradient of {name!r} (in {module}) changes by {size:.1g} of an example's whole"
        " gradient in other company: the examples depend on each other (batch statistics,"
        " attention or a loss across the batch, a path that one example takes for all, or chance),"
        " so that per-example gradients are not defined; use running statistics, switch dropout"
        " off, or give a loss of one example at a time"
    )


def said_wrong(sizes: Mapping[str, float]) -> str:
    """Say that a gradient comes out wrong, whichever way it is made."""
    worst = max(sizes, key=lambda name: _or_infinite(sizes[name]))
    return (
        f"the gradient of {worst!r} differs from plain autograd's by {sizes[worst]:.1g} of an"
        " example's whole gradient, whichever way it is made, so that it is not given: leave it out"
        " with parameters=, or look for a derivative in the network that is not that of its"
        " outputs"
    )


def norm_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each example's whole gradient, (N,) float64."""
    norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients.values()]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
    return total


def compare(
    drawn: Drawn,
    inputs: Nest,
    targets: Nest,
    made: Sequence[tuple[Recipe, Rows]],
    plain: Reference,
) -> Difference:
    """Compare rows of a batch with plain autograd.

    Args:
        drawn: which examples.
        inputs: of the batch, N first.
        targets: of the batch.
        made: rows, each of the parameters of a recipe.
        plain: gradients of the network, in the precision of the batch.
    """
    all_norms = torch.stack([rows.norm.cpu() for _, rows in made]).amax(0)
    norms = all_norms[drawn.places]
    expected: dict[str, Tensor] = {}
    for part in drawn.companies():
        few, theirs = take((inputs, targets), part.places)
        sums = plain.unit_sums(few, theirs, all_norms[part.places], part.signs)
        for name, grad in sums.items():
            flat = laid_out(grad.unsqueeze(0))[0]
            expected[name] = expected[name] + flat if name in expected else flat
    weights = drawn.signs / torch.where(norms > 0, norms, 1.0)
    found: dict[str, float] = {}
    for recipe, rows in made:
        sums = _sums(rows, recipe, weights * rows.norm.cpu()[drawn.places], drawn.places)
        for name in recipe.numbers if len(made) == 1 else (*recipe.used, *recipe.unused):
            difference = expected[name] if name not in sums else expected[name] - sums[name]
            size = float(torch.linalg.vector_norm(difference))
            found[name] = max(size, found.get(name, 0.0))
    return Difference(found)


def _sums(rows: Rows, recipe: Recipe, weights_K: Tensor, places_K: Tensor) -> dict[str, Tensor]:
    """Add rows up with weights, by parameter, each flat as it lies in a row."""
    places = places_K.to(rows.norm.device)
    weights = weights_K.to(rows.norm.device, torch.float32)
    dense = rows.dense_NP[places]
    scaled = weights * rows.dense_scale_N[places]
    sizes = [recipe.numbers[name] for name in recipe.dense]
    total = torch.mv(dense.float().T, scaled)[: sum(sizes)]
    sums = dict(zip(recipe.dense, torch.split(total, sizes), strict=True))
    for weight, factors in zip(recipe.factored, rows.factors, strict=True):
        layer = recipe.layers[weight]
        sums |= _sum_of_factors(factors.map(lambda t: t[places]), layer, weights)
    return sums


def _sum_of_factors(factors: Factors, layer: Layer, weights_K: Tensor) -> dict[str, Tensor]:
    A, D = factors.A_NTd, factors.D_NTp
    if D.dim() == 2:
        n_rows = layer.numbers // A.shape[2]
        weighted = (A * weights_K[:, None, None]).flatten(0, 1)
        total = A.new_zeros(n_rows, A.shape[2]).index_add_(0, D.flatten(), weighted)
        return {layer.weight: total.flatten()}
    weighted = (D * weights_K[:, None, None]).flatten(0, 1)
    total = weighted.T @ A.flatten(0, 1)
    found = {layer.weight: (total.T if layer.is_transposed else total).flatten()}
    if layer.bias is not None:
        found[layer.bias] = weighted.T @ factors.b_NT.flatten()
    return found


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
