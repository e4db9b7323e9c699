"""What a structured rule is: from one use of a parameter to per-example gradients.

Axis letters: N examples, T positions that share a weight, d inputs, p outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A torch call, taken apart: its input (N first), its parameters by role, its settings."""

    input: Tensor
    parameters: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def detached(self) -> Call:
        """Return the same call without its autograd history (the memory is shared)."""
        return replace(self, input=self.input.detach())


class Rule(ABC):
    """Per-example gradients of one kind of call."""

    name: str

    @abstractmethod
    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Take the call apart; None where the rule does not cover its settings."""

    @abstractmethod
    def per_example(self, role: str, call: Call, grad_output: Tensor) -> Tensor:
        """Return the gradient of one parameter for each example, shape (N, *parameter.shape).

        `grad_output` is the gradient of each example's loss with respect to the call's output.
        """
