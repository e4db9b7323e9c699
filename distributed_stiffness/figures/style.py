"""The look of every figure, without pyplot: nothing global changes, nothing is left open."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import category

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from distributed_stiffness.errors import DataError

_STYLE = Path(__file__).with_name("style.mplstyle")

MEANING = {
    "sign": "sign stiffness: share of pairs that help each other minus share that harm",
    "cosine": "cosine stiffness: mean cosine of the two loss gradients",
}

BANDS = "bands: ± one standard error over examples"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def style() -> Iterator[None]:
    """Make and save figures in the project's style."""
    with matplotlib.rc_context(fname=_STYLE), warnings.catch_warnings():
        # A name may have a sign that no font here has: a box stands for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def in_one_line(name: str, most: int | None = None) -> str:
    """Return a name as it can be drawn and printed: ↵ for the end of a line, � for what is no sign.

    All else stays as it was given; that a dollar begins no formula is a matter of the style. Of a
    name of more than `most` letters the beginning and the end are kept.
    """
    if most is not None and len(name) > most:
        tail = most // 3
        name = f"{name[: most - tail - 1]}…{name[len(name) - tail :]}"
    return "".join(
        char
        if category(char) not in ("Cc", "Cs")
        else "↵"
        if char == "\n"
        else "\N{REPLACEMENT CHARACTER}"
        for char in name
    )


def powers_of_ten(axis: Axis) -> None:
    """Write 10⁻² on a logarithmic axis: matplotlib would write a formula, and none is read."""

    def text(value: float, _: int | None = None) -> str:
        exponent = round(math.log10(value)) if value > 0 else 0
        return f"10{str(exponent).translate(_RAISED)}" if value == 10.0**exponent else ""

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format that its suffix says (.png, .svg, .pdf); its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(path)
    return path


def heading(figure: Figure, title: str, details: str) -> None:
    """Write what is seen, in bold, and what it was seen on, below it; the figure must have axes."""
    # The empty second line keeps room for the details: one text has one weight.
    top = figure.suptitle(f"{title}\n", linespacing=1.5)
    below = figure.axes[0].annotate(
        details, (0.5, 0.0), xycoords=top, ha="center", va="bottom", annotation_clip=False
    )
    below.set_in_layout(False)


def band(ax: Axes, x: np.ndarray, mean: np.ndarray, error: np.ndarray, colour: Any) -> None:
    """Shade ± one standard error around means in [-1, 1]; nothing where the error is not known."""
    low, high = np.maximum(mean - error, -1), np.minimum(mean + error, 1)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=1)


def require_measure(measure: str) -> None:
    """Refuse a measure that does not exist.

    Raises:
        DataError: `measure` is neither "sign" nor "cosine".
    """
    if measure not in MEANING:
        raise DataError(f"measure is {measure!r}: expected 'sign' or 'cosine'")
