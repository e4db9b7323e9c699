"""Per-example gradients of every parameter of any network, from one forward and backward pass.

The forward pass runs under `Capture`; one backward pass, started from each example's scaled δ
(loss_head.py), stops at the outputs of the captured calls. The rest is algebra (rules/, gram.py).
What has no structured rule goes through `torch.func` for those parameters alone, and what even that
cannot do is differentiated one example at a time, with a warning.

Axis letters: N examples, P parameters.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distributed_stiffness.errors import GradientError, ModelError
from distributed_stiffness.gradients.batches import (
    Nest,
    arguments,
    count_examples,
    map_tensors,
    prepare,
    take,
    tensors,
)
from distributed_stiffness.gradients.capture import Capture, Captured, Source
from distributed_stiffness.gradients.decompositions import TakenApart
from distributed_stiffness.gradients.gram import Factors, Rows, collect, unit_rows
from distributed_stiffness.gradients.kinks import Kinks, Moved, Rounded, Rounding
from distributed_stiffness.gradients.layout import PLAIN
from distributed_stiffness.gradients.loss_head import (
    Loss,
    WholeLoss,
    double_loss,
    loss_head,
    losses_of,
    whole_loss_head,
)
from distributed_stiffness.gradients.memory_format import image_in, laid_out_for_a_cpu
from distributed_stiffness.gradients.mending import Doubtful, together
from distributed_stiffness.gradients.precision import (
    fast_float32,
    full_float32,
    precision_mode,
)
from distributed_stiffness.gradients.recipe import Layer, Pass, Recipe, Work, read_recipe
from distributed_stiffness.gradients.rules import Linear, Positions
from distributed_stiffness.tiling import pieces

# Examples from which a network is known: its recipe, what rounding does to it, the self-check.
EXAMPLES = 8
# A part of the gradients is made for so many examples at a time that it stays in the cache until
# it is in its place.
_BYTES_AT_A_TIME = {"cpu": 4 * 2**20, "cuda": 2**28}
FACTOR_BYTES = 4  # of a number in a factor, which is float32 in every precision (gram.py)
# Passes in float64 take so much fewer examples: numbers are twice as long, and a CPU's convolutions
# make all patches of a batch, which should stay in the cache.
_SMALLER = {"cpu": 8, "cuda": 2}
# Squares of float32 numbers are summed in float32 while their sum lies between these.
_SQUARES = 1e-20, 1e30


class PerExampleGradients:
    """The per-example gradients of one network and loss.

    Args:
        model: in evaluation mode. It is not changed; a copy is made where the precision asks.
        loss: "cross_entropy", a callable (outputs, targets) -> (N,), or a `WholeLoss`.
        sample: `EXAMPLES` (inputs, targets), or 3 at least, from which the recipe is read.
        parameters: glob patterns of the parameters in play; None takes all that require gradients.
        precision: a name of precision.py.
        factored: weights kept as factors, of those that can be (`recipe.layers`); None takes those
            whose pairs cost less that way.

    Raises:
        GradientError: the network makes examples depend on each other (batch statistics, dropout).
        ModelError: no parameter is in play.
        StudyError: no such precision on the network's device.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        sample: tuple[Nest, Nest],
        *,
        parameters: Sequence[str] | None = None,
        precision: str = "float32",
        factored: Collection[str] | None = None,
    ) -> None:
        refuse_dependence(model)
        _keep_freed_memory()
        in_play = parameters_in_play(model, parameters)
        self.device = next(iter(in_play.values())).device
        self.precision = precision_mode(precision, self.device)
        self.loss = double_loss(loss)
        self._one_at_a_time: set[str] = set()
        model = _in_dtype(model, self.precision.network)
        self.model, self._image_format = model, torch.preserve_format
        on_cpu = self.device.type == "cpu" and self.precision.network == torch.float32
        if on_cpu:
            self.model, self._image_format = laid_out_for_a_cpu(model, sample[0])
        self._bind(in_play)
        self._writes_inputs = False
        self._sample: tuple[Nest, Nest] = take(sample, slice(EXAMPLES))
        self.recipe = self._read_recipe(*sample)
        if factored is not None:
            self.recipe = self.recipe.with_factored(factored)

    @property
    def n_parameters(self) -> int:
        """Parameters in play."""
        return sum(p.numel() for p in self.parameters.values())

    def with_factored(self, weights: Collection[str]) -> PerExampleGradients:
        """Return the same with these weights, and no others, kept as factors."""
        changed = copy.copy(self)
        changed.recipe = self.recipe.with_factored(weights)
        return changed

    def work(self) -> Work:
        """Return what making and multiplying gradients costs."""
        recipe, numbers = self.recipe, {name: p.numel() for name, p in self.parameters.items()}
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
        dense = sum(self.parameters[name].numel() for name in recipe.dense)
        factors = sum(recipe.layers[weight].factored_numbers for weight in recipe.factored)
        making = 2 * recipe.captured_numbers * itemsize
        if self.precision.network != self.precision.rows:
            making += dense * itemsize  # before it is cast
        whole = (*recipe.functional, *recipe.one_by_one)
        making += 2 * itemsize * sum(self.parameters[name].numel() for name in whole)
        # At least 1: where no parameter is used a row is empty.
        row = dense * self.precision.rows.itemsize + factors * FACTOR_BYTES
        return max(1, row), max(1, making)

    def rows(self, inputs: Nest, targets: Nest) -> Rows:
        """Return the unit gradients of a few examples, with their norms and losses.

        Args:
            inputs: N first.
            targets: N first.
        """
        n = count_examples(inputs)
        (made,) = self.rows_of(
            lambda some: take((inputs, targets), some), slice(0, n), batch=n, mended_together=n
        )
        return made

    def rows_of(
        self,
        read: Callable[[slice], tuple[Nest, Nest]],
        examples: slice,
        *,
        batch: int,
        mended_together: int,
        recipes: Sequence[Recipe] | None = None,
        into: Sequence[Rows] | None = None,
    ) -> list[Rows]:
        """Return the unit gradients of many examples, with their norms and losses.

        Args:
            read: returns (inputs, targets) of some examples, N first.
            examples: whose rows are made.
            batch: examples of a pass.
            mended_together: after so many, those of them that are near a kink are looked at again.
            recipes: the parameters of each of the rows returned; None takes all, once.
            into: room for the rows of each recipe, which is filled and returned.
        """
        recipes = recipes or [self.recipe]
        doubts: list[Doubtful] = []

        def make(some: slice, room: Sequence[Rows] | None) -> list[Rows]:
            inputs, targets = read(some)
            with full_float32():
                kinks = Kinks(count_examples(inputs), self._rounding) if self._is_rounded else None
                made = self._one_pass(inputs, targets, recipes, room, kinks)
            if kinks is not None:
                doubts.append(Doubtful.of(kinks, inputs, targets, some.start - examples.start))
            return made

        def mend(made: Sequence[Rows]) -> None:
            if any(map(len, doubts)):
                self._mend(made, doubts, recipes, max(1, batch // _SMALLER[self.device.type]))
            doubts.clear()

        return collect(make, examples, batch, into, finish=mend, finished_together=mended_together)

    def _one_pass(
        self,
        inputs: Nest,
        targets: Nest,
        recipes: Sequence[Recipe],
        into: Sequence[Rows] | None,
        kinks: Kinks | None,
    ) -> list[Rows]:
        found = self._by_recipe(self._prepared(inputs), self._on_device(targets), kinks)
        rooms: Sequence[Rows | None] = into or [None] * len(recipes)
        with fast_float32():
            return [self._rows(found, *both) for both in zip(recipes, rooms, strict=True)]

    @property
    def _is_rounded(self) -> bool:
        """Whether a pass may put examples on the wrong side of a kink."""
        return self.precision.network != torch.float64

    def _mend(
        self,
        made: Sequence[Rows],
        doubtful: Sequence[Doubtful],
        recipes: Sequence[Recipe],
        size: int,
    ) -> None:
        """Make rows again in float64 where float32 was on the wrong side of a kink."""
        exact = self._in_float64
        with full_float32():
            wrong = [some.on_the_wrong_side(exact._run) for some in together(doubtful, size)]
            for some in together(wrong, size):
                true_rows = exact._one_pass(some.inputs, some.targets, recipes, None, None)
                for rows, true in zip(made, true_rows, strict=True):
                    for target, source in zip(rows.tensors(), true.tensors(), strict=True):
                        target[some.places] = source

    @functools.cached_property
    def _rounding(self) -> tuple[Moved, ...]:
        """What rounding moves the units of each call with a kink by (kinks.py)."""
        n = count_examples(self._sample[0])
        with Rounded(n) as rounded:
            self._run(*self._sample)
        if not rounded.distances:
            return ()
        with Rounding(rounded) as rounding:
            self._in_float64._run(*self._sample)
        moved: tuple[Moved, ...] = rounding.moved()
        return moved

    @torch.no_grad()
    def _run(self, inputs: Nest, targets: Nest) -> None:
        """Make a forward pass, of the calls that `_pass` makes."""
        targets = self._on_device(targets)
        args, kwargs = self._arguments(self._prepared(inputs), targets)
        with TakenApart():
            outputs = self._network.module(*args, **kwargs)
        if callable(self.loss):
            losses_of(self.loss, outputs, targets)

    @functools.cached_property
    def _in_float64(self) -> PerExampleGradients:
        """The same network and rows, but for float64 passes."""
        exact = copy.copy(self)
        # oneDNN, which likes channels last, knows no float64.
        exact._image_format = torch.contiguous_format
        exact.model = _in_dtype(self.model, torch.float64).to(memory_format=exact._image_format)
        exact.precision = replace(self.precision, network=torch.float64)
        exact._bind(self.parameters)
        return exact

    def _bind(self, in_play: Collection[str]) -> None:
        """Take the parameters of the model, of which those of these names are in play."""
        named: dict[str, Tensor] = dict(self.model.named_parameters())
        self.parameters = {name: p for name, p in named.items() if name in in_play}
        self._constants = [p for name, p in named.items() if name not in in_play]
        self._network = _network(self.model, self.loss)

    def _rows(self, found: _Found, recipe: Recipe, into: Rows | None) -> Rows:
        room = None if into is None else into.dense_NP
        dense, square = self._dense(found, recipe, room)
        made = unit_rows(
            [self._factors(found, recipe.layers[weight]) for weight in recipe.factored],
            dense,
            square,
            scale=found.done.head.scale,
            loss=found.done.head.loss,
            correct=found.done.head.correct,
            precision=self.precision,
            into=room,
        )
        if into is None:
            return made
        into.copy_(made)
        return into

    def materialised(self, inputs: Nest, targets: Nest, *, unit: bool = False) -> dict[str, Tensor]:
        """Return every parameter's gradient for each example, (N, *shape).

        At true scale, or with each example's whole gradient at unit norm (0 stays 0), which is
        there also where the squares of the true one are below 1e-308.
        """
        with full_float32():
            found = self._by_recipe(self._prepared(inputs), self._on_device(targets))
            with fast_float32():
                gradients = {name: self._whole(name, found) for name in self.parameters}
        factor = found.done.head.scale
        if unit:
            norms = [
                torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients.values()
            ]
            length = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
            factor = torch.where(length > 0, 1 / length, 0.0)
        return {
            name: g * factor.to(g.dtype).reshape(-1, *[1] * (g.dim() - 1))
            for name, g in gradients.items()
        }

    # One pass

    def _prepared(self, inputs: Nest) -> Nest:
        prepared = prepare(inputs, self.precision.network, self.device)
        return map_tensors(lambda t: image_in(self._image_format, t), prepared)

    def _on_device(self, targets: Nest) -> Nest:
        return map_tensors(lambda t: t.to(self.device), targets)

    def _forward(
        self, inputs: Nest, targets: Nest, copying: Collection[int]
    ) -> tuple[Capture, Nest]:
        args, kwargs = self._arguments(inputs, targets)
        seen = tensors((args, kwargs))
        with (
            torch.enable_grad(),
            Capture(self.parameters, self._constants, seen, copying) as capture,
        ):
            outputs = self._network.module(*args, **kwargs)
        return capture, outputs

    def _arguments(self, inputs: Nest, targets: Nest) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the network is called with: copies, if it writes into its inputs."""
        given = map_tensors(torch.clone, inputs) if self._writes_inputs else inputs
        return self._network.arguments(given, targets)

    def _pass(self, inputs: Nest, targets: Nest, copying: Collection[int]) -> Pass:
        n = count_examples(inputs)
        capture, outputs = self._forward(inputs, targets, copying)
        if isinstance(self.loss, WholeLoss):
            head = whole_loss_head(outputs, n)
        else:
            _require_examples_first(outputs, n)
            head = loss_head(self.loss, outputs, targets)
        return Pass(inputs, targets, n, capture, head, head.chosen(outputs))

    def _by_recipe(self, inputs: Nest, targets: Nest, kinks: Kinks | None = None) -> _Found:
        """Differentiate, and check that these examples use parameters as the recipe says.

        `kinks` watches the forward pass.

        Raises:
            GradientError: they do not, as in a network whose path depends on its inputs.
        """
        recipe = self.recipe
        with kinks or contextlib.nullcontext():
            done = self._pass(inputs, targets, recipe.copying)
        used = Counter(name for use in done.capture.uses for name in use.names.values())
        by_function = {*recipe.functional, *recipe.one_by_one}
        for name in {**recipe.uses, **used}:
            if name not in by_function and used[name] != recipe.uses.get(name, 0):
                raise GradientError(
                    f"parameter {name!r} is used {used[name]} times by a block of {done.n}"
                    f" examples, but {recipe.uses.get(name, 0)} times by the first few: the"
                    " network's path depends on its inputs or on the size of the block, so that"
                    " its gradients cannot be taken a block at a time"
                )
        captured: dict[str, list[tuple[str, Captured]]] = defaultdict(list)
        for use, grad in zip(done.capture.uses, done.backward(), strict=True):
            if grad is None:
                grad = torch.zeros(
                    use.output_shape, dtype=self.precision.network, device=self.device
                )
            placed = replace(use, layout=recipe.layouts.get(use.number, PLAIN))
            one = Captured.of(placed, grad.detach())
            for role, name in use.names.items():
                captured[name].append((role, one))
        functions: dict[str, Tensor] = {}
        if recipe.functional:
            functions |= self._functional(done, recipe.functional)
        if recipe.one_by_one:
            functions |= self._one_by_one(done, recipe.one_by_one)
        return _Found(done, captured, functions)

    # Parts of the gradients

    def _factors(self, found: _Found, layer: Layer) -> Factors:
        uses = [one for _, one in found.captured[layer.weight]]
        left, right = _joined([one.positions() for one in uses])
        if not uses[0].rule.grad_is_left:
            left, right = right, left
        has_bias = float(layer.bias is not None)
        made = Factors(right, left, right.new_full(right.shape[:2], has_bias))
        return made.centred() if layer.is_centred else made

    def _dense(self, found: _Found, recipe: Recipe, into: Tensor | None) -> tuple[Tensor, Tensor]:
        """All parameters that are not factored, side by side: (N, P), and |row|² in float64."""
        sizes = [self.parameters[name].numel() for name in recipe.dense]
        dtype = self.precision.network
        dense = (
            into
            if into is not None and into.dtype == dtype
            else torch.empty(found.done.n, sum(sizes), dtype=dtype, device=self.device)
        )
        square = torch.zeros(found.done.n, dtype=torch.float64, device=self.device)
        for name, place in zip(recipe.dense, torch.split(dense, sizes, 1), strict=True):
            for rows in pieces(slice(0, found.done.n), self._at_a_time(name, found)):
                part = _laid_out(self._part(name, found, rows))
                square[rows] += _squares(part)
                place[rows] = part
        return dense, square

    def _whole(self, name: str, found: _Found) -> Tensor:
        """Return the gradient of one parameter for all examples, (N, *shape)."""
        parts = pieces(slice(0, found.done.n), self._at_a_time(name, found))
        made = [self._part(name, found, rows) for rows in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _at_a_time(self, name: str, found: _Found) -> int:
        """Examples whose gradients of one parameter are made together."""
        uses = list(found.of(name, self.recipe))
        if not all(one.divisible for _, one in uses):
            return found.done.n
        numbers = self.parameters[name].numel()
        numbers += sum(one.rule.scratch(role, one.call, one.grad_output) for role, one in uses)
        room = _BYTES_AT_A_TIME["cuda" if self.device.type == "cuda" else "cpu"]
        most = max(1, room // max(1, numbers * self.precision.network.itemsize))
        return math.ceil(found.done.n / math.ceil(found.done.n / most))

    def _part(self, name: str, found: _Found, rows: slice) -> Tensor:
        """Return the gradient of one parameter for some examples, (n, *shape)."""
        if name in found.functions:
            return found.functions[name][rows]
        parameter, n = self.parameters[name], rows.stop - rows.start
        # The uses of a shared parameter add up before anything is multiplied.
        terms = self._direct(found.captured.get(name, []), rows)
        for through in self.recipe.through.get(name, ()):
            grads = functools.reduce(
                torch.add, self._direct(found.captured[through], rows)
            ).contiguous()
            back = self._through(found.done.capture.derived[through], name, grads)
            if back is not None:
                terms.append(back.contiguous())
        if not terms:
            return parameter.detach().new_zeros(n, *parameter.shape)
        return functools.reduce(torch.add, terms).reshape(n, *parameter.shape)

    def _direct(self, uses: list[tuple[str, Captured]], rows: slice) -> list[Tensor]:
        chosen = [(role, one.take(rows) if one.divisible else one) for role, one in uses]
        linear = [one for role, one in chosen if role == "weight" and isinstance(one.rule, Linear)]
        if 1 < len(linear) == len(chosen):
            # Many uses (every step of a recurrent network): one product over all positions.
            left_NTp, right_NTd = _joined([one.positions() for one in linear])
            return [torch.bmm(left_NTp.transpose(1, 2), right_NTd)]
        return [one.per_example(role) for role, one in chosen]

    def _through(self, source: Source, name: str, grads: Tensor) -> Tensor | None:
        """Send gradients of a tensor made of parameters back to one of them, for each example."""
        parameter = self.parameters[name]
        if source.name not in self._one_at_a_time:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", "There is a performance drop")
                    (back,) = torch.autograd.grad(
                        source.tensor,
                        parameter,
                        grads,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                return back
            except (RuntimeError, UserWarning):
                self._one_at_a_time.add(source.name)  # some derivatives are not written for batches
        found = [
            torch.autograd.grad(
                source.tensor, parameter, grad, retain_graph=True, allow_unused=True
            )[0]
            for grad in grads
        ]
        return None if found[0] is None else torch.stack(found)

    # What has no rule

    def _functional(self, done: Pass, names: tuple[str, ...]) -> dict[str, Tensor]:
        network = self._network
        parameters = {network.prefix + name: self.parameters[name].detach() for name in names}

        def projected(
            chosen: dict[str, Tensor], inputs: Nest, targets: Nest, directions: tuple[Tensor, ...]
        ) -> Tensor:
            one = map_tensors(lambda t: t.unsqueeze(0), (inputs, targets))
            args, kwargs = self._arguments(*one)
            outputs = torch.func.functional_call(network.module, chosen, args, kwargs)
            parts = zip(done.head.chosen(outputs), directions, strict=True)
            return torch.stack([(o.squeeze(0) * d).sum() for o, d in parts]).sum()

        # No graph over the parameters that are not asked for; of the attention kernels only the
        # plain one can be batched over examples.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), TakenApart():
            per_example = torch.func.vmap(torch.func.grad(projected), in_dims=(None, 0, 0, 0))
            found = per_example(parameters, done.inputs, done.targets, done.head.directions)
        return {name: found[network.prefix + name] for name in names}

    def _one_by_one(self, done: Pass, names: tuple[str, ...]) -> dict[str, Tensor]:
        parameters = [self.parameters[name] for name in names]
        found: list[list[Tensor]] = []
        for i in range(done.n):
            one = take((done.inputs, done.targets), slice(i, i + 1))
            args, kwargs = self._arguments(*one)
            with torch.enable_grad():
                outputs = done.head.chosen(self._network.module(*args, **kwargs))
                grads = torch.autograd.grad(
                    outputs,
                    parameters,
                    [d[i : i + 1] for d in done.head.directions],
                    allow_unused=True,
                )
            found.append(
                [
                    torch.zeros_like(p) if g is None else g.to_dense()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        return {
            name: torch.stack(column)
            for name, column in zip(names, zip(*found, strict=True), strict=True)
        }

    # The recipe

    def _read_recipe(self, inputs: Nest, targets: Nest) -> Recipe:
        inputs, targets = self._prepared(inputs), self._on_device(targets)

        def run(n: int, copying: Collection[int]) -> Pass:
            given = map_tensors(torch.clone, take(inputs, slice(n)))
            before = [t._version for t in tensors(given)]
            done = self._pass(given, take(targets, slice(n)), copying)
            # From now on such a network is given copies.
            self._writes_inputs |= before != [t._version for t in tensors(given)]
            return done

        if count_examples(inputs) < 3:
            raise GradientError(f"at least 3 examples are needed, got {count_examples(inputs)}")
        return read_recipe(
            run,
            self.parameters,
            lambda names: self._split_by_torch_func(run(2, ()), names),
        )

    def _split_by_torch_func(
        self, two: Pass, names: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Try torch.func on two examples; what it cannot do is left to autograd."""
        if not names:
            return (), ()
        try:
            with warnings.catch_warnings():
                # Where torch.func has no batched kernel it loops too, under a warning of its own.
                warnings.filterwarnings("error", "There is a performance drop")
                self._functional(two, names)
        except Exception as error:  # whatever torch.func cannot trace: any type of error
            modules = sorted({name.rpartition(".")[0] or "the network" for name in names})
            warnings.warn(
                f"no structured rule and no torch.func for {', '.join(names)} (in"
                f" {', '.join(modules)}): their gradients are computed one example at a time,"
                f" which takes as long as training on single examples. torch.func said: {error}",
                stacklevel=2,
            )
            return (), names
        return names, ()


@dataclass(frozen=True)
class _Network:
    """The module that is differentiated: the network, or one with its loss inside."""

    module: nn.Module
    prefix: str  # of the network's parameters in it
    takes_targets: bool

    def arguments(self, inputs: Nest, targets: Nest) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the module is called with."""
        if not self.takes_targets:
            return arguments(inputs)
        return (inputs if targets is None else (inputs, targets),), {}


class _LossInside(nn.Module):
    """A network and its `WholeLoss`, called as one."""

    def __init__(self, model: nn.Module, loss: WholeLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Nest) -> Tensor:
        return self.loss.function(self.model, batch)


def _network(model: nn.Module, loss: Loss) -> _Network:
    if isinstance(loss, WholeLoss):
        return _Network(_LossInside(model, loss), "model.", takes_targets=True)
    return _Network(model, "", takes_targets=False)


@dataclass(frozen=True)
class _Found:
    """A block of examples, differentiated."""

    done: Pass
    captured: Mapping[str, list[tuple[str, Captured]]]  # source -> (role, use)
    functions: Mapping[str, Tensor]  # what went through torch.func or one by one

    def of(self, name: str, recipe: Recipe) -> Iterator[tuple[str, Captured]]:
        """Every role and use of a parameter, direct or through a tensor made of it."""
        for source in (name, *recipe.through.get(name, ())):
            yield from self.captured.get(source, ())


def _joined(positions: Sequence[Positions]) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([p.left_NTp for p in positions], 1),
        torch.cat([p.right_NTd for p in positions], 1),
    )


def _laid_out(part: Tensor) -> Tensor:
    """Flatten gradients, (n, *shape), channels last, as those of convolutions are made.

    By the shape alone, not by how they lie: passes of one network may make the same gradients in
    several memory formats, and their rows are multiplied with each other.
    """
    return (part.movedim(2, -1) if part.dim() > 3 else part).reshape(len(part), -1)


def _squares(part: Tensor) -> Tensor:
    """Return the sum of squares of each row, (n,) float64."""
    if part.dtype == torch.float32 and not part.is_cuda and part.numel():
        # Several times as fast as one float64 norm, which copies; short sums keep the digits.
        length = _divisor(part.shape[1])
        norms: Tensor = torch.linalg.vector_norm(part.reshape(len(part), -1, length), dim=2)
        square = norms.double().square().sum(1)
        if _SQUARES[0] < float(square.min()) and float(square.max()) < _SQUARES[1]:
            return square
    norm: Tensor = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
    return norm.square()


@functools.cache
def _divisor(n: int, most: int = 1024) -> int:
    """Return the largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _keep_freed_memory() -> None:
    """Let the allocator keep what a pass frees for the next one.

    glibc gives memory back to the kernel, page by page, unless a process has freed a large piece
    once: then it keeps pieces of up to that size. A fifth of a pass's time, where pages are dear.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _require_examples_first(outputs: Nest, n: int) -> None:
    found = tensors(outputs)
    if not found:
        raise ModelError(
            f"the network returned {type(outputs).__name__}, expected a tensor with N first, or a"
            " nest of such"
        )
    if isinstance(outputs, Tensor) and (outputs.dim() == 0 or len(outputs) != n):
        raise ModelError(
            f"the network returned shape {tuple(outputs.shape)} for {n} examples, expected N first"
        )


def parameters_in_play(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the parameters that require gradients and match a pattern, by name; tied ones once.

    Raises:
        ModelError: none is left, or a pattern matches nothing.
    """
    trainable: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    if patterns is not None:
        for pattern in patterns:
            if not matching(list(trainable), [pattern]):
                raise ModelError(
                    f"no trainable parameter matches {pattern!r}; there are: {', '.join(trainable)}"
                )
        trainable = {name: trainable[name] for name in matching(list(trainable), patterns)}
    if not trainable:
        raise ModelError("the network has no parameter that requires a gradient")
    return trainable


def matching(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names that match a glob pattern."""
    return tuple(n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns))


def refuse_dependence(model: nn.Module) -> None:
    """Refuse modules that make one example's gradient depend on chance or on its company.

    Raises:
        GradientError: batch statistics or dropout are in use; the message names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise GradientError(
                    f"batch normalisation {name!r} is in training mode, so that an example's"
                    " gradient would depend on its batch: call model.eval() first"
                )
            if module.running_mean is None:
                raise GradientError(
                    f"batch normalisation {name!r} keeps no running statistics, so that an"
                    " example's gradient would depend on its batch: build it with"
                    " track_running_stats=True, or use another normalisation"
                )
        if module.training and _dropout_share(module) > 0:
            raise GradientError(
                f"the dropout of {name!r} is active, so that gradients would be random: call"
                " model.eval() first"
            )


def _dropout_share(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout)
    return 0.0


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    floating = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return model if floating <= {dtype} else copy.deepcopy(model).to(dtype)
