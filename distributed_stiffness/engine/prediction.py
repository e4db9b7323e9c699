"""What a plan will take on so many replicas: operations, bytes, time. Pure.

Compared with what it took when a run ends (job.py), so that a plan that misleads is seen.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from distributed_stiffness.plan import Plan, in_words


@dataclass(frozen=True)
class Speed:
    """What a replica was measured to take."""

    gradient: float  # seconds of making one
    pair: float  # seconds of the product of two
    exact: Speed | None = None  # with precision float64, where that was measured too

    def of(self, gradients: float, pairs: float) -> float:
        """Return the seconds that so many take."""
        return gradients * self.gradient + pairs * self.pair


@dataclass(frozen=True)
class Prediction:
    """What all matrices of a plan take; `seconds` None where no speed was measured."""

    replicas: int
    gradients: float  # how often each is made
    operations: float  # floating-point, two for a multiply-add
    recomputed: float  # share of the operations that make gradients again
    bytes_written: int  # of matrices, before compression
    seconds: float | None
    exact_times: float | None = None  # as long, with precision float64

    def describe(self) -> str:
        """One line for people."""
        again = f", {self.recomputed:.0%} to make gradients again" if self.recomputed else ""
        time = f"about {_duration(self.seconds)} on" if self.seconds is not None else "on"
        exact = ""
        if self.exact_times is not None:
            exact = f"; float64 gradients would take {self.exact_times:.2g} times as long"
        return (
            f"predicted: {self.operations:.2g} floating-point operations{again}; up to"
            f" {in_words(self.bytes_written)}; {time} {self.replicas} replica(s){exact}"
        )

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def predict(
    plan: Plan, *, replicas: int, speed: Speed | None = None, left: float = 1.0
) -> Prediction:
    """Predict what a plan takes.

    k replicas that share a checkpoint cut its triangle into areas of r rows and c columns with
    r·c = N²/2k, and make r + c ≥ N·√(2/k) gradients each: √(2k) times each gradient in all.

    Args:
        plan: of the study.
        replicas: that work side by side.
        speed: of one of them.
        left: share of the tiles that are not there yet.
    """
    together = replicas / plan.n_checkpoints
    made = max(plan.gradients_per_example, math.sqrt(2 * together) if together > 1 else 1.0)
    gradients, pairs = plan.n_examples * made, plan.n_examples**2 / 2
    operations = 2 * (gradients * plan.making_work + pairs * plan.pair_work)
    again = 2 * (gradients - plan.n_examples) * plan.making_work
    seconds = exact_times = None
    if speed is not None:
        each = speed.of(gradients, pairs)
        seconds = left * plan.n_checkpoints * each / replicas
        if speed.exact is not None:
            exact_times = speed.exact.of(gradients, pairs) / each
    return Prediction(
        replicas=replicas,
        gradients=made,
        operations=left * plan.n_checkpoints * operations,
        recomputed=again / max(1.0, operations),
        bytes_written=int(left * plan.store_bytes),
        seconds=seconds,
        exact_times=exact_times,
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
