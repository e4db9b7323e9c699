"""What error of a cosine is let pass: decided here, for gradients, runs, watches and reports."""

from __future__ import annotations

from collections.abc import Mapping

_ALLOWED: Mapping[str, float] = {"bf16": 0.1, "tf32": 0.1}  # of so few digits no more is asked
_OF_OTHERS = 0.01


def allowed_error(precision: str) -> float:
    """Return the largest error bound of a cosine that is let pass in a precision."""
    return _ALLOWED.get(precision, _OF_OTHERS)


def decides_nothing(error_bound: float) -> bool:
    """Whether no sign is certain under an error bound: a cosine may be off by all that it can be.

    Where no pair is counted as undecided, then, every cosine is 0, which may be wrong too.
    """
    return error_bound >= 1
