"""Whether two answers are equal, as far as that can be told without computer algebra.

`compare` settles numbers, words, letters and lists of numbers exactly and in microseconds; everything else is
left to `gvpo.rewards.symbolic`, which runs in a worker process.
"""

import re
from fractions import Fraction

from gvpo.rewards.normalization import Quantity, clean, key, known_unit, quantity
from gvpo.rewards.prose import QUANTITY

# As many decimals as Math-Verify compares floating-point answers to.
_DECIMALS = 6
_MAX_ELEMENTS = 64
_MAX_LENGTH = 400
_BASE_WORDS = "two|three|four|five|six|seven|eight|nine|ten|sixteen"
_BASE = re.compile(
    r"(?P<digits>[0-9A-F][0-9A-F, ]*)"
    rf"(?:_\s*\{{?\s*(?P<base>\d{{1,2}}|{_BASE_WORDS})\s*\}}?|\s+(?:in\s+)?base[\s-]+(?P<base2>\d{{1,2}}))"
)
_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
               "nine": "9", "ten": "10", "sixteen": "16"}  # fmt: skip
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::\d\d)?\s*([ap])?\.?\s*(?:m\.?)?", re.IGNORECASE)
_CHOICE = re.compile(r"[\[(]?\s*([A-Ha-h])\s*[\])]?")
_CHOICE_WITH_VALUE = re.compile(r"(?:\(\s*([A-H])\s*\)|([A-H])\s*[).:])\s*(?P<value>\S.*)", re.DOTALL)
_NAME = r"(?:\\?[A-Za-z]+(?:_\{?\w{1,8}\}?)?'{0,2}(?:\s*\([^()=]{1,20}\))?|[A-Za-z][A-Za-z ]{2,40})"
_ASSIGNMENT = re.compile(rf"{_NAME}\s*(?:=|\\in(?![a-zA-Z])|\\approx|:)\s*(?P<value>[^=].*)", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d\s.,+*/×^()$%\\a-z{}_=-]+")
_FUNCTION = re.compile(r"([A-Za-z])\s*\(\s*([a-z])\s*\)\s*=.+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_DURATION = re.compile(
    r"(\d+(?:\.\d+)?)\s*(hours?|hrs?|h|minutes?|mins?|seconds?|secs?|dollars?|cents?)\b[\s,]*(?:and\s+)?",
    re.IGNORECASE,
)
_RATIO = re.compile(r"(\d+)\s*(?::|\bto\b)\s*(\d+)")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def compare(truth: str, answer: str) -> bool | None:
    """Whether `answer` equals `truth`; None when that takes computer algebra.

    Args:
        truth: the ground truth, as written.
        answer: an extracted answer, as written.
    """
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
        return _quantities_equal(expected, given)
    for settle in (_in_base, _clock, _ratio, _choice, _duration, _yes_or_no):
        verdict = settle(truth, answer)
        if verdict is not None:
            return verdict
    if (given and (_is_words(truth) or _is_container(truth))) or (expected and _is_container(answer, "([")):
        return False
    if _is_words(truth):
        return _words(truth) == _words(_after_name(answer)) if _is_words(_after_name(answer)) else None
    listed = _lists(truth, answer)
    if listed is not None:
        return listed
    renamed = _with_variable_of(truth, answer)
    if renamed is not None:
        return _compare(truth, renamed)
    value = _assigned(answer)
    if value is not None and _assigned(truth) is None:
        return _compare(truth, value)
    value = _assigned(truth)
    if value is not None and quantity(value) and given:
        return _compare(value, answer)
    if expected:
        return _in_prose(expected, answer)
    return None


# --- Numbers ------------------------------------------------------------------------------------------------


def _quantities_equal(truth: Quantity, answer: Quantity) -> bool:
    units = known_unit(truth.unit), known_unit(answer.unit)
    if truth.currency in ("$",) and not truth.unit:
        units = "$", units[1]
    if answer.currency in ("$",) and not answer.unit:
        units = units[0], "$"
    if units == ("$", "cent"):
        return _close(truth.value * truth.scale, answer.value / 100)
    if units[0] and units[1] and units[0] != units[1]:
        return False
    return any(_close(a, b) for a in _readings(truth) for b in _readings(answer, truth))


def _readings(number: Quantity, truth: Quantity | None = None) -> list[Fraction]:
    """The values that a number may be meant as: "2 million" is 2 where millions are asked for."""
    readings = [number.value * number.scale]
    if number.scale != 1:
        readings.append(number.value)
    if number.percent and (truth is None or not truth.percent):
        readings.append(number.value * number.scale / 100)
    return readings


def _close(truth: Fraction, answer: Fraction) -> bool:
    if truth == answer:
        return True
    # Only numbers written with decimals can be roundings of each other.
    exact = truth.denominator == 1 and answer.denominator == 1
    rounding = min(Fraction(1, 2 * 10**_DECIMALS), 2 * abs(truth) / 10**_DECIMALS)
    return not exact and abs(truth - answer) < rounding


