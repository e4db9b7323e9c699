"""What error of a cosine is let pass: decided here, for gradients, runs, watches and reports."""

from __future__ import annotations

from collections.abc import Mapping

_ALLOWED: Mapping[str, float] = {"bf16": 0.1, "tf32": 0.1}  # of so few digits no more is asked
_OF_OTHERS = 0.01


def allowed_error(precision: str) -> float:
    """Return the largest error bound of a cosine that is let pass in a precision."""
    return _ALLOWED.get(precision, _OF_OTHERS)
