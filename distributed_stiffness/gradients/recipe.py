"""By which rule the gradient of each parameter is made, and what that costs.

The recipe is read from a network and a few examples: two passes, of 2 and of 3 examples, tell where
the examples stand in each tensor; every parameter then goes the cheapest way that is exact for it.

Axis letters: N examples, P parameters, T positions that share a weight, d inputs, p outputs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_stiffness.gradients.batches import Nest
from distributed_stiffness.gradients.capture import Capture, Captured, Use, hidden_uses
from distributed_stiffness.gradients.layout import PLAIN, Layout, candidates, choose
from distributed_stiffness.gradients.loss_head import LossHead

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
    """By which rule the gradient of each parameter is made; parameters by name."""

    layers: Mapping[str, Layer]  # by weight: all that could be kept as factors
    factored: tuple[str, ...]  # weights of those that are
    structured: tuple[str, ...]  # materialised by a rule of rules/
    functional: tuple[str, ...]  # torch.func: vmap(grad)
    one_by_one: tuple[str, ...]  # autograd on one example at a time
    unused: tuple[str, ...]  # no use in the forward pass: the gradient is 0
    rules: Mapping[str, str]  # parameter -> the rule's name, or why it has none
    uses: Mapping[str, int]  # source -> calls with a rule that take it
    through: Mapping[str, tuple[str, ...]]  # parameter -> tensors made of it that calls take
    copying: frozenset[int]  # numbers of calls that copy a source for each example
    layouts: Mapping[int, Layout]  # number of a use -> where the examples stand, unless first
    making_work: Mapping[str, int]  # parameter -> multiply-adds that make it for one example
    captured_numbers: int  # inputs, outputs and gradients of all uses, for one example

    @property
    def dense(self) -> tuple[str, ...]:
        """Parameters of the dense row, in its order."""
        return self.structured + self.functional + self.one_by_one

    @property
    def factored_parameters(self) -> frozenset[str]:
        """Weights and biases that are kept as factors."""
        return frozenset(name for w in self.factored for name in self.layers[w].names)

    def with_factored(self, weights: Collection[str]) -> Recipe:
        """Return the same with these weights, and no others, kept as factors."""
        factored = tuple(w for w in self.layers if w in weights)
        kept = {name for w in factored for name in self.layers[w].names}
        everything = [*self.structured, *self.factored_parameters]
        order = {name: i for i, name in enumerate(self.rules)}
        structured = sorted((n for n in everything if n not in kept), key=order.__getitem__)
        return replace(self, factored=factored, structured=tuple(structured))

    def restricted(self, names: Collection[str]) -> Recipe:
        """Return the recipe of these parameters alone."""
        layers = {
            weight: layer
            if layer.bias in names
            else replace(layer, bias=None, numbers=layer.inputs * layer.outputs)
            for weight, layer in self.layers.items()
            if weight in names
        }
        everything = (*self.structured, *self.factored_parameters)
        kept = [name for name in everything if name in names]
        alone = replace(
            self,
            layers=layers,
            factored=(),
            structured=tuple(kept),
            functional=tuple(name for name in self.functional if name in names),
            one_by_one=tuple(name for name in self.one_by_one if name in names),
            unused=tuple(name for name in self.unused if name in names),
        )
        return alone.with_factored([w for w in self.factored if w in layers])


@dataclass(frozen=True)
class Pass:
    """One forward pass over some examples, and the loss at its end."""

    inputs: Nest
    targets: Nest
    n: int
    capture: Capture
    head: LossHead
    outputs: Sequence[Tensor]  # those that the loss uses

    def backward(self, directions: Sequence[Tensor] | None = None) -> Sequence[Tensor | None]:
        """Return the gradient at the output of each use; `directions` instead of the head's."""
        uses = self.capture.uses
        if not uses or not any(o.requires_grad for o in self.outputs):
            return [None] * len(uses)
        outputs, starts = zip(
            *(
                (o, d)
                for o, d in zip(self.outputs, directions or self.head.directions, strict=True)
                if o.requires_grad
            ),
            strict=True,
        )
        found = torch.autograd.grad(
            outputs,
            [use.edge for use in uses],
            grad_outputs=starts,
            allow_unused=True,
            retain_graph=directions is not None,
        )
        return [
            None if grad is None else grad.reshape(use.output_shape)
            for use, grad in zip(uses, found, strict=True)
        ]

    def backward_from(self, example: int) -> Sequence[Tensor | None]:
        """Return the same of one example's loss alone."""
        chosen = torch.arange(self.n) == example
        return self.backward(
            [
                d * chosen.to(d.device).reshape(-1, *[1] * (d.dim() - 1))
                for d in self.head.directions
            ]
        )


