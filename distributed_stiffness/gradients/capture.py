"""Catch every use of every parameter during one forward pass.

A `TorchFunctionMode` sees each torch call that the network makes, whether a module makes it or the
network's own code. What a call takes as a weight is a *source*: a parameter, or a tensor computed
from parameters alone (a weight under weight normalisation, a transpose, position embeddings). A
call that takes a source beside something that depends on the examples, and has a structured rule
(rules/), is recorded as a `Use`: its operands, and the place in the autograd graph where the
gradient of its output will arrive. Every other such call marks its parameters as unstructured.

Axis letters: N examples, T positions that share a weight.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from distributed_stiffness.gradients.decompositions import DECOMPOSITIONS, take_apart
from distributed_stiffness.gradients.layout import Layout
from distributed_stiffness.gradients.moves import may_move
from distributed_stiffness.gradients.rules import RULES, Call, Positions, Rule
from distributed_stiffness.gradients.rules.rule import Seen
from distributed_stiffness.gradients.surroundings import is_write


@dataclass(frozen=True)
class Source:
    """A parameter, or a tensor that a call made of parameters alone."""

    name: str
    tensor: Tensor
    parameters: frozenset[str]  # that it is made of
    call: str = ""  # its name, which calls of other passes have too; "" for a parameter
    made_of: tuple[str, ...] = ()  # sources that the call took


@dataclass(frozen=True)
class Use:
    """One call with a structured rule."""

    rule: Rule
    call: Call
    names: Mapping[str, str]  # role in the call ("weight", "bias") -> name of the source
    edge: GradientEdge  # of the call's output, as it was before any in-place operation
    version: int  # of the call's input: a later in-place write would spoil what was kept
    output_shape: torch.Size
    view: tuple[Tensor, int] | None  # the output and its version, where a write would miss the edge
    row_dims: tuple[int, ...]  # of output and input: along these lie rows, each of one example
    is_moved: bool  # whose its rows are may follow from the examples' values (moves.py)

    @property
    def spoiled(self) -> bool:
        """Whether a tensor that is still needed was written in place after the call."""
        return (self.call.input is not None and self.call.input._version != self.version) or (
            self.view is not None and self.view[0]._version != self.view[1]
        )

    def rows(self, X: Tensor) -> Tensor:
        """Bring the rows of the output, or the input, to the front, as one dimension."""
        dims = self.row_dims
        X = X.movedim(dims, tuple(range(len(dims))))
        return X.flatten(0, len(dims) - 1)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What uses of the same layout have in common, if none is moved."""
        shape = None if self.call.input is None else self.call.input.shape
        return self.rule.name, tuple(self.names.items()), self.output_shape, shape


@dataclass(frozen=True)
class Captured:
    """A use with the gradient of its output, examples first."""

    use: Use
    call: Call
    grad_output: Tensor
    n: int
    fold: int  # rows of an example, one after the other, in what the rule works on

    @staticmethod
    def of(use: Use, grad_output: Tensor, layout: Layout) -> Captured:
        """Bring the examples to the front."""
        n, call, dims = layout.n, use.call, use.row_dims
        are_first = layout.examples_outside and dims[0] == 0 and use.output_shape[0] == n
        settings = dict(call.settings)
        if "beside" in settings:  # of one example
            settings["beside"] = {
                role: tuple(shape[1:])
                if are_first
                else (1, *(size for k, size in enumerate(shape) if k not in dims))
                for role, shape in settings["beside"].items()
            }
        if are_first:
            return Captured(use, replace(call, settings=settings), grad_output, n, 1)

        def grouped(X: Tensor) -> Tensor:
            found = layout.group(use.rows(X))
            return found if use.rule.any_leading else found.flatten(0, 1)

        moved = None if call.input is None else grouped(call.input)
        fold = 1 if use.rule.any_leading else layout.rows
        call = replace(call, input=moved, settings=settings)
        return Captured(use, call, grouped(grad_output), n, fold)

    @property
    def rule(self) -> Rule:
        """The use's."""
        return self.use.rule

    def take(self, rows: slice) -> Captured:
        """Select examples."""
        part = slice(rows.start * self.fold, rows.stop * self.fold)
        call, grad = self.call.take(part), self.grad_output[part]
        return Captured(self.use, call, grad, rows.stop - rows.start, self.fold)

    def per_example(self, role: str) -> Tensor:
        """Return the gradient of one parameter for each example."""
        grad = self.use.rule.per_example(role, self.call, self.grad_output)
        return grad if self.fold == 1 else self._apart(grad).sum(1)

    def positions(self) -> Positions:
        """Return the weight's gradient as a sum over positions."""
        found = self.use.rule.positions(self.call, self.grad_output)
        if self.fold == 1:
            return found
        # The rule took each row for an example: its positions are more of the example's.
        return Positions(*(self._apart(X).flatten(1, 2) for X in (found.left_NTp, found.right_NTd)))

    def _apart(self, X: Tensor) -> Tensor:
        """Return what was made for each row by example: (N, rows, ...)."""
        return X.reshape(self.n, self.fold, *X.shape[1:])


