"""Passes over batches of examples, with every use of every parameter caught.

Axis letters: N examples.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distributed_stiffness.errors import GradientError, StiffnessError
from distributed_stiffness.gradients.batches import (
    Nest,
    arguments,
    as_nest,
    count_examples,
    map_tensors,
    require_examples_first,
    take,
    tensors,
)
from distributed_stiffness.gradients.capture import Capture, Captured
from distributed_stiffness.gradients.decompositions import TakenApart
from distributed_stiffness.gradients.loss_head import (
    Loss,
    WholeLoss,
    loss_head,
    losses_of,
    whole_loss_head,
)
from distributed_stiffness.gradients.network import Network, saying
from distributed_stiffness.gradients.parts import Parts
from distributed_stiffness.gradients.reading import Pass, Reader
from distributed_stiffness.gradients.recipe import Recipe, make_recipe
from distributed_stiffness.gradients.surroundings import is_out_of_memory


class SlowGradients(UserWarning):
    """Gradients of some parameters are not made by rules."""


@contextlib.contextmanager
def slow_gradients() -> Iterator[list[str]]:
    """Collect warnings that gradients are slow, in place of showing them; others are shown."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowGradients)
        yield said
    for one in caught:
        if issubclass(one.category, SlowGradients):
            said.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def modules_of(note: str) -> str:
    """Return which modules' gradients are slow; the rest differs from batch to batch."""
    found = re.search(r"\(in ([^)]*)\)", note)
    return found[1] if found else note