def read_recipe(
    run: Callable[[int, Collection[int]], Pass],
    parameters: Mapping[str, Tensor],
    split_functional: Callable[[tuple[str, ...]], tuple[tuple[str, ...], tuple[str, ...]]],
) -> Recipe:
    """Read the recipe from passes over 2 and over 3 examples.

    Args:
        run: a pass over the first n examples, told which calls copy a source for each example.
        parameters: in play.
        split_functional: tells which of some parameters torch.func can differentiate.
    """
    two, whole = run(2, ()), run(3, ())
    copying = _copying(two.capture, whole.capture)
    if copying:
        two, whole = run(2, copying), run(3, copying)
    small, capture = two.capture, whole.capture
    why = small.unstructured | capture.unstructured
    for name in hidden_uses(whole.outputs, capture):
        why.setdefault(name, "a call that torch does not show")
    fitting = _fitting_layouts(small, capture, why)
    grads = (
        [whole.backward_from(example) for example in range(whole.n)]
        if any(len(layouts) > 1 for layouts in fitting.values())
        else []
    )
    layouts = {
        use.number: _choose(fitting[use.number], [grad[i] for grad in grads])
        for i, use in enumerate(capture.uses)
        if use.number in fitting
    }
    return _sort_parameters(whole, why, layouts, copying, parameters, split_functional)


def _copying(two: Capture, three: Capture) -> frozenset[int]:
    """Calls whose output grows with the number of examples though they take sources alone."""
    growing = {
        name
        for name, source in three.derived.items()
        if name not in two.derived or two.derived[name].tensor.shape != source.tensor.shape
    }
    return frozenset(
        three.derived[name].made_by
        for name in growing
        if not growing.intersection(three.derived[name].made_of)
    )


def _fitting_layouts(
    small: Capture, capture: Capture, why: dict[str, str]
) -> dict[int, list[Layout]]:
    """Find where the examples can stand in each use; note in `why` where there is no place."""
    before = {use.number: use for use in small.uses}
    fitting = {}
    for use in capture.uses:
        two = before.get(use.number)
        reason = None
        layouts: list[Layout] = []
        if two is None or two.names != use.names:
            reason = "another path for another number of examples"
        else:
            layouts = _fit(two, use)
            if not layouts:
                reason = "examples are not a dimension of its own"
            elif use.spoiled:
                reason = "its input or output is overwritten in place"
        if reason is None:
            fitting[use.number] = layouts
        else:
            why |= dict.fromkeys(use.names.values(), reason)
    return fitting


def _fit(two: Use, three: Use) -> list[Layout]:
    """Layouts that fit output and input alike, and that the rule can work with."""
    fitting = candidates(two.output_shape, three.output_shape)
    if three.call.input is not None and two.call.input is not None:
        of_input = candidates(two.call.input.shape, three.call.input.shape)
        fitting = [layout for layout in fitting if layout in of_input]
    if not three.rule.any_leading:
        return [layout for layout in fitting if layout.axis == 0]
    return fitting


def _choose(fitting: list[Layout], grads: Sequence[Tensor | None]) -> Layout:
    if len(fitting) == 1:
        return fitting[0]
    return choose(fitting, [g for g in grads if g is not None])


