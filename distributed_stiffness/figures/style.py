"""The look of every figure, without pyplot: nothing global changes, nothing is left open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distributed_stiffness.errors import DataError

_STYLE = Path(__file__).with_name("style.mplstyle")

MEANING = {
    "sign": "sign stiffness: share of pairs that help each other minus share that harm",
    "cosine": "cosine stiffness: mean cosine of the two loss gradients",
}

BANDS = "bands: ± one standard error over examples"


@contextmanager
def style() -> Iterator[None]:
    """Make and save figures in the project's style."""
    with matplotlib.rc_context(fname=_STYLE):
        yield


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