class Passes:
    """Runs a network on batches, and takes the results apart.

    Args:
        network: that is run.
        loss: its tensors in float64.
        parameters: in play, by name.
        constants: parameters that are not.
    """

    def __init__(
        self,
        network: Network,
        loss: Loss,
        parameters: Mapping[str, Tensor],
        constants: Collection[Tensor],
    ) -> None:
        self._network, self._loss = network, loss
        self._called = _Called.of(network.module, loss)
        self._parameters, self._constants = parameters, constants
        self.reader = Reader()
        self._copying: frozenset[str] = frozenset()
        self._one_by_one_names: set[str] = set()
        self.by_functions: set[str] = set()  # parameters that no rule has made of late
        self._unbatched: set[str] = set()
        self._needs_graph = False  # a forward pass alone does not run without gradients
        self._said: set[str] = set()  # parameters of which a warning has told why they are hard

    def learn_from(self, other: Passes) -> None:
        """Share what passes of the same network in another precision have shown."""
        self.reader, self._copying = other.reader, other._copying
        self._one_by_one_names, self._unbatched = other._one_by_one_names, other._unbatched
        self.by_functions = other.by_functions
        self._said, self._needs_graph = other._said, other._needs_graph

    def run(self, inputs: Nest, targets: Nest, copying: Collection[str] | None = None) -> Pass:
        """Make a forward pass and the loss at its end."""
        n = count_examples(inputs)
        args, kwargs = self._called.arguments(map_tensors(torch.clone, inputs), targets)
        capture = Capture(
            self._parameters,
            self._constants,
            tensors((args, kwargs)),
            self._copying if copying is None else copying,
        )
        with saying(inputs), torch.enable_grad(), capture, self._network.running():
            outputs = as_nest(self._called.module(*args, **kwargs))
        if isinstance(self._loss, WholeLoss):
            head = whole_loss_head(outputs, n)
        else:
            require_examples_first(outputs, n)
            head = loss_head(self._loss, outputs, targets, self._network.held)
        return Pass(self._network, inputs, targets, n, capture, head, head.chosen(outputs))

    def forward(self, inputs: Nest, targets: Nest) -> None:
        """Make a forward pass, of the calls that `run` makes."""
        args, kwargs = self._called.arguments(map_tensors(torch.clone, inputs), targets)
        with (
            torch.set_grad_enabled(self._needs_graph),
            TakenApart(),
            self._network.running(),
        ):
            outputs = as_nest(self._called.module(*args, **kwargs))
        if callable(self._loss):
            losses_of(self._loss, outputs, targets, self._network.held)

    def parts(self, done: Pass, hard: Mapping[str, str], *, anew: bool = False) -> Parts:
        """Differentiate.

        Args:
            done: a pass.
            hard: parameters that no rule makes, and why.
            anew: whether it is found in this pass whose the rows are, whatever is known.
        """
        return self._taken_apart(done, hard, anew=anew)[0]

    def _taken_apart(
        self, done: Pass, hard: Mapping[str, str], *, anew: bool = False
    ) -> tuple[Parts, list[tuple[str, str, Captured]], dict[str, str]]:
        """Return the parts, every use of every source, and why a parameter has no rule."""
        reading, grads = self.reader.read(done, anew=anew)
        derived = done.capture.derived
        why = dict(hard)
        for source, reason in reading.why.items():
            # What cannot be done for a tensor made of parameters cannot be done for those.
            of = derived[source].parameters if source in derived else [source]
            for name in of:
                why.setdefault(name, reason)
        uses: list[tuple[str, str, Captured]] = []
        for use, grad, layout in zip(done.capture.uses, grads, reading.layouts, strict=True):
            if grad is not None and layout is not None:
                one = Captured.of(use, grad, layout)
                uses += [(source, role, one) for role, source in use.names.items()]
        captured: dict[str, list[tuple[str, Captured]]] = defaultdict(list)
        for source, role, one in uses:
            captured[source].append((role, one))
        through: dict[str, list[str]] = defaultdict(list)
        for source in captured:
            for name in derived[source].parameters if source in derived else ():
                through[name].append(source)
        names = tuple(name for name in self._parameters if name in why)
        parts = Parts(
            done,
            self._parameters,
            dict(captured),
            self._by_functions(done, names, hard),
            dict(through),
            self._unbatched,
        )
        return parts, uses, why

    def read_recipe(self, inputs: Nest, targets: Nest) -> Recipe:
        """Read the recipe from a few examples."""
        # One example again and again: what differs between the two passes is their number.
        two, three = (
            self.run(take(inputs, again), take(targets, again), ()).capture
            for again in (torch.zeros(n, dtype=torch.int64, device="cpu") for n in (2, 3))
        )
        self._copying = _copying(two, three)
        try:
            with torch.no_grad():
                self.forward(inputs, targets)
        except RuntimeError:
            self._needs_graph = True  # it differentiates on its way
        parts, uses, why = self._taken_apart(self.run(inputs, targets), {})
        loops = {name for name in why if name in self._one_by_one_names}
        return make_recipe(
            uses,
            parts.through,
            why,
            self._parameters,
            functional=why.keys() - loops,
            one_by_one=loops,
        )

    def one_by_one(self, names: Collection[str]) -> bool:
        """Differentiate some parameters one example at a time; whether any was not."""
        new = set(names) - self._one_by_one_names
        self._one_by_one_names |= new
        self._said |= new
        if new:
            _warn_of_single_examples(sorted(new), "nothing, and was wrong", [])
        return bool(new)

    # What has no rule

    def _by_functions(
        self, done: Pass, names: Sequence[str], hard: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """Differentiate by torch.func, or what even that cannot do one example at a time."""
        self.by_functions.update(names)
        batched = tuple(name for name in names if name not in self._one_by_one_names)
        found: dict[str, Tensor] = {}
        refused = None
        if batched:
            try:
                with warnings.catch_warnings():
                    # Where torch.func has no batched kernel it loops too, under a warning.
                    warnings.filterwarnings("error", "There is a performance drop")
                    found = self._functional(done, batched)
            except Exception as error:  # whatever torch.func cannot trace: any type of error
                if is_out_of_memory(error):
                    raise
                self._one_by_one_names.update(batched)
                refused = error
        alone = tuple(name for name in names if name in self._one_by_one_names)
        if alone:
            found |= self._one_by_one(done, alone)
        new = [name for name in hard if name in names and name not in self._said]
        self._said.update(new)
        if refused is not None:
            _warn_of_single_examples(batched, refused, [hard[name] for name in new])
        elif new:
            _warn_of_another_way(new, hard)
        return found

    def _functional(self, done: Pass, names: tuple[str, ...]) -> dict[str, Tensor]:
        called = self._called
        parameters = {name: self._parameters[name].detach() for name in names}

        def projected(
            chosen: dict[str, Tensor], inputs: Nest, targets: Nest, directions: tuple[Tensor, ...]
        ) -> Tensor:
            one = map_tensors(lambda t: t.unsqueeze(0), (inputs, targets))
            args, kwargs = called.arguments(*one)
            with self._in_place_of(chosen):
                outputs = as_nest(called.module(*args, **kwargs))
            parts = zip(done.head.chosen(outputs), directions, strict=True)
            return torch.stack([(o.squeeze(0) * d).sum() for o, d in parts]).sum()

        # No graph over the parameters that are not asked for; of the attention kernels only the
        # plain one can be batched over examples.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            TakenApart(),
            self._network.running(),
        ):
            per_example = torch.func.vmap(torch.func.grad(projected), in_dims=(None, 0, 0, 0))
            inputs = map_tensors(torch.clone, done.inputs)
            found: dict[str, Tensor] = per_example(
                parameters, inputs, done.targets, done.head.directions
            )
        return found

    @contextlib.contextmanager
    def _in_place_of(self, chosen: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors where the network has these parameters.

        torch.func.functional_call puts back the wrong tensor where a module has two names.
        """
        instead = {id(self._parameters[name]): tensor for name, tensor in chosen.items()}
        places = [
            (module._parameters, name, p)
            for module in self._network.module.modules()
            for name, p in module._parameters.items()
            if id(p) in instead
        ]
        try:
            for holder, name, p in places:
                holder[name] = instead[id(p)]  # type: ignore[assignment]
            yield
        finally:
            for holder, name, p in places:
                holder[name] = p

    def _one_by_one(self, done: Pass, names: tuple[str, ...]) -> dict[str, Tensor]:
        parameters = [self._parameters[name] for name in names]
        found = []
        for i in range(done.n):
            try:
                found.append(self._one(done, i, parameters))
            except Exception as error:  # the user's own code: any type of error
                if isinstance(error, StiffnessError) or is_out_of_memory(error):
                    raise
                raise GradientError(
                    f"the network does not take one example alone ({type(error).__name__}:"
                    f" {error}), so that per-example gradients are not defined"
                ) from error
        return {
            name: torch.stack(column)
            for name, column in zip(names, zip(*found, strict=True), strict=True)
        }

    def _one(self, done: Pass, i: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Differentiate example i alone, from where its direction starts."""
        inputs, targets = take((done.inputs, done.targets), slice(i, i + 1))
        args, kwargs = self._called.arguments(map_tensors(torch.clone, inputs), targets)
        with torch.enable_grad(), self._network.running():
            outputs = done.head.chosen(as_nest(self._called.module(*args, **kwargs)))
            starts = [
                (o, d[i : i + 1])
                for o, d in zip(outputs, done.head.directions, strict=True)
                if o.requires_grad
            ]
            if not starts:
                return [torch.zeros_like(p) for p in parameters]
            grads = self._network.differentiate(
                [o for o, _ in starts], parameters, [d for _, d in starts]
            )
        return [
            torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(parameters, grads, strict=True)
        ]


@dataclass(frozen=True)
class _Called:
    """The module that is called: the network, or one with its loss inside."""

    module: nn.Module
    takes_targets: bool

    @staticmethod
    def of(model: nn.Module, loss: Loss) -> _Called:
        if isinstance(loss, WholeLoss):
            return _Called(_LossInside(model, loss), takes_targets=True)
        return _Called(model, takes_targets=False)

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


def _warn_of_single_examples(names: Sequence[str], refused: object, reasons: Sequence[str]) -> None:
    why = f" ({reasons[0]})" if reasons else ""
    warnings.warn(
        f"no structured rule{why} and no torch.func for {', '.join(map(repr, names))} (in"
        f" {_modules(names)}): their gradients are computed one example at a time, which takes as"
        f" long as training on single examples. torch.func said: {refused}",
        SlowGradients,
        stacklevel=2,
    )


def _warn_of_another_way(names: Sequence[str], hard: Mapping[str, str]) -> None:
    warnings.warn(
        f"the gradient of {', '.join(map(repr, names))} (in {_modules(names)}) is made by"
        " torch.func, which is slower than a rule, though not as slow as one example at a time:"
        f" {hard[names[0]]}",
        SlowGradients,
        stacklevel=2,
    )


def _modules(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[0] or "the network" for name in names}))


def _copying(two: Capture, three: Capture) -> frozenset[str]:
    """Calls whose output grows with the number of examples though they take sources alone."""
    growing = {
        name
        for name, source in three.derived.items()
        if name in two.derived and two.derived[name].tensor.shape != source.tensor.shape
    }
    return frozenset(
        three.derived[name].call
        for name in growing
        if not growing.intersection(three.derived[name].made_of)
    )