def _sort_parameters(
    whole: Pass,
    why: dict[str, str],
    layouts: Mapping[int, Layout],
    copying: frozenset[int],
    parameters: Mapping[str, Tensor],
    split_functional: Callable[[tuple[str, ...]], tuple[tuple[str, ...], tuple[str, ...]]],
) -> Recipe:
    capture, n = whole.capture, whole.n
    uses = [replace(use, layout=layouts.get(use.number, PLAIN)) for use in capture.uses]
    count = Counter(name for use in uses for name in use.names.values())
    # What cannot be done for a tensor made of parameters cannot be done for those.
    for name in [name for name in why if name in capture.derived]:
        for parameter in capture.derived[name].parameters:
            why.setdefault(parameter, why[name])
    through: dict[str, list[str]] = defaultdict(list)
    for name in count:
        if name in capture.derived:
            for parameter in capture.derived[name].parameters:
                through[parameter].append(name)
    hard = tuple(name for name in parameters if name in why)
    functional, one_by_one = split_functional(hard)
    easy = [name for name in parameters if name not in why]
    used = tuple(name for name in easy if count[name] or name in through)
    layers = _layers(uses, {name for name in used if name not in through}, parameters)
    rules = dict(_rule_names(uses, through, parameters))
    recipe = Recipe(
        layers=layers,
        factored=(),
        structured=used,
        functional=functional,
        one_by_one=one_by_one,
        unused=tuple(name for name in easy if name not in used),
        rules={name: why.get(name) or rules.get(name, "none") for name in parameters},
        uses=count,
        through={name: tuple(found) for name, found in through.items()},
        copying=copying,
        layouts={k: v for k, v in layouts.items() if not v.plain},
        making_work=_making_work(uses, n, through, parameters),
        captured_numbers=sum(_numbers(use) for use in uses) // n,
    )
    return recipe.with_factored([w for w, layer in layers.items() if layer.factors_are_cheaper])


def _numbers(use: Use) -> int:
    return (0 if use.call.input is None else use.call.input.numel()) + 2 * use.output_shape.numel()


def _making_work(
    uses: Sequence[Use],
    n: int,
    through: Mapping[str, list[str]],
    parameters: Mapping[str, Tensor],
) -> dict[str, int]:
    by_source: Counter[str] = Counter()
    for use in uses:
        for role, name in use.names.items():
            output = use.output_shape
            by_source[name] += use.rule.making_work(role, use.call, output) // n
    return {
        name: by_source[name] + sum(by_source[z] for z in through.get(name, ()))
        for name in parameters
    }


def _rule_names(
    uses: Iterable[Use], through: Mapping[str, list[str]], parameters: Mapping[str, Tensor]
) -> Iterable[tuple[str, str]]:
    by_source: dict[str, list[str]] = defaultdict(list)
    for use in uses:
        for name in use.names.values():
            if use.rule.name not in by_source[name]:
                by_source[name].append(use.rule.name)
    for name in parameters:
        found = [
            *by_source.get(name, ()),
            *(r for z in through.get(name, ()) for r in by_source[z]),
        ]
        if found:
            yield name, ", ".join(dict.fromkeys(found))


def _layers(
    uses: Sequence[Use], candidates_: Collection[str], parameters: Mapping[str, Tensor]
) -> dict[str, Layer]:
    """Find the weights whose gradients are sums over positions, in every use."""
    by_name: dict[str, list[tuple[str, Use]]] = defaultdict(list)
    for use in uses:
        for role, name in use.names.items():
            by_name[name].append((role, use))
    layers = {}
    for name, found in by_name.items():
        if name not in candidates_ or not all(
            role == "weight" and use.rule.covers_positions(use.call) for role, use in found
        ):
            continue
        positions = [
            Captured.of(
                use, torch.zeros(use.output_shape, device=parameters[name].device)
            ).positions()
            for _, use in found
        ]
        if len({p.by_index for p in positions}) > 1:
            continue  # a tied embedding: unit vectors in one use, numbers in the other
        bias = _joined_bias(found, by_name, candidates_)
        numbers = sum(parameters[n].numel() for n in (name, bias) if n is not None)
        layers[name] = Layer(
            name,
            bias,
            positions=sum(p.left_NTp.shape[1] for p in positions),
            inputs=positions[0].right_NTd.shape[2],
            outputs=1 if positions[0].by_index else positions[0].left_NTp.shape[2],
            numbers=numbers,
            by_index=positions[0].by_index,
        )
    return layers


def _joined_bias(
    found: Sequence[tuple[str, Use]],
    by_name: Mapping[str, Sequence[tuple[str, Use]]],
    candidates_: Collection[str],
) -> str | None:
    """Return the bias that all uses of a weight, and no others, take."""
    names = {use.names.get("bias") for _, use in found}
    bias = next(iter(names))
    if len(names) > 1 or bias is None or bias not in candidates_:
        return None
    same_side = len({use.rule.grad_is_left for _, use in found}) == 1
    same_uses = [u.number for _, u in by_name[bias]] == [u.number for _, u in found]
    joins = same_side and all(use.rule.joins_bias for _, use in found)
    return bias if same_uses and joins else None
