"""How the report writes numbers."""

from __future__ import annotations

import numpy as np
import xarray as xr


def number(value: float, digits: int = 2) -> str:
    """Write a number with a true minus sign, and no minus before zero."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def measured(at: xr.Dataset, name: str, digits: int = 2) -> str:
    """Write a number ± its standard error, and in brackets that over seeds, as far as known.

    An error below half a unit of the last digit gets digits until it shows; four at most.
    """
    value, error, seeds = (
        float(at[key]) if key in at else np.nan
        for key in (name, f"{name}_error", f"{name}_seed_error")
    )
    if not np.isfinite(value) or not np.isfinite(error):
        return number(value, digits)
    while digits < 4 and 0 < error < 0.5 * 10.0**-digits:
        digits += 1
    text = f"{number(value, digits)} ± {number(error, digits)}"
    return f"{text} (± {number(seeds, digits)})" if np.isfinite(seeds) else text


def percent(share: float) -> str:
    """Write a share in percent, with as many digits as tell."""
    hundredths = 100 * share
    if 0 < hundredths < 0.01:
        return "less than 0.01 %"
    digits = 0 if hundredths >= 9.95 or hundredths == 0 else 1 if hundredths >= 1 else 2
    return f"{hundredths:.{digits}f} %"


def counted(n: int, one: str, several: str) -> str:
    """Write a number of things."""
    return f"{n:,} {one if n == 1 else several}"


def joined(*parts: str) -> str:
    """Put what is known one after the other; what is empty was not given."""
    return ", ".join(part for part in parts if part)


def sentence(at: str, text: str) -> str:
    """Begin a sentence with where it holds, if that has a name."""
    text = f"{at}: {text}" if at else text
    return text[:1].upper() + text[1:]


def bound(value: float) -> str:
    """Write an error bound."""
    if np.isnan(value):
        return "–"
    if value >= 1e-3:
        return f"{value:.2g}".replace("inf", "∞")
    return f"{value:.1e}".replace("e-0", "e-").replace("-", "−")
