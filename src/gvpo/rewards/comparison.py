"""Whether two answers are equal, as far as that can be told without computer algebra.

`compare` settles numbers, words, letters and lists of them exactly and in microseconds; everything else is
left to `gvpo.rewards.symbolic`, which runs in a worker process.
"""

import re
from fractions import Fraction

from gvpo.rewards.normalization import Quantity, clean, key, known_unit, quantity
from gvpo.rewards.symbolic import depths

# As many decimals as Math-Verify compares floating-point answers to.
_ROUNDING = Fraction(1, 2 * 10**6)
_MAX_LENGTH = 400
_MAX_ELEMENTS = 64
_CHOICE = re.compile(r"[\[(]?\s*([A-H])\s*[\])]?")
_CHOICE_WITH_VALUE = re.compile(r"(?:\(\s*([A-H])\s*\)|([A-H])\s*[).:])\s*(?P<value>\S.*)", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-]+[A-Za-z]+)*|[Nn]o")
_BASE = re.compile(r"([0-9A-F]+)\s*_\s*(?:\w+|\{\s*\w+\s*\})")
_NAMED = re.compile(r"(?:\\?[A-Za-z]+(?:_\{?\w{1,8}\}?)?(?:\s*\([^()=]{1,20}\))?|[A-Za-z][A-Za-z ]{2,40})\s*"
                    r"(?:=|\\in(?![a-zA-Z])|\\approx|:)\s*(?P<value>[^=]+)", re.DOTALL)  # fmt: skip
_ARITHMETIC = re.compile(r"(?:[\d\s.,+*/^()$%{}=-]|\\(?:times|cdot|frac|div)\b)+=(?P<value>[^=]+)")


def compare(truth: str, answer: str) -> bool | None:
    """Whether `answer` equals `truth`, both as written; None when that takes computer algebra."""
    return _compare(clean(truth), clean(answer))


def _compare(truth: str, answer: str) -> bool | None:
    if not truth or not answer:
        return False
    if key(truth) == key(answer):
        return True
    if max(len(truth), len(answer)) > _MAX_LENGTH:
        return None
    expected, given = quantity(truth), quantity(answer)
    if expected and given:
        return _equal(expected, given)
    letter, chosen = _CHOICE.fullmatch(truth), _CHOICE_WITH_VALUE.fullmatch(answer)
    if chosen:
        return letter[1] in chosen.groups() if letter else _compare(truth, chosen["value"])
    if letter and (choice := _CHOICE.fullmatch(answer)):
        return letter[1] == choice[1]
    value = _assigned(answer)
    if value is not None and _assigned(truth) is None:
        return _compare(truth, value)
    if _WORDS.fullmatch(truth):
        return _plain_words(truth) == _plain_words(answer)
    if base := _BASE.fullmatch(truth):
        return base[1] == answer
    if expected and (_BASE.fullmatch(answer) or _WORDS.fullmatch(answer)):
        return False
    if given and (value := _assigned(truth)) is not None:
        return _compare(value, answer)
    return _lists(truth, answer)


def _equal(truth: Quantity, answer: Quantity) -> bool:
    units = {known_unit(truth.unit), known_unit(answer.unit)} - {None}
    if len(units) > 1:
        return False
    expected, given = [truth.value], [answer.value]
    if truth.percent != answer.percent:  # "25%" is 25 and 0.25, but 0.25 is not 25 where 25 is asked for
        (expected if truth.percent else given).append((truth if truth.percent else answer).value / 100)
    return any(_close(a, b) for a in expected for b in given)


def _close(truth: Fraction, answer: Fraction) -> bool:
    # Only numbers written with decimals can be roundings of each other.
    whole = truth.denominator == answer.denominator == 1
    return truth == answer or (not whole and abs(truth - answer) < min(_ROUNDING, 4 * _ROUNDING * abs(truth)))


def _plain_words(text: str) -> str:
    return re.sub(r"^(?:the|a|an) ", "", re.sub(r"[^a-z]+", " ", text.lower()).strip())


def _assigned(text: str) -> str | None:
    """The right side of "x = 5", "Total cost: 5" or "3 * 6 = 18"; None without one, or with several."""
    found = _NAMED.fullmatch(text) or _ARITHMETIC.fullmatch(text)
    return found["value"].strip() if found else None


# --- Lists --------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")


def _lists(truth: str, answer: str) -> bool | None:
    """Lists, sets and tuples of numbers or words; None for other elements and for intervals."""
    (bracket, expected), (given_bracket, given) = _elements(truth), _elements(answer)
    if len(expected) == len(given) == 1 or max(len(expected), len(given)) > _MAX_ELEMENTS:
        return None
    if not all(quantity(part) or _WORDS.fullmatch(part) for part in [*expected, *given]):
        return None
    brackets = {bracket, given_bracket}
    if len(expected) == 1 or len(given) == 1:  # several where one is asked for; but "15.5, or 31/2" is one
        return all(_compare(a, b) for a in expected for b in given) and not brackets & set("([")
    if brackets <= {"", "("} and "(" in brackets:
        return len(expected) == len(given) and all(map(_compare, expected, given))
    if "[" in brackets or "(" in brackets:
        return None
    if len(expected) != len(given) and "{" not in brackets:
        return False
    return all(any(_compare(a, b) for b in given) for a in expected) and all(
        any(_compare(a, b) for a in expected) for b in given
    )


def _elements(text: str) -> tuple[str, list[str]]:
    """The bracket around a list and its parts; other texts are one part."""
    text = text.replace(r"\{", "{").replace(r"\}", "}").strip()
    bracket = text[0] if _encloses(text) else ""
    inner = re.sub(r"\s*,?\s*\b(?:and|or)\b\s*", ";", text[1:-1] if bracket else text)
    parts, start = [], 0
    for position, (character, depth) in enumerate(zip(inner, depths(inner), strict=True)):
        if depth == 0 and character in ",;" and not _THOUSANDS.match(inner, max(0, position - 1)):
            parts.append(inner[start:position].strip())
            start = position + 1
    parts.append(inner[start:].strip())
    return (bracket, [_assigned(part) or part for part in parts]) if len(parts) > 1 else ("", [text])


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character, which is of its kind."""
    *inside, after = depths(text) or [1]
    return text[:1] + text[-1:] in ("()", "[]", "{}") and after == 0 and 0 not in inside
