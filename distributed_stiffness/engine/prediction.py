"""What a plan will take on so many replicas: operations, bytes, time. Pure.

Compared with what it took when a run ends (job.py), so that a plan that misleads is seen.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from distributed_stiffness.plan import Plan, in_words


@dataclass(frozen=True)
class CheckSeconds:
    """What checks were measured to take."""

    each: float  # of a checkpoint: its sample in float64, and its undecided signs
    whole: float  # of the whole matrix, of the last checkpoint


@dataclass(frozen=True)
class Speed:
    """What a replica was measured to take, in seconds."""

    gradient: float  # of making one
    pair: float  # of the product of two
    exact: Speed | None = None  # with precision float64, where that was measured too
    fold: float = 0.0  # of a pair, until it is in the sums of both its examples; 0: pairs are kept
    checks: CheckSeconds | None = None

    def of(self, gradients: float, pairs: float) -> float:
        """Return the seconds that so many take."""
        return gradients * self.gradient + pairs * (self.pair + self.fold)


@dataclass(frozen=True)
class Prediction:
    """What all matrices of a plan take; seconds are None where no speed was measured."""

    replicas: int
    gradients: float  # how often each is made
    operations: float  # floating-point, two for a multiply-add
    recomputed: float  # share of the operations that make gradients again
    bytes_written: int  # of matrices, before compression
    seconds: float | None  # from the first tile to the last check, all replicas side by side
    tile_seconds: float | None = None  # of all replicas together
    fold_seconds: float | None = None  # of these
    check_seconds: float | None = None  # of all replicas together
    exact_times: float | None = None  # tiles as long, with precision float64

    def describe(self) -> str:
        """One line for people."""
        again = f", {self.recomputed:.0%} to make gradients again" if self.recomputed else ""
        exact = ""
        if self.exact_times is not None:
            exact = f"; float64 gradients would take {self.exact_times:.2g} times as long"
        return (
            f"predicted: {self.operations:.2g} floating-point operations{again}; up to"
            f" {in_words(self.bytes_written)}; {self._time()}{exact}"
        )

    def _time(self) -> str:
        on = f"on {self.replicas} replica(s)"
        if self.seconds is None:
            return on
        parts = {"checks": self.check_seconds, "folding": self.fold_seconds}
        said = [f"{_duration(seconds)} for {what}" for what, seconds in parts.items() if seconds]
        of_it = f" (of all replicas' time {', '.join(said)})" if said else ""
        return f"about {_duration(self.seconds)} {on}{of_it}"

    def at_rate(self, rate: float) -> DeviceHours:
        """Return what replicas take whose device does so many operations a second.

        Tiles are folded on the host, while the device makes the next ones; checks are taken to be
        as fast as they were measured.
        """
        device = self.operations / rate / 3600
        fold, checks = (
            (seconds or 0.0) / 3600 for seconds in (self.fold_seconds, self.check_seconds)
        )
        return DeviceHours(rate, device=device, fold=fold, checks=checks)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@dataclass(frozen=True)
class DeviceHours:
    """Hours of replicas, all together, at an assumed rate of their devices."""

    rate: float  # operations a second
    device: float  # of gradients and their products
    fold: float  # of their hosts, folding tiles into sums
    checks: float

    @property
    def replicas(self) -> float:
        """For how long replicas are needed."""
        return max(self.device, self.fold) + self.checks

    def describe(self) -> str:
        """One line for people."""
        fold = f", {self.fold:.2g} of their hosts beside them to fold tiles" if self.fold else ""
        return (
            f"at {self.rate:.3g} operations a second of a device: {self.replicas:.2g} replica-hours"
            f" (GPU hours, where each has a GPU): {self.device:.2g} of gradients and"
            f" products{fold}, and {self.checks:.2g} of checks at the speed measured here"
        )

    def to_json(self) -> dict[str, float]:
        """For machines."""
        return asdict(self) | {"replicas": self.replicas}


def predict(
    plan: Plan,
    *,
    replicas: int,
    speed: Speed | None = None,
    left: float = 1.0,
    unchecked: int | None = None,
) -> Prediction:
    """Predict what a plan takes.

    k replicas that share a checkpoint cut its triangle into areas of r rows and c columns with
    r·c = N²/2k, and make r + c ≥ N·√(2/k) gradients each: √(2k) times each gradient in all.

    Args:
        plan: of the study.
        replicas: that work side by side.
        speed: of one of them.
        left: share of the tiles that are not there yet.
        unchecked: checkpoints that are not checked yet, the last among them; None: all.
    """
    together = replicas / plan.n_checkpoints
    made = max(plan.gradients_per_example, math.sqrt(2 * together) if together > 1 else 1.0)
    gradients, pairs = plan.n_examples * made, plan.n_examples**2 / 2
    operations = 2 * (gradients * plan.making_work + pairs * plan.pair_work)
    again = 2 * (gradients - plan.n_examples) * plan.making_work
    matrices = left * plan.n_checkpoints
    whole = Prediction(
        replicas=replicas,
        gradients=made,
        operations=matrices * operations,
        recomputed=again / max(1.0, operations),
        bytes_written=int(left * plan.store_bytes),
        seconds=None,
    )
    if speed is None:
        return whole
    each = speed.of(gradients, pairs)
    n_checks = plan.n_checkpoints if unchecked is None else unchecked
    checks, last = _checks(speed.checks, n_checks)
    return replace(
        whole,
        # The last check begins when all else is done; others are made beside tiles.
        seconds=max((matrices * each + checks) / replicas, matrices * each / replicas + last),
        tile_seconds=matrices * each,
        fold_seconds=matrices * pairs * speed.fold,
        check_seconds=None if speed.checks is None else checks,
        exact_times=None if speed.exact is None else speed.exact.of(gradients, pairs) / each,
    )


def _checks(checks: CheckSeconds | None, n: int) -> tuple[float, float]:
    """Return the seconds of all checks that are left, and of the last one."""
    if checks is None or not n:
        return 0.0, 0.0
    return n * checks.each + checks.whole, checks.each + checks.whole


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
