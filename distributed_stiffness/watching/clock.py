"""How much of a training's time measuring may take, and has taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Time since the training began, and how much of it went into measurements.

    Args:
        budget: share of the time that measurements may take, in (0, 1); None: any.
        now: seconds, from anywhere.
    """

    budget: float | None
    now: Callable[[], float] = time.perf_counter
    spent: float = 0.0  # seconds
    longest: float = 0.0  # of the measurements so far: what the next one is taken to need
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def share(self) -> float:
        """Of the time so far, in [0, 1]."""
        elapsed = self.now() - self.began
        return self.spent / elapsed if elapsed > 0 else 0.0

    def allows(self) -> bool:
        """Whether one more measurement keeps the share; of the first nothing is known yet."""
        if self.budget is None or not self.longest:
            return True
        after = self.now() - self.began + self.longest
        return self.spent + self.longest <= self.budget * after

    def add(self, seconds: float) -> None:
        """Count a measurement."""
        self.spent += seconds
        self.longest = max(self.longest, seconds)
