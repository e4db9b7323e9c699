"""What can be wrong with a store, and what a look over it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distributed_stiffness.engine.bounds import Bound, describe_bounds
from distributed_stiffness.tiling import Checkpoint

Kind = Literal[
    "unreadable",  # its bytes changed, are cut short or are gone
    "missing",  # a hole that no run fills by itself, or any hole in a finished store
    "not finite",
    "out of range",
    "diagonal",  # a cosine of an example with itself that is not 1, a distance that is not 0
    "zero gradient",  # a cosine that is not 0 where the gradient is
    "asymmetric",
    "inconsistent",  # with other numbers of the store
    "differs",  # from what the checkpoint and the data give
    "weights",  # a checkpoint's are not those that the store was made of
    "leftover",  # of a writer that died
]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    kind: Kind
    sentence: str
    array: str = ""
    chunk: str = ""  # key of the chunk in the store, or the path of another file
    place: Checkpoint | None = None
    checkpoint: str = ""  # the place in words

    def __str__(self) -> str:
        of = f" ({self.checkpoint})" if self.checkpoint else ""
        return f"{self.kind}: {self.chunk or self.array}{of}: {self.sentence}"

    def to_json(self) -> dict[str, str | None]:
        """For machines."""
        return {
            "kind": self.kind,
            "array": self.array or None,
            "checkpoint": self.checkpoint or None,
            "chunk": self.chunk or None,
            "sentence": self.sentence,
        }


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a look over a store found."""

    store: str
    complete: bool  # finished, and nothing is missing
    checked: Mapping[str, int]
    faults: tuple[Fault, ...]  # before any repair
    notes: tuple[str, ...]
    bounds: tuple[Bound, ...]  # of the checkpoints that are checked
    n_examples: int
    repaired: bool = False  # there were faults, and none is left

    @property
    def is_well(self) -> bool:
        """Whether no fault is left."""
        return not self.faults or self.repaired

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "store": self.store,
            "complete": self.complete,
            "checked": dict(self.checked),
            "faults": [fault.to_json() for fault in self.faults],
            "notes": list(self.notes),
            "bounds": [asdict(bound) for bound in self.bounds],
            "repaired": self.repaired,
        }

    def lines(self, most: int = 100) -> list[str]:
        """For people; at most so many faults."""
        counts = ", ".join(f"{n:,} {what}" for what, n in self.checked.items())
        lines = [str(fault) for fault in self.faults[:most]]
        if len(self.faults) > most:
            lines.append(f"… and {len(self.faults) - most:,} more faults (--json lists them all)")
        lines += [f"note: {note}" for note in self.notes]
        if self.bounds:
            lines.append(describe_bounds(self.bounds, self.n_examples))
        return [*lines, f"{self.store}: {self._verdict()}. Checked: {counts}"]

    def _verdict(self) -> str:
        n = len(self.faults)
        faults = f"{n:,} fault{'s' if n > 1 else ''}"
        state = "complete" if self.complete else "not complete"
        if not self.faults:
            return f"no fault; {state}"
        return f"{faults}, repaired; {state}" if self.repaired else f"{faults}; {state}"
