"""In which form the gradient of each parameter is held, and what that costs.

The recipe is read from a network and a few examples; every parameter goes the cheapest way that is
exact for it. How a batch's gradients are made is read from the batch (reading.py): a recipe says
what a row is, and so is the same for all rows that meet.

Axis letters: N examples, P parameters, T positions that share a weight, d inputs, p outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_stiffness.gradients.capture import Captured, Use

# What the sums and products of one element of a tile cost beside the products of rows, in
# multiply-adds: they wait for memory. Measured on a CPU (docs/design/0004-layers.md).
ELEMENT = 128


@dataclass(frozen=True)
class Layer:
    """A weight (with its bias) that meets positions, and what its gradients cost in both forms."""

    weight: str
    bias: str | None  # joined with it: in play, and used with this weight alone
    positions: int  # T, over all uses
    inputs: int  # d
    outputs: int  # p
    numbers: int  # of weight and bias together
    by_index: bool = False  # an embedding: its inputs are unit vectors
    is_transposed: bool = False  # the weight is (inputs, outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters of the layer."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def is_centred(self) -> bool:
        """Whether factors have the mean of the inputs as one more position (gram.py)."""
        return self.positions > 1 and not self.by_index

    @property
    def kept_positions(self) -> int:
        """Positions of the factors."""
        return self.positions + self.is_centred

    @property
    def factored_work(self) -> int:
        """Multiply-adds of a pair that is kept as factors: T²(d + p), and the elements' own."""
        d_and_p = self.inputs if self.by_index else self.inputs + self.outputs
        return self.kept_positions**2 * (d_and_p + ELEMENT)

    @property
    def factored_numbers(self) -> int:
        """Numbers held for an example that is kept as factors."""
        each = self.inputs + (2 if self.by_index else self.outputs)  # an index has 8 bytes
        return self.kept_positions * (each + 1)

    @property
    def making_work(self) -> int:
        """Multiply-adds that make the gradient of one example."""
        return self.positions * self.inputs * (1 if self.by_index else self.outputs)

    @property
    def is_shorter(self) -> bool:
        """Whether factors are fewer numbers than the gradient."""
        return self.factored_numbers < self.numbers

    @property
    def factors_are_cheaper(self) -> bool:
        """Whether a pair of examples costs less in factored form (the pair rule)."""
        return self.factored_work < self.numbers


@dataclass(frozen=True)
class Work:
    """What gradients and their products cost, in multiply-adds."""

    passes: int  # forward and backward pass over one example, without its parameters' gradients
    making: int  # one example's gradient, passes included
    pair: int  # the product of two gradients


@dataclass(frozen=True)
class Recipe:
    """In which form the gradient of each parameter is held; parameters by name."""

    layers: Mapping[str, Layer]  # by weight: all that could be kept as factors
    factored: tuple[str, ...]  # weights of those that are
    used: tuple[str, ...]  # in the forward pass, in the order of a row
    unused: tuple[str, ...]  # no use so far: the gradient is 0
    functional: tuple[str, ...]  # of those used: torch.func, vmap(grad)
    one_by_one: tuple[str, ...]  # autograd on one example at a time
    rules: Mapping[str, str]  # parameter -> the rule's name, or why it has none
    numbers: Mapping[str, int]  # real numbers of each parameter
    making_work: Mapping[str, int]  # parameter -> multiply-adds that make it for one example
    captured_numbers: int  # inputs, outputs and gradients of all uses, for one example

    @property
    def dense(self) -> tuple[str, ...]:
        """Parameters of the dense row, in its order."""
        kept = self.factored_parameters
        return tuple(name for name in self.used if name not in kept)

    @property
    def structured(self) -> tuple[str, ...]:
        """Parameters of the dense row that a rule of rules/ makes."""
        without = {*self.functional, *self.one_by_one}
        return tuple(name for name in self.dense if name not in without)

    @property
    def factored_parameters(self) -> frozenset[str]:
        """Weights and biases that are kept as factors."""
        return frozenset(name for w in self.factored for name in self.layers[w].names)

    def with_factored(self, weights: Collection[str]) -> Recipe:
        """Return the same with these weights, and no others, kept as factors."""
        return replace(self, factored=tuple(w for w in self.layers if w in weights))

    def with_used(self, names: Collection[str]) -> Recipe:
        """Return the same with these parameters in the row."""
        order = (*self.used, *self.unused)
        return replace(
            self,
            used=tuple(n for n in self.numbers if n in order and (n in self.used or n in names)),
            unused=tuple(n for n in self.unused if n not in names),
        )

    def without_layer(self, weight: str) -> Recipe:
        """Return the same without factors of a weight."""
        layers = {name: layer for name, layer in self.layers.items() if name != weight}
        factored = tuple(name for name in self.factored if name != weight)
        return replace(self, layers=layers, factored=factored)

    def restricted(self, names: Collection[str]) -> Recipe:
        """Return the recipe of these parameters alone."""

        def of(some: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in some if name in names)

        layers = {
            weight: layer
            if layer.bias is None or layer.bias in names
            else replace(layer, bias=None, numbers=self.numbers[weight])
            for weight, layer in self.layers.items()
            if weight in names
        }
        return replace(
            self,
            layers=layers,
            factored=tuple(w for w in self.factored if w in layers),
            used=of(self.used),
            unused=of(self.unused),
            functional=of(self.functional),
            one_by_one=of(self.one_by_one),
        )


