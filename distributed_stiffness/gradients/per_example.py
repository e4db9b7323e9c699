"""Per-example gradients of every parameter of any network, from one forward and backward pass.

The forward pass runs under `Capture`; one backward pass, started from each example's scaled δ
(loss_head.py), stops at the outputs of the captured calls. The rest is algebra (rules/, gram.py).
What has no structured rule goes through `torch.func` for those parameters alone, and what even that
cannot do is differentiated one example at a time, with a warning. Some examples of every batch are
compared with plain autograd (batch_check.py): what that finds wrong goes another way, or is an
error.

Axis letters: N examples, P parameters.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from distributed_stiffness.gradients.batch_check import (
    CHECKED_SHARE,
    TOLERANCE,
    BatchCheck,
    norm_of,
)
from distributed_stiffness.gradients.batches import Nest, count_examples, map_tensors, prepare, take
from distributed_stiffness.gradients.evidence import EXAMPLES
from distributed_stiffness.gradients.gram import Rows, collect, unit_rows
from distributed_stiffness.gradients.in_play import (
    device_of,
    parameters_in_play,
    refuse_dependence,
)
from distributed_stiffness.gradients.kinks import Kinks, Moved, Rounded, Rounding
from distributed_stiffness.gradients.loss_head import Loss, double_loss
from distributed_stiffness.gradients.memory_format import image_in, lay_out_for_a_cpu
from distributed_stiffness.gradients.mending import Doubtful, together
from distributed_stiffness.gradients.network import Network
from distributed_stiffness.gradients.parts import Parts
from distributed_stiffness.gradients.passes import Passes
from distributed_stiffness.gradients.precision import (
    fast_float32,
    full_float32,
    precision_mode,
)
from distributed_stiffness.gradients.recipe import Recipe, Work
from distributed_stiffness.gradients.reference import Reference

T = TypeVar("T")
Known = set[tuple[int, int, int]]  # generation of the recipe, first example, last + 1

FACTOR_BYTES = 4  # of a number in a factor, which is float32 in every precision (gram.py)
# Passes in float64 take so much fewer examples: numbers are twice as long, and a CPU's convolutions
# make all patches of a batch, which should stay in the cache.
_SMALLER = {"cpu": 8, "cuda": 2}


class RecipeChanged(Exception):  # no error: rows are made again
    """A batch has shown that rows need another form: those made before do not fit it."""


@dataclass
class _Current:
    """The recipe, which the same gradients in another precision have too."""

    recipe: Recipe
    generation: int = 0  # how often batches have shown that gradients must be made otherwise


class PerExampleGradients:
    """The per-example gradients of one network and loss.

    Args:
        model: in evaluation mode. It is not changed: a copy is run; or such a copy.
        loss: "cross_entropy", a callable (outputs, targets) -> (N,), or a `WholeLoss`.
        sample: (inputs, targets), of which `EXAMPLES` are looked at to read the recipe.
        parameters: glob patterns of the parameters in play; None takes all that require gradients.
        precision: a name of precision.py.
        factored: weights kept as factors, of those that can be (`recipe.layers`); None takes those
            whose pairs cost less that way.

    Raises:
        GradientError: the network makes examples depend on each other (batch statistics, dropout).
        ModelError: no parameter is in play, or the network cannot be copied.
        StudyError: no such precision on the network's device.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        loss: Loss,
        sample: tuple[Nest, Nest],
        *,
        parameters: Sequence[str] | str | None = None,
        precision: str = "float32",
        factored: Collection[str] | None = None,
    ) -> None:
        _keep_freed_memory()
        device = device_of(model.module if isinstance(model, Network) else model)
        self.device, self.precision = device, precision_mode(precision, device)
        self._sample: tuple[Nest, Nest] = take(sample, slice(EXAMPLES))
        few = map_tensors(lambda t: t.to(device), self._sample[0])
        dtype = self.precision.network
        self.network = (
            model.in_dtype(dtype) if isinstance(model, Network) else Network(model, dtype, few)
        )
        refuse_dependence(self.network.module)
        self.loss = double_loss(loss)
        self.checked_share, self.tolerance = CHECKED_SHARE, TOLERANCE[self.precision.rows]
        # Whether rounding above what is allowed is an error at once: no error bound will say it.
        self.rounding_is_refused = False
        self._image_format = torch.preserve_format
        if device.type == "cpu" and self.precision.network == torch.float32:
            self._image_format = lay_out_for_a_cpu(self.network, few)
        self._bind(parameters_in_play(self.network.module, parameters))
        self.random = torch.Generator(device="cpu").manual_seed(0)
        with full_float32():
            recipe = self._passes.read_recipe(*self._on_device(*self._sample))
        self._current = _Current(recipe if factored is None else recipe.with_factored(factored))
        self.hard: dict[str, str] = {}  # parameters that go another way than by rules, and why

    @property
    def recipe(self) -> Recipe:
        """In which form each gradient is held."""
        return self._current.recipe

    @property
    def n_parameters(self) -> int:
        """Parameters in play, in real numbers."""
        return sum(self.recipe.numbers.values())

    def with_factored(self, weights: Collection[str]) -> PerExampleGradients:
        """Return the same with these weights, and no others, kept as factors."""
        changed = copy.copy(self)
        changed._current = _Current(self.recipe.with_factored(weights))
        changed.__dict__.pop("in_float64", None)  # it has the other recipe
        return changed

    def work(self) -> Work:
        """Return what making and multiplying gradients costs."""
        recipe, numbers = self.recipe, self.recipe.numbers
        passes = 2 * sum(recipe.making_work[n] for n, p in self.parameters.items() if p.dim() > 1)
        making = passes + sum(recipe.making_work[name] for name in recipe.structured)
        making += 2 * passes * len((*recipe.functional, *recipe.one_by_one))
        pair = sum(recipe.layers[weight].factored_work for weight in recipe.factored)
        return Work(passes, making, pair + sum(numbers[name] for name in recipe.dense))

    def bytes_per_example(self) -> tuple[int, int]:
        """Return what one example takes: its row as it is held, and while it is being made.

        A pass keeps every captured input and output with its gradient, about twice over for what
        lies between the captured calls.
        """
        recipe, itemsize = self.recipe, self.precision.network.itemsize
        dense = sum(recipe.numbers[name] for name in recipe.dense)
        factors = sum(recipe.layers[weight].factored_numbers for weight in recipe.factored)
        making = 2 * recipe.captured_numbers * itemsize
        if self.precision.network != self.precision.rows:
            making += dense * itemsize  # before it is cast
        whole = (*recipe.functional, *recipe.one_by_one)
        making += 2 * itemsize * sum(recipe.numbers[name] for name in whole)
        # At least 1: where no parameter is used a row is empty.
        row = dense * self.precision.rows.itemsize + factors * FACTOR_BYTES
        return max(1, row), max(1, making)

    # Rows

    def settled(self, make: Callable[[], T]) -> T:
        """Make rows that meet; again, if a batch has shown that they need another form."""
        while True:
            generation = self._current.generation
            with contextlib.suppress(RecipeChanged):
                made = make()
                if self._current.generation == generation:
                    return made

    def rows(self, inputs: Nest, targets: Nest) -> Rows:
        """Return the unit gradients of a few examples, with their norms and losses.

        Args:
            inputs: N first.
            targets: N first.
        """
        n = count_examples(inputs)
        (made,) = self.settled(
            lambda: self.rows_of(
                lambda some: take((inputs, targets), some), slice(0, n), batch=n, mended_together=n
            )
        )
        return made

    def rows_of(
        self,
        read: Callable[[slice], tuple[Nest, Nest]],
        examples: slice,
        *,
        batch: int,
        mended_together: int,
        groups: Sequence[Collection[str]] | None = None,
        into: Sequence[Rows] | None = None,
        known: Known | None = None,
    ) -> list[Rows]:
        """Return the unit gradients of many examples, with their norms and losses.

        Args:
            read: returns (inputs, targets) of some examples, N first.
            examples: whose rows are made.
            batch: examples of a pass.
            mended_together: after so many, those of them that are near a kink are looked at again.
            groups: the parameters of each of the rows returned; None takes all, once.
            into: room for the rows of each group, which is filled and returned.
            known: batches that were checked: made again they are the same, and are not checked
                again. Those that are made now are added.

        Raises:
            GradientError: gradients are not finite, or examples depend on each other.
            RecipeChanged: rows made before need another form: begin again (`settled`).
        """
        doubts: list[Doubtful] = []
        known = set() if known is None else known
        before = frozenset(known)

        def make(some: slice, room: Sequence[Rows] | None) -> list[Rows]:
            inputs, targets = read(some)
            key = self._current.generation, some.start, some.stop
            share = 0.0 if key in before else max(self.checked_share, 1 / (some.stop - some.start))
            with full_float32():
                made, kinks = self._one_batch(inputs, targets, groups, room, share=share)
            known.add(key)
            if kinks is not None:
                doubts.append(Doubtful.of(kinks, inputs, targets, some.start - examples.start))
            return made

        def mend(made: list[Rows]) -> None:
            if any(map(len, doubts)):
                size = max(1, batch // _SMALLER[self.device.type])
                share = 0.0 if known <= before else self.checked_share
                self._mend(made, doubts, groups, size, share=share)
            doubts.clear()

        return collect(make, examples, batch, into, finish=mend, finished_together=mended_together)

    def _one_batch(
        self,
        inputs: Nest,
        targets: Nest,
        groups: Sequence[Collection[str]] | None,
        into: Sequence[Rows] | None = None,
        *,
        share: float,
    ) -> tuple[list[Rows], Kinks | None]:
        """Make the rows of one batch, and compare a share of them with plain autograd."""
        inputs, targets = self._on_device(inputs, targets)
        checked, generation = BatchCheck(self, inputs, targets, share), self._current.generation
        while True:
            kinks = Kinks(count_examples(inputs), self._rounding) if self._is_rounded else None
            with kinks or contextlib.nullcontext():
                done = self._passes.run(inputs, targets)
            parts = self._passes.parts(done, self.hard, anew=checked.is_read_anew)
            self._take_in(parts)
            recipes = [self.recipe]
            if groups is not None:
                recipes = [self.recipe.restricted(names) for names in groups]
            rooms: Sequence[Rows | None] = into or [None] * len(recipes)
            with fast_float32():
                rows = [self._rows(parts, *both) for both in zip(recipes, rooms, strict=True)]
            if checked.agrees(list(zip(recipes, rows, strict=True)), kinks):
                if self._current.generation != generation:
                    raise RecipeChanged  # batches before were made as this one was not
                return rows, kinks

    def _take_in(self, parts: Parts) -> None:
        """Take parameters into the rows that no batch before has used."""
        used = {n for n in self.recipe.unused if parts.uses(n)}
        if used:
            self._change(self.recipe.with_used(used))

    def _change(self, recipe: Recipe) -> None:
        self._current.recipe = recipe
        self._current.generation += 1
        raise RecipeChanged

    def _rows(self, parts: Parts, recipe: Recipe, into: Rows | None) -> Rows:
        width = sum(recipe.numbers[name] for name in recipe.dense)
        fits = into is not None and into.dense_NP.shape[1] == width
        room = into.dense_NP if into is not None and fits else None
        factors = []
        for weight in recipe.factored:
            found = parts.factors(recipe.layers[weight])
            if found is None:
                self._change(self.recipe.without_layer(weight))
            else:
                factors.append(found)
        dense, square = parts.dense(recipe.dense, self.precision.network, room)
        head = parts.done.head
        return unit_rows(
            factors,
            dense,
            square,
            scale=head.scale,
            loss=head.loss,
            correct=head.correct,
            precision=self.precision,
            into=room,
        )

    @property
    def _is_rounded(self) -> bool:
        """Whether a pass may put examples on the wrong side of a kink."""
        return self.precision.network != torch.float64

    def _mend(
        self,
        made: list[Rows],
        doubtful: Sequence[Doubtful],
        groups: Sequence[Collection[str]] | None,
        size: int,
        *,
        share: float,
    ) -> None:
        """Make rows again in float64 where float32 was on the wrong side of a kink."""
        exact = self.in_float64
        with full_float32():
            wrong = [some.on_the_wrong_side(exact._run) for some in together(doubtful, size)]
            for some in together(wrong, size):
                true_rows, _ = exact._one_batch(some.inputs, some.targets, groups, share=share)
                for k, true in enumerate(true_rows):
                    made[k] = made[k].with_room_for(true)
                    made[k].put(some.places, true)

    @functools.cached_property
    def _rounding(self) -> tuple[Moved, ...]:
        """What rounding moves the units of each call with a kink by (kinks.py)."""
        n = count_examples(self._sample[0])
        with Rounded(n) as rounded:
            self._run(*self._sample)
        if not rounded.distances:
            return ()
        with Rounding(rounded) as rounding:
            self.in_float64._run(*self._sample)
        moved: tuple[Moved, ...] = rounding.moved()
        return moved

    def _run(self, inputs: Nest, targets: Nest) -> None:
        """Make a forward pass, of the calls that a pass for gradients makes."""
        self._passes.forward(*self._on_device(inputs, targets))

    # The whole gradients of a few examples

    def materialised(self, inputs: Nest, targets: Nest) -> dict[str, Tensor]:
        """Return every parameter's gradient for each example, (N, *shape), at true scale."""
        gradients, scale = self.scaled(inputs, targets)
        return {
            name: g * scale.to(g.real.dtype).reshape(-1, *[1] * (g.dim() - 1))
            for name, g in gradients.items()
        }

    def scaled(self, inputs: Nest, targets: Nest) -> tuple[dict[str, Tensor], Tensor]:
        """Return numbers and a scale, (N,) float64, whose product the gradients are.

        The numbers are there also where the squares of the gradients are below 1e-308.
        """
        with full_float32():
            done = self._passes.run(*self._on_device(inputs, targets))
            parts = self._passes.parts(done, self.hard, anew=True)
            with fast_float32():
                return {name: parts.whole(name) for name in self.parameters}, done.head.scale

    def unit_of(self, inputs: Nest, targets: Nest, places: Tensor) -> list[dict[str, Tensor]]:
        """Return the unit gradients of some of a batch's examples, made in this company."""
        with full_float32():
            done = self._passes.run(*self._on_device(inputs, targets))
            parts = self._passes.parts(done, self.hard, anew=True)
            found = []
            for place in places.tolist():
                one = {n: parts.part(n, slice(place, place + 1)) for n in self.parameters}
                length = norm_of(one)
                length = torch.where(length > 0, length, 1.0)
                found.append({n: (g / length.to(g.real.dtype))[0] for n, g in one.items()})
        return found

    @functools.cached_property
    def plain(self) -> Reference:
        """The same gradients by plain autograd, in the precision of the passes."""
        dtype = self.precision.network
        return Reference(self.network, self.loss, list(self.parameters), dtype=dtype)

    @functools.cached_property
    def in_float64(self) -> PerExampleGradients:
        """The same network and rows, but for float64 passes."""
        if self.precision.network == torch.float64:
            return self
        exact = copy.copy(self)
        exact.__dict__.pop("plain", None)
        # oneDNN, which likes channels last, knows no float64.
        exact._image_format = torch.contiguous_format
        exact.network = self.network.in_dtype(torch.float64)
        exact.network.module.to(memory_format=exact._image_format)
        exact.precision = replace(self.precision, network=torch.float64)
        exact._bind(self.parameters, self._passes)
        return exact

    def take_another_way(self, differences: Mapping[str, float]) -> bool:
        """Make some gradients another way from now on: they are wrong by so much.

        Returns:
            Whether there was another one: torch.func in place of rules, then one by one.
        """
        by_rules = differences.keys() - self._passes.by_functions
        for name, size in differences.items():
            self.hard[name] = (
                f"its calls do not tell it: it differs from one-example autograd by {size:.1g} of"
                " an example's whole gradient, as where a derivative is taken inside the network,"
                " or code that torch does not show takes it"
            )
        self._current.generation += 1
        return bool(by_rules) or self._passes.one_by_one(differences.keys())

    def distrust_shapes(self) -> None:
        """Find in every batch anew whose its rows are: here it does not follow from shapes."""
        if self._passes.reader.trusts_shapes:
            self._passes.reader.trusts_shapes = False
            self._current.generation += 1

    def _bind(self, in_play: Collection[str], like: Passes | None = None) -> None:
        """Take the parameters of the network, of which those of these names are in play."""
        named: dict[str, Tensor] = dict(self.network.module.named_parameters())
        self.parameters = {name: p for name, p in named.items() if name in in_play}
        constants = [p for name, p in named.items() if name not in in_play]
        self._passes = Passes(self.network, self.loss, self.parameters, constants)
        if like is not None:
            self._passes.learn_from(like)

    def _on_device(self, inputs: Nest, targets: Nest) -> tuple[Nest, Nest]:
        prepared = prepare(inputs, self.precision.network, self.device)
        prepared = map_tensors(lambda t: image_in(self._image_format, t), prepared)
        return prepared, map_tensors(lambda t: t.to(self.device), targets)


def _keep_freed_memory() -> None:
    """Let the allocator keep what a pass frees for the next one.

    glibc gives memory back to the kernel, page by page, unless a process has freed a large piece
    once: then it keeps pieces of up to that size. A fifth of a pass's time, where pages are dear.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
