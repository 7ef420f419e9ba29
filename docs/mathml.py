"""Formulas of the documentation as MathML, made when the site is built: no script, no network."""

import html
import re
import unicodedata
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>', re.DOTALL
)
# What browsers draw is MathML Core, with spaces and primes unlike TeX's.
_AMENDMENTS = [
    # log, exp, Var, …: a thin space on both sides, but none before a parenthesis.
    (r"<(m[io])>([A-Za-z]{2,})</\1>(?=<mo[^>]*>&#x00028;)", r'<mo lspace="0.167em" rspace="0">\2</mo>'),
    (r"<(m[io])>([A-Za-z]{2,})</\1>", r'<mo lspace="0.167em" rspace="0.167em">\2</mo>'),
    (r'(<mo[^>]*>&#x00028;</mo>)<mo lspace="0.167em"', r'\1<mo lspace="0"'),
    # A prime is raised in its font already.
    (
        r"<msup>(<mi>[^<]*</mi>)<mi>(&#x02032;)</mi></msup>",
        r'<mrow>\1<mo lspace="0" rspace="0">\2</mo></mrow>',
    ),
    (
        r"<msubsup>(<mi>[^<]*</mi>)(<mi>[^<]*</mi>)<mi>(&#x02032;)</mi></msubsup>",
        r'<msub><mrow>\1<mo lspace="0" rspace="0">\3</mo></mrow>\2</msub>',
    ),
    (r"<mo>(&#x0002F;)</mo>", r'<mo lspace="0" rspace="0">\1</mo>'),
    (r"<mo>(&#x02202;)</mo>", r"<mi>\1</mi>"),  # ∂ is no operator
    (r"(<mo>&#x0003D;</mo>)<mo>(&#x02212;)</mo>", r'\1<mo form="prefix">\2</mo>'),
]
_ALPHABET = re.compile(r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>')


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs for each page's HTML."""
    return _FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    block = match["block"] is not None
    source = html.unescape(match["block"] if block else match["inline"])
    mathml = convert(source.strip(), display="block" if block else "inline")
    for pattern, replacement in _AMENDMENTS:
        mathml = re.sub(pattern, replacement, mathml)
    mathml = _ALPHABET.sub(_letter, mathml)
    return f'<div class="formula">{mathml}</div>' if block else mathml


def _letter(match: re.Match[str]) -> str:
    r"""\mathcal and \mathbb by their characters: browsers know no other mathvariant than "normal"."""
    name = f"{match[1].upper()} CAPITAL {match[2]}"
    try:
        return f"<mi>{unicodedata.lookup(name)}</mi>"
    except KeyError:
        return f"<mi>{unicodedata.lookup(f'MATHEMATICAL {name}')}</mi>"