def numbers_of(parameter: Tensor) -> int:
    """Return how many real numbers a parameter is."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def laid_out(part: Tensor) -> Tensor:
    """Flatten gradients, (n, *shape), channels last, as those of convolutions are made.

    By the shape alone, not by how they lie: passes of one network may make the same gradients in
    several memory formats, and their rows are multiplied with each other. Complex numbers are two
    real ones, which makes Re(g_i* g_j) of their product.
    """
    part = part.movedim(2, -1) if part.dim() > 3 else part
    if part.is_complex():
        part = torch.view_as_real(part.resolve_conj())
    return part.reshape(len(part), -1)


def make_recipe(
    captured: Sequence[tuple[str, str, Captured]],
    through: Mapping[str, Sequence[str]],
    why: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    functional: Collection[str],
    one_by_one: Collection[str],
) -> Recipe:
    """Read the recipe from what a few examples used.

    Args:
        captured: source, role and use, in the order of the calls.
        through: parameter -> tensors made of it that calls take.
        why: parameter -> why it has no rule.
        parameters: in play.
        functional: of those without a rule, what torch.func differentiates.
        one_by_one: and what autograd alone does.
    """
    by_source: dict[str, list[tuple[str, Captured]]] = defaultdict(list)
    for source, role, one in captured:
        by_source[source].append((role, one))
    without = {*functional, *one_by_one}
    used = [n for n in parameters if n in without or by_source.get(n) or through.get(n)]
    alone = {n for n in used if n not in without and not through.get(n)}
    layers = _layers(by_source, alone, parameters)
    rules = dict(_rule_names(by_source, through, parameters))
    recipe = Recipe(
        layers=layers,
        factored=(),
        used=tuple(used),
        unused=tuple(name for name in parameters if name not in used),
        functional=tuple(name for name in parameters if name in functional),
        one_by_one=tuple(name for name in parameters if name in one_by_one),
        rules={name: why.get(name) or rules.get(name, "none") for name in parameters},
        numbers={name: numbers_of(p) for name, p in parameters.items()},
        making_work=_making_work(by_source, through, parameters),
        captured_numbers=_captured_numbers(captured),
    )
    return recipe.with_factored([w for w, layer in layers.items() if layer.factors_are_cheaper])


def _captured_numbers(captured: Sequence[tuple[str, str, Captured]]) -> int:
    uses = {id(one): one for _, _, one in captured}.values()
    return sum(_numbers(one.use) for one in uses) // max(1, *(one.n for one in uses), 1)


def _numbers(use: Use) -> int:
    return (0 if use.call.input is None else use.call.input.numel()) + 2 * use.output_shape.numel()


def _making_work(
    by_source: Mapping[str, Sequence[tuple[str, Captured]]],
    through: Mapping[str, Sequence[str]],
    parameters: Mapping[str, Tensor],
) -> dict[str, int]:
    work = {
        name: sum(
            one.rule.making_work(role, one.use.call, one.use.output_shape) // one.n
            for role, one in found
        )
        for name, found in by_source.items()
    }
    return {
        name: work.get(name, 0) + sum(work.get(z, 0) for z in through.get(name, ()))
        for name in parameters
    }


def _rule_names(
    by_source: Mapping[str, Sequence[tuple[str, Captured]]],
    through: Mapping[str, Sequence[str]],
    parameters: Mapping[str, Tensor],
) -> Iterable[tuple[str, str]]:
    for name in parameters:
        found = [
            one.rule.name
            for source in (name, *through.get(name, ()))
            for _, one in by_source.get(source, ())
        ]
        if found:
            yield name, ", ".join(dict.fromkeys(found))


def _layers(
    by_source: Mapping[str, Sequence[tuple[str, Captured]]],
    candidates: Collection[str],
    parameters: Mapping[str, Tensor],
) -> dict[str, Layer]:
    """Find the weights whose gradients are sums over positions, in every use."""
    layers = {}
    for name, found in by_source.items():
        if name not in candidates or not all(
            role == "weight" and one.rule.covers_positions(one.call) for role, one in found
        ):
            continue
        positions = [one.take(slice(0, 1)).positions() for _, one in found]
        if len({p.by_index for p in positions}) > 1:
            continue  # a tied embedding: unit vectors in one use, numbers in the other
        bias = joined_bias(name, by_source)
        bias = bias if bias in candidates else None
        numbers = sum(parameters[n].numel() for n in (name, bias) if n is not None)
        layers[name] = Layer(
            name,
            bias,
            positions=sum(p.left_NTp.shape[1] for p in positions),
            inputs=positions[0].right_NTd.shape[2],
            outputs=1 if positions[0].by_index else positions[0].left_NTp.shape[2],
            numbers=numbers,
            by_index=positions[0].by_index,
            is_transposed=not found[0][1].rule.grad_is_left,
        )
    return layers


def joined_bias(name: str, by_source: Mapping[str, Sequence[tuple[str, Captured]]]) -> str | None:
    """Return the bias that all uses of a weight, and no others, take."""
    found = by_source[name]
    names = {one.use.names.get("bias") for _, one in found}
    bias = next(iter(names))
    if len(names) > 1 or bias is None:
        return None
    same_uses = [id(one) for _, one in by_source.get(bias, ())] == [id(one) for _, one in found]
    same_side = len({one.rule.grad_is_left for _, one in found}) == 1
    joins = same_side and all(one.rule.joins_bias for _, one in found)
    return bias if same_uses and joins else None
