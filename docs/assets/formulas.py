"""Formulas of the site as MathML, which browsers draw by themselves: nothing is fetched for them.

A hook of mkdocs (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What arithmatex makes of $…$ and $$…$$, with `generic: true`.
_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<formula>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Replace every marked formula of a page."""
    return _MARKED.sub(_as_mathml, content)


def _as_mathml(marked: re.Match[str]) -> str:
    display = "block" if marked["tag"] == "div" else "inline"
    formula = convert(html.unescape(marked["formula"]), display=display)
    return f'<{marked["tag"]} class="arithmatex">{formula}</{marked["tag"]}>'
