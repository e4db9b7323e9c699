"""What a structured rule is: from one use of a parameter to per-example gradients.

Axis letters: N examples, T positions that share a weight, d inputs, p outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A torch call, taken apart: its input, its parameters by role, its settings."""

    input: Tensor | None  # None where the gradient does not need it
    parameters: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def detached(self) -> Call:
        """Return the same call without its autograd history (the memory is shared)."""
        return self if self.input is None else replace(self, input=self.input.detach())

    def take(self, rows: slice) -> Call:
        """Select examples."""
        return self if self.input is None else replace(self, input=self.input[rows])


@dataclass(frozen=True)
class Seen:
    """A torch call that took parameters, as it was made."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    sources: Sequence[Tensor]  # parameters among the arguments, or tensors made of them alone

    def named(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the arguments by name."""
        return dict(zip(arguments, self.args, strict=False)) | dict(self.kwargs)

    def is_source(self, value: Any) -> bool:
        """Whether an argument is a parameter."""
        return any(value is source for source in self.sources)


@dataclass(frozen=True)
class Positions:
    """A weight's gradient as a sum over positions, Σ_t left_t ⊗ right_t, of shape (p, d).

    `left_NTp` may hold indices instead, (N, T): then left_t is the unit vector of that index.
    """

    left_NTp: Tensor
    right_NTd: Tensor

    @property
    def by_index(self) -> bool:
        """Whether the left factors are unit vectors."""
        return self.left_NTp.dim() == 2


class Rule(ABC):
    """Per-example gradients of one kind of call."""

    name: str
    # Whether the rule takes any dimensions of positions between the examples and those that the
    # call works on; else each row of the first dimension is taken for an example.
    any_leading = False
    # Whether the weight's gradient is a sum over positions, with the output's gradient on the left
    # (else on the right), and the bias's gradient is the sum of that.
    has_positions = False
    grad_is_left = True
    joins_bias = True

    @abstractmethod
    def parse(self, seen: Seen) -> Call | None:
        """Take the call apart; None where the rule does not cover its settings."""

    @abstractmethod
    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Return the gradient of one parameter for each example, shape (N, *parameter.shape).

        `grad_output` is the gradient of each example's loss with respect to the call's output;
        it and the call's input have the examples first.
        """

    def row_dims(self, call: Call, output: Sequence[int]) -> tuple[int, ...]:  # noqa: ARG002
        """Return the dimensions of output and input along which lie rows, each of one example."""
        return (0,)

    def covers_positions(self, call: Call) -> bool:  # noqa: ARG002
        """Whether `positions` says all about the weight's gradient of this call."""
        return self.has_positions

    def positions(self, call: Call, grad_output: Tensor) -> Positions:
        """Return the weight's gradient as a sum of outer products."""
        raise NotImplementedError(self.name)

    def making_work(self, role: str, call: Call, output: Sequence[int]) -> int:  # noqa: ARG002
        """Multiply-adds of a parameter's gradients, for all examples in an output of this shape."""
        return math.prod(output)

    def scratch(self, role: str, call: Call, grad_output: Tensor) -> int:  # noqa: ARG002
        """Numbers that one example takes beside a parameter's gradient while that is made."""
        return 0


def each_position(X: Tensor) -> Tensor:
    """Fold all dimensions between the first and the last into one: (N, T, features)."""
    if X.dim() == 2:
        return X.unsqueeze(1)
    return X if X.dim() == 3 else X.flatten(1, -2)
