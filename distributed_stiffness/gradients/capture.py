"""Catch every use of every parameter during one forward pass.

A `TorchFunctionMode` sees each torch call that the network makes, whether a module makes it or the
network's own code. A call that takes a parameter and has a structured rule (rules/) is recorded as
a `Use`: its operands, and the place in the autograd graph where the gradient of its output will
arrive. Every other call that takes a parameter marks that parameter as unstructured.

Axis letters: N examples, T positions that share a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from distributed_stiffness.gradients.rules import RULES
from distributed_stiffness.gradients.rules.rule import Call, Rule


@dataclass(frozen=True)
class Use:
    """One call with a structured rule."""

    rule: Rule
    call: Call
    names: Mapping[str, str]  # role in the call ("weight", "bias") -> parameter name
    edge: GradientEdge  # of the call's output, as it was before any in-place operation
    version: int  # of the call's input: a later in-place write would spoil what was kept
    output_shape: torch.Size

    @property
    def spoiled(self) -> bool:
        """Whether the input was written in place after the call."""
        return self.call.input._version != self.version


@dataclass(eq=False)
class Capture(TorchFunctionMode):
    """Record the uses of `parameters` (name -> tensor) while the mode is active."""

    parameters: Mapping[str, Tensor]
    uses: list[Use] = field(default_factory=list)
    unstructured: dict[str, str] = field(default_factory=dict)  # parameter -> the call that took it

    def __post_init__(self) -> None:
        super().__init__()
        self._name_of = {id(tensor): name for name, tensor in self.parameters.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call, then note which parameters it took."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        taken = {self._name_of[id(t)] for t in _tensors(args, kwargs) if id(t) in self._name_of}
        if taken and _is_differentiable(output):
            self._record(func, args, kwargs, output, taken)
        return output

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        taken: set[str],
    ) -> None:
        rule = RULES.get(func)
        call = rule.parse(args, kwargs) if rule else None
        roles = {
            role: self._name_of[id(tensor)]
            for role, tensor in (call.parameters.items() if call else ())
            if id(tensor) in self._name_of
        }
        # A parameter in any other place (the input of a linear layer, say) has no rule there.
        if rule is None or call is None or set(roles.values()) != taken or len(roles) != len(taken):
            self.unstructured |= dict.fromkeys(taken, getattr(func, "__name__", str(func)))
            return
        self.uses.append(
            Use(
                rule,
                call.detached(),
                roles,
                get_gradient_edge(output),
                call.input._version,
                output.shape,
            )
        )


def count_uses(output: Tensor, parameters: Mapping[str, Tensor]) -> Counter[str]:
    """Count how often each parameter enters the autograd graph of `output`.

    More often than it was captured means that a call was hidden: autograd functions of the
    network's own and TorchScript run past every `TorchFunctionMode`.
    """
    name_of = {get_gradient_edge(tensor).node: name for name, tensor in parameters.items()}
    found: Counter[str] = Counter()
    todo = [output.grad_fn] if output.grad_fn else []
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node in name_of:
                found[name_of[node]] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return found


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors among the arguments, one level of lists deep (LSTM passes its weights as a list)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _is_differentiable(output: Any) -> bool:
    outputs = output if isinstance(output, list | tuple) else (output,)
    return any(isinstance(o, Tensor) and o.requires_grad for o in outputs)