@dataclass(eq=False)
class Capture(TorchFunctionMode):
    """Record the uses of parameters while the mode is active.

    Args:
        parameters: in play, by name.
        constants: tensors that depend on no example although they require gradients: parameters
            that are not in play.
        inputs: tensors of the examples.
        copying: calls that make a copy of a source for each example (`expand`): their outputs
            depend on the number of examples, so that these calls are uses.
    """

    parameters: Mapping[str, Tensor]
    constants: Collection[Tensor]
    inputs: Collection[Tensor]
    copying: Collection[str] = ()
    uses: list[Use] = field(default_factory=list)
    unstructured: dict[str, str] = field(default_factory=dict)  # source -> the call that took it
    derived: dict[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._sources = {
            id(t): Source(name, t, frozenset([name])) for name, t in self.parameters.items()
        }
        self._constant = {id(t) for t in self.constants}
        self._of_examples = WeakIdKeyDictionary(dict.fromkeys(self.inputs, True))
        self._times: Counter[tuple[str, ...]] = Counter()
        self._is_moved = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call, then note which sources it took."""
        kwargs = kwargs or {}
        taken = list(_tensors(args, kwargs))
        sources = [self._sources[id(t)] for t in taken if id(t) in self._sources]
        if sources and func in DECOMPOSITIONS and not _is_recomputed():
            output = take_apart(self, func, args, kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # a mode outside sees the network's calls alone
            self._note(func, args, kwargs, output, taken, sources)
        return output

    def _note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        taken: list[Tensor],
        sources: list[Source],
    ) -> None:
        others = [t for t in taken if id(t) not in self._sources]
        depends = any(self._depends_on_examples(t) for t in others)
        if sources and is_write(func):
            # What was read before and what is read after are not the same tensor.
            name = func.__name__
            if args and id(args[0]) in self._sources:
                self._mark([self._sources[id(args[0])]], f"{name} writes it in place")
        if sources and _is_differentiable(output):
            call = self._name(func, sources)
            if depends or call in self.copying:
                self._use(func, args, kwargs, output, sources)
            else:
                self._derive(output, sources, call)
        elif depends:
            self._spread(func, args, output)
        if depends and not self._is_moved:
            self._is_moved = may_move(func, args, kwargs)

    def _name(self, func: Callable[..., Any], sources: list[Source]) -> str:
        """Name a call by what it takes: other passes may make other calls in between."""
        name = getattr(func, "__name__", str(func))
        key = name, *(source.name for source in sources)
        self._times[key] += 1
        digest = hashlib.sha256(repr((key, self._times[key])).encode()).hexdigest()
        return f"{name} {digest[:12]}"

    def _depends_on_examples(self, tensor: Tensor) -> bool:
        """Whatever requires a gradient and is no source is taken to depend on the examples."""
        if id(tensor) in self._constant:
            return False
        return tensor.requires_grad or tensor in self._of_examples

    def _spread(self, func: Callable[..., Any], args: tuple[Any, ...], output: Any) -> None:
        """Note what a call without sources made of the examples, or wrote them into."""
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._of_examples[leaf] = True
        if is_write(func) and args and isinstance(args[0], Tensor):
            self._of_examples[args[0]] = True

    def _derive(self, output: Any, sources: list[Source], call: str) -> None:
        for place, leaf in enumerate(pytree.tree_leaves(output)):
            if _is_differentiable(leaf) and id(leaf) not in self._sources:
                source = Source(
                    f"{call}.{place}",
                    leaf,
                    frozenset().union(*(s.parameters for s in sources)),
                    call,
                    tuple(s.name for s in sources),
                )
                self.derived[source.name] = self._sources[id(leaf)] = source

    def _use(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        sources: list[Source],
    ) -> None:
        rule = RULES.get(func)
        call = None
        # Complex gradients are conjugated here and there: left to autograd.
        if rule is not None and isinstance(output, Tensor) and not _is_complex(output, args):
            call = rule.parse(Seen(args, kwargs, output, [s.tensor for s in sources]))
        roles = {
            role: self._sources[id(tensor)].name
            for role, tensor in (call.parameters.items() if call else ())
            if id(tensor) in self._sources
        }
        # A source in any other place (the input of a linear layer, say) has no rule there.
        if (
            rule is None
            or call is None
            or sorted(roles.values()) != sorted(s.name for s in sources)
        ):
            self._mark(sources, getattr(func, "__name__", str(func)))
            return
        row_dims = rule.row_dims(call, output.shape)
        if not row_dims:
            self._mark(sources, "no dimension of its use is the examples'")
            return
        whole = self._whole(output)
        self.uses.append(
            Use(
                rule,
                call.detached(),
                roles,
                get_gradient_edge(output if whole is None else whole),
                0 if call.input is None else call.input._version,
                output.shape,
                (output.detach(), output._version) if whole is None and output._is_view() else None,
                row_dims,
                self._is_moved,
            )
        )

    def _whole(self, output: Tensor) -> Tensor | None:
        """Return the tensor of which `output` is another shape, if it is one.

        `F.linear` on a sequence returns a view. A write into a view changes the history of what is
        behind it, past the view's own place in the graph.
        """
        base = output._base
        if base is None or id(base) in self._sources or base.numel() != output.numel():
            return None
        return base if base.is_contiguous() and output.is_contiguous() else None

    def _mark(self, sources: list[Source], why: str) -> None:
        for source in sources:
            self.unstructured.setdefault(source.name, why)


def hidden_uses(outputs: Collection[Tensor], capture: Capture) -> Iterator[str]:
    """Yield the sources that enter the autograd graph more often than they were captured.

    Autograd functions of the network's own and TorchScript run past every `TorchFunctionMode`.
    """
    sources = {name: s.tensor for name, s in capture.derived.items()} | dict(capture.parameters)
    place = {_edge(t): name for name, t in sources.items() if t.requires_grad}
    captured = Counter(name for use in capture.uses for name in use.names.values())
    found: Counter[str] = Counter()
    todo: list[Any] = [_edge(t) for t in outputs if t.requires_grad]
    seen = set()
    while todo:
        edge = todo.pop()
        if edge in place:
            found[place[edge]] += 1
        elif edge[0] is not None and edge[0] not in seen:
            seen.add(edge[0])
            todo += edge[0].next_functions
    yield from (name for name, times in found.items() if times > captured[name])


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Tensors among the arguments, one level of lists deep (LSTM passes its weights as a list)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _is_differentiable(output: Any) -> bool:
    """Whether a call is in the autograd graph.

    A view of a parameter that is made where there is none, as in an autograd function's `forward`,
    requires a gradient all the same.
    """
    outputs = output if isinstance(output, list | tuple) else (output,)
    return any(isinstance(o, Tensor) and o.grad_fn is not None for o in outputs)


def _is_recomputed() -> bool:
    """Whether activations are checkpointed here.

    The call is then made a second time, in the backward pass and whole, and what both times keep
    for it must agree.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _is_complex(output: Tensor, args: tuple[Any, ...]) -> bool:
    return output.is_complex() or any(isinstance(a, Tensor) and a.is_complex() for a in args)