def _in_base(truth: str, answer: str) -> bool | None:
    expected, given = _BASE.fullmatch(truth), _BASE.fullmatch(answer)
    if expected is None and given is None:
        return None

    def parts(found: re.Match[str] | None, text: str) -> tuple[str, str]:
        if found is None:
            return re.sub(r"[ ,]", "", text), ""
        base = found["base"] or found["base2"]
        return re.sub(r"[ ,]", "", found["digits"]), _BASE_NAMES.get(base, base)

    if given is None and not re.fullmatch(r"[0-9A-F, ]+", answer):
        return None
    (digits, base), (given_digits, given_base) = parts(expected, truth), parts(given, answer)
    return digits == given_digits and (not base or not given_base or base == given_base)


def _clock(truth: str, answer: str) -> bool | None:
    expected, given = _CLOCK.fullmatch(truth), _CLOCK.fullmatch(answer)
    if not expected or not given:
        return None
    same = int(expected[1]) == int(given[1]) and expected[2] == given[2]
    halves = {half.lower() for half in (expected[3], given[3]) if half}
    return same and len(halves) <= 1


def _ratio(truth: str, answer: str) -> bool | None:
    """ "5 to 3" against "5:3"."""
    expected, given = _RATIO.fullmatch(truth), _RATIO.fullmatch(answer)
    return expected.groups() == given.groups() if expected and given else None


def _duration(truth: str, answer: str) -> bool | None:
    """ "2 hours 30 minutes" against 150 or 2.5, "3 dollars and 20 cents" against 3.20."""
    expected = quantity(truth)
    parts = _DURATION.findall(answer)
    if not expected or len(parts) < 2 or _DURATION.sub("", answer).strip():
        return None
    units = [unit[0].lower() for _, unit in parts]
    if units[:2] == ["d", "c"]:
        return _close(expected.value, Fraction(parts[0][0]) + Fraction(parts[1][0]) / 100)
    if any(unit not in _SECONDS for unit in units) or len(set(units)) < len(units):
        return None
    sizes = [Fraction(number) * _SECONDS[unit] for (number, _), unit in zip(parts, units, strict=True)]
    seconds = sum(sizes, start=Fraction(0))
    asked = known_unit(expected.unit)
    return any(
        _close(expected.value, seconds / size)
        for unit, size in _SECONDS.items()
        if asked in (None, _UNIT_OF[unit])
    )


_UNIT_OF = {"h": "h", "m": "min", "s": "s"}


# --- Words --------------------------------------------------------------------------------------------------


def _choice(truth: str, answer: str) -> bool | None:
    """Multiple choice: "C" against "(C)", and "(C) 12" against "C" or 12."""
    letter = _CHOICE.fullmatch(truth)
    with_value = _CHOICE_WITH_VALUE.fullmatch(answer)
    if with_value:
        chosen = with_value[1] or with_value[2]
        if letter:
            return letter[1].upper() == chosen
        return _compare(truth, with_value["value"])
    # "a" alone may be a variable, "(C)" or "C" as a truth with a bracketed answer may not.
    given = _CHOICE.fullmatch(answer)
    if letter and given and (letter[1].isupper() or "(" in truth):
        return letter[1].upper() == given[1].upper()
    return None


def _yes_or_no(truth: str, answer: str) -> bool | None:
    """ "Yes, it is" against "yes"."""
    expected = truth.lower()
    if expected not in ("yes", "no", "true", "false"):
        return None
    first = re.match(r"[a-z]+", answer.lower())
    return bool(first) and first.group() == expected  # type: ignore[union-attr]


