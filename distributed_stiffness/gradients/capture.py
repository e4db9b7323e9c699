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
from distributed_stiffness.gradients.layout import PLAIN, Layout
from distributed_stiffness.gradients.rules import RULES, Call, Positions, Rule
from distributed_stiffness.gradients.rules.rule import Seen


@dataclass(frozen=True)
class Source:
    """A parameter, or a tensor that a call made of parameters alone."""

    name: str
    tensor: Tensor
    parameters: frozenset[str]  # that it is made of
    made_by: int = -1  # number of the call; −1 for a parameter
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
    number: int  # of the call
    layout: Layout = PLAIN

    @property
    def spoiled(self) -> bool:
        """Whether a tensor that is still needed was written in place after the call."""
        return (self.call.input is not None and self.call.input._version != self.version) or (
            self.view is not None and self.view[0]._version != self.view[1]
        )

    def examples_first(self, grad_output: Tensor) -> tuple[Call, Tensor]:
        """Return the call and the gradient of its output with the examples in front."""
        layout, call = self.layout, self.call
        if layout.plain and "beside" not in call.settings:
            return call, grad_output
        if not self.rule.any_leading:
            return call, grad_output  # the examples are in front, with positions
        settings = dict(call.settings)
        if "beside" in settings:
            settings["beside"] = {k: layout.beside(v) for k, v in settings["beside"].items()}
        moved = None if call.input is None else layout.first(call.input)
        return replace(call, input=moved, settings=settings), layout.first(grad_output)


@dataclass(frozen=True)
class Captured:
    """A use with the gradient of its output, examples first."""

    use: Use
    call: Call
    grad_output: Tensor

    @staticmethod
    def of(use: Use, grad_output: Tensor) -> Captured:
        """Bring the examples to the front."""
        return Captured(use, *use.examples_first(grad_output))

    @property
    def rule(self) -> Rule:
        """The use's."""
        return self.use.rule

    @property
    def _rows(self) -> int:
        """Rows an example in what the rule works on."""
        return 1 if self.use.rule.any_leading else self.use.layout.fold

    def take(self, rows: slice) -> Captured:
        """Select examples."""
        k = self._rows
        if k > 1 and not self.use.layout.outside:
            raise AssertionError("rows of an example lie apart")
        part = slice(rows.start * k, rows.stop * k)
        return Captured(self.use, self.call.take(part), self.grad_output[part])

    @property
    def divisible(self) -> bool:
        """Whether a part of the examples can be taken."""
        return self._rows == 1 or self.use.layout.outside

    def per_example(self, role: str) -> Tensor:
        """Return the gradient of one parameter for each example."""
        grad = self.use.rule.per_example(role, self.call, self.grad_output)
        return grad if self._rows == 1 else self.use.layout.per_example(grad)

    def positions(self) -> Positions:
        """Return the weight's gradient as a sum over positions."""
        found = self.use.rule.positions(self.call, self.grad_output)
        if self._rows == 1:
            return found
        # The rule took each row for an example: its positions are more of the example's.
        layout = self.use.layout
        left, right = (layout.first(X).flatten(1, 2) for X in (found.left_NTp, found.right_NTd))
        return Positions(left, right)


@dataclass(eq=False)
class Capture(TorchFunctionMode):
    """Record the uses of parameters while the mode is active.

    Args:
        parameters: in play, by name.
        constants: tensors that depend on no example although they require gradients: parameters
            that are not in play.
        inputs: tensors of the examples.
        copying: numbers of calls that make a copy of a source for each example (`expand`): their
            outputs depend on the number of examples, so that these calls are uses.
    """

    parameters: Mapping[str, Tensor]
    constants: Collection[Tensor]
    inputs: Collection[Tensor]
    copying: Collection[int] = ()
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
        self._n_calls = 0

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
        self._n_calls += 1
        number = self._n_calls
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # a mode outside sees the network's calls alone
            self._note(func, args, kwargs, output, number, taken, sources)
        return output

    def _note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        number: int,
        taken: list[Tensor],
        sources: list[Source],
    ) -> None:
        others = [t for t in taken if id(t) not in self._sources]
        depends = any(self._depends_on_examples(t) for t in others)
        if sources and _writes(func):
            # What was read before and what is read after are not the same tensor.
            name = func.__name__
            if args and id(args[0]) in self._sources:
                self._mark([self._sources[id(args[0])]], f"{name} writes it in place")
        if sources and _is_differentiable(output):
            if depends or number in self.copying:
                self._use(func, args, kwargs, output, sources, number)
            else:
                self._derive(func, output, sources, number)
        elif depends:
            self._spread(func, args, output)

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
        if _writes(func) and args and isinstance(args[0], Tensor):
            self._of_examples[args[0]] = True

    def _derive(
        self, func: Callable[..., Any], output: Any, sources: list[Source], number: int
    ) -> None:
        for place, leaf in enumerate(pytree.tree_leaves(output)):
            if _is_differentiable(leaf) and id(leaf) not in self._sources:
                source = Source(
                    f"{func.__name__} #{number}.{place}",
                    leaf,
                    frozenset().union(*(s.parameters for s in sources)),
                    number,
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
        number: int,
    ) -> None:
        rule = RULES.get(func)
        call = None
        if rule is not None and isinstance(output, Tensor):
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
                number,
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


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a call writes its first argument: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING


_WRITING = {
    "__setitem__",
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod")),
}
