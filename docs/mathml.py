"""Formulas of the documentation as MathML, made when the site is built: no script, no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs for each page's HTML."""

    def formula(match: re.Match[str]) -> str:
        block = match["block"] is not None
        source = html.unescape(match["block"] if block else match["inline"])
        return convert(source.strip(), display="block" if block else "inline")

    return _FORMULA.sub(formula, content)