def _in_prose(truth: Quantity, answer: str) -> bool | None:
    """The number in "Natalia sold 72 clips" against 72; None for what is not prose."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", answer)
    if re.search(r"[\\^_={}]", answer) or not words or _BOUND.match(answer):
        return None
    numbers = QUANTITY.findall(answer)
    if len(numbers) != 1 or len(words) < 2:
        return False if not numbers else None
    given = quantity(clean(numbers[0]))
    return given is not None and _quantities_equal(truth, given)


_BOUND = re.compile(
    r"(?:at least|at most|(?:more|less|greater|fewer|larger|smaller) than|between|over|under)\b", re.I
)


def _is_words(text: str) -> bool:
    return bool(_WORDS.fullmatch(text)) and len(text.replace(" ", "")) > 1


def _words(text: str) -> str:
    words = re.sub(r"[^a-z]+", " ", text.lower()).strip()
    return re.sub(r"^(?:the|a|an) ", "", words)


def _with_variable_of(truth: str, answer: str) -> str | None:
    """ "f(n) = n + 1" as "f(x) = x + 1" where the truth says x; None when there is nothing to rename."""
    expected, given = _FUNCTION.fullmatch(truth), _FUNCTION.fullmatch(answer)
    if not expected or not given or expected[1] != given[1] or expected[2] == given[2]:
        return None
    variable = rf"(?<![\\A-Za-z]){given[2]}(?![A-Za-z])"
    if re.search(rf"(?<![\\A-Za-z]){expected[2]}(?![A-Za-z])", answer):
        return None
    return re.sub(variable, expected[2], answer)


def _after_name(answer: str) -> str:
    value = _assigned(answer)
    return answer if value is None else value


def _assigned(text: str) -> str | None:
    """The right side of "x = 5", "x \\in [2, 3]" or "Total cost: 5"; None without one, or with several."""
    found = _ASSIGNMENT.fullmatch(text)
    if found:
        value = found["value"]
        return None if re.search(r"[,;].*=", value) else value.rpartition("=")[2].strip() or None
    left, equals, right = (part.strip() for part in text.rpartition("="))
    # A chain of arithmetic, "3 * 6 = 18": its last member is the answer. With variables it is an equation.
    if equals and (quantity(right) or _BASE.fullmatch(right)) and _ARITHMETIC.fullmatch(left):
        commands = re.sub(r"\\[a-z]+", " ", left)
        if not re.search(r"[a-z]", commands):
            return right
    return None


def closes_with_words(completion: str, truth: str) -> bool:
    """Whether the last sentence ends in a truth that is words: "It was a Friday." for "Friday"."""
    expected = clean(truth)
    if not _is_words(expected) or _words(expected) in ("yes", "no", "true", "false"):
        return False
    sentence = re.split(r"[.!?]\s|\n", completion.strip()[-400:].rstrip(".!* "))[-1]
    said = f" {_words(sentence)}"
    denied = re.search(r" (?:not|never|or|neither|nor|isn|wasn|cannot|can) ", f"{said} ")
    return said.endswith(f" {_words(expected)}") and len(said.split()) > 2 and not denied


# --- Lists --------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = "([{", ")]}"


def _lists(truth: str, answer: str) -> bool | None:
    """Lists, sets and tuples of numbers or words. None for those with other elements, and for intervals."""
    expected, given = _elements(truth), _elements(answer)
    if expected is None and given is None:
        return None
    one_to_one = None
    if given is not None and quantity(truth):
        one_to_one = [_compare(truth, part) for part in given[1]]
    elif expected is not None and quantity(answer):
        one_to_one = [_compare(part, answer) for part in expected[1]]
    if one_to_one is not None:
        # Several answers where one is asked for; but "15.5, or 31/2" is one.
        return True if all(one_to_one) else False if False in one_to_one else None
    if expected is None or given is None:
        return None
    if expected[0] == given[0] == "" or {expected[0], given[0]} <= {"", "{"}:
        ordered = False
    elif {expected[0], given[0]} <= {"", "("}:
        ordered = True
    else:
        return None
    left, right = expected[1], [_after_name(part) for part in given[1]]
    if not ordered and expected[0] != "{":
        left = [_after_name(part) for part in left]
    if not all(quantity(part) or _is_words(part) for part in [*left, *right]):
        return None
    if (not ordered and given[0] == "{") or expected[0] == "{":
        right = _distinct(right)
    if len(left) != len(right):
        return False
    if ordered:
        return all(_compare(a, b) is True for a, b in zip(left, right, strict=True))
    remaining = list(right)
    for part in left:
        match = next((other for other in remaining if _compare(part, other) is True), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _is_container(text: str, brackets: str = _OPEN) -> bool:
    """Whether this is a tuple, set or interval of two or more elements."""
    if len(text) < 5 or text[0] not in brackets or text[-1] not in _CLOSE or not _encloses(text):
        return False
    parts = _split(text[1:-1])
    return parts is not None and len(parts) > 1


def _distinct(parts: list[str]) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if not any(_compare(part, other) is True for other in kept):
            kept.append(part)
    return kept


def _elements(text: str) -> tuple[str, list[str]] | None:
    """The bracket and the parts of a list; None when it is not one."""
    text = text.replace(r"\{", "{").replace(r"\}", "}").strip()
    text = re.sub(r"^(?:either|both)\s+", "", text)
    bracket = ""
    if len(text) > 1 and text[0] in "({" and text[-1] == _CLOSE[_OPEN.index(text[0])] and _encloses(text):
        bracket, text = text[0], text[1:-1]
    parts = _split(text)
    if parts is None or len(parts) < 2 or not all(parts):
        return None
    return bracket, parts


def _encloses(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return position == len(text) - 1
    return False


def _split(text: str) -> list[str] | None:
    """Parts between commas, semicolons, "and" and "or" outside brackets, but not at thousands separators."""
    if len(text) > 1_000:
        return None
    text = re.sub(r"\s*,?\s*\b(?:and|or)\b\s*(?:maybe|possibly)?\s*", ";", text)
    separator = ";" if ";" in text and not re.search(r",\s", text) else ",;"
    if separator == ";" and re.search(r",(?!\d{3}(?!\d))", text):
        separator = ",;"
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and character in separator:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return parts if len(parts) <= _MAX_ELEMENTS else None
