"""Answers brought to one way of writing: wrappers, spacing, units, currency and number formats."""

import re
from dataclasses import dataclass
from fractions import Fraction

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "＝": "=", "，": ",", "：": ":", "（": "(", "）": ")", "％": "%",
        "“": '"', "”": '"', "’": "'", "‘": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "⁄": "/",
        "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ", "÷": "/",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
        "θ": r"\theta ", "°": r"^\circ ", "∅": r"\emptyset ",
        "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "²": "^2", "³": "^3",
    }
)  # fmt: skip
# In order; each holds for whole answers, and none is worth a rule that a single data set needs.
_REWRITES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"(?<!\\)\\[!,]\s*", ""),
        (r"(?<!\\)(?:\\[;:> ]|\\q?quad\b|\\(?:displaystyle|textstyle)\b)|~", " "),
        (r"\{,\}", ","),
        (r"\\([$%#])", r"\1"),
        (r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1"),
        (r"\\(?:left|right|big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])\s*\.?(?=\W|$)", ""),
        (r"\\[dtc]frac\b", r"\\frac"),
        (r"\\([lg])(?:eq|eqslant|e)(?![a-zA-Z])", r"\\\1e "),
        (r"\^\s*\{?\s*\\(?:circ|degree)\b\s*\}?|\\(?:text)?degree\b", " degrees"),
        (r"\\pmod\s*\{?\s*\w+\s*\}?|\(\s*\\?b?mod\s+\w+\s*\)", ""),
        (r"\\(?:text|mbox|math|operatorname|bold)[a-z]{0,4}\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<=\d)\s*\^\s*\{?\s*(?:st|nd|rd|th)\s*\}?(?![a-z])|(?<=\d)(?:st|nd|rd|th)\b", ""),
        (r"\\varnothing|\\\{\s*\\\}|^\\phi$", r"\\emptyset"),
        (r"\$([^$]*)\$", r"\1"),
        (r"\s+", " "),
    )
]
_WRAPPERS = (("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"),
             ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))  # fmt: skip


def clean(answer: str) -> str:
    """An answer without what says nothing about its value: delimiters, spacing, sizes, text commands.

    Money keeps its sign and units stay, since they may tell answers apart.
    """
    text, previous = answer.translate(_CHARACTERS), None
    while text != previous:
        previous = text
        for pattern, to in _REWRITES:
            text = pattern.sub(to, text)
        text = text.strip()
        text = re.sub(r"^[=:≈~]\s*", "", text if text.endswith("!") else text.rstrip(".,;: "))
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner
        if text.count("**") == 1:  # one half of a pair that the extraction cut through
            text = text.removeprefix("**").removesuffix("**")
        text = text[:-1] if text.endswith("$") else text
    return text


def key(cleaned: str) -> str:
    """What must be equal for two cleaned answers to be the same string, whatever their spacing."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", cleaned)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text).replace("$", "")


# --- Numbers ------------------------------------------------------------------------------------------------

_MAX_LENGTH = 400
_MAX_EXPONENT = 400


@dataclass(frozen=True)
class Quantity:
    """A number with what was written around it.

    Attributes:
        value: exact, before any percent sign.
        percent: a percent sign or word follows.
        unit: the unit's words, lower case; "$" or the like for money; empty without one.
    """

    value: Fraction
    percent: bool = False
    unit: str = ""


_DECIMAL = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ARGUMENT = rf"\s*(?:\{{\s*-?\s*{_DECIMAL}\s*\}}|\d)"
_QUANTITY = re.compile(
    r"(?:(?:approximately|about|around|exactly|roughly|only|just|a total of|\\approx)\s+)?"
    r"(?P<sign>-\s*|\+\s*|(?:negative|minus)\s+)?(?P<money>[$€£¥₹]\s*)?(?P<sign2>-\s*)?"
    r"(?:(?:(?P<whole>\d+)(?:\s*(?=\\)|\s+and\s+|\s+|-))?"
    rf"(?:\\frac(?P<over>{_ARGUMENT})(?P<under>{_ARGUMENT})|\(?(?P<top>{_DECIMAL})\)?\s*/\s*\(?(?P<bottom>{_DECIMAL})\)?(?![\d.]))"
    rf"|(?:(?P<mantissa>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*(?:\^|\*\*)\s*\{{?\s*(?P<power>-?\s*\d+)\s*\}}?"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d+))?)"
    rf"(?:\s*(?P<scale>{'|'.join(_SCALES)})\b)?\s*(?P<percent>%|percent\b|per cent\b)?(?P<unit>.*)",
    re.DOTALL,
)
NUMBER = re.compile(
    rf"(?<![\w.,^])-?[$€£¥₹]?{_DECIMAL}(?<![.,])(?:\s?/\s?\d+)?(?:\s?(?:%|percent\b|{'|'.join(_SCALES)}))?(?![\w^])"
)
_UNIT = re.compile(r"(?:\s*[-/(]?\s*[A-Za-zµΩ]+\)?\.?(?:\s*\^\s*\{?\s*-?[1-4]\s*\}?)?){1,6}")
_NOT_UNITS = re.compile(
    r"\b(?:or|and|pi|sqrt|sin|cos|tan|log|ln|exp|inf|infinity|infty|plus|minus|times|divided|mod|choose|over|equals?"
    r"|is|are|was|not|but|than|more|less|fewer|if|when|remainder|base|root|to)\b",
    re.IGNORECASE,
)
_UNITS = {
    name: names.split()[0]
    for names in (
        "cm centimeter centimetre", "mm millimeter millimetre", "m meter metre", "km kilometer kilometre",
        "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "mg milligram",
        "lb pound", "oz ounce", "l liter litre", "ml milliliter", "s sec second", "min minute", "h hr hour",
        "day", "week", "month", "yr year", "$ dollar usd", "cent", "€ euro", "degree deg", "radian rad",
        "mph",
    )
    for name in names.split()
}  # fmt: skip
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


def quantity(cleaned: str) -> Quantity | None:
    """The number that a cleaned answer is, with its unit; None when it is anything else.

    `5x`, `6m` and `2\\pi` are not numbers with units; `5 cm`, `$18`, `1,234.50`, `2\\frac{1}{3}`, `1 1/2`,
    `3 \\times 10^8`, `7/3`, `25%`, `negative 4`, `twenty-one` and `2 million` are numbers.
    """
    if len(cleaned) > _MAX_LENGTH:
        return None
    found = _QUANTITY.fullmatch(_in_digits(re.sub(r"^[({]\s*([-\d.,]+)\s*[)}]$", r"\1", cleaned.strip())))
    unit = _unit(found) if found else None
    if found is None or unit is None:
        return None
    try:
        value = _value(found)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    signs = (found["sign"] or "").strip() in ("-", "negative", "minus"), bool(found["sign2"])
    return Quantity(-value if any(signs) else value, bool(found["percent"]), unit)


def _value(found: re.Match[str]) -> Fraction:
    def number(text: str | None, default: int = 0) -> Fraction:
        return Fraction(re.sub(r"[, {}]", "", text)) if text else Fraction(default)

    value = number(found["whole"])
    if top := found["over"] or found["top"]:
        value += number(top) / number(found["under"] or found["bottom"])
    else:
        exponent = int((found["power"] or found["exponent"] or "0").replace(" ", ""))
        if abs(exponent) > _MAX_EXPONENT:
            raise ValueError
        value = number(found["mantissa"] or found["decimal"], 1) * Fraction(10) ** exponent
    return value * _SCALES.get(found["scale"], 1)


def _unit(found: re.Match[str]) -> str | None:
    """The unit's words; None when what follows the number is no unit."""
    rest = found["unit"].rstrip(" .$")
    if not rest:
        return (found["money"] or "").strip()
    if not _UNIT.fullmatch(rest) or _NOT_UNITS.search(rest):
        return None
    words = re.findall(r"[A-Za-zµΩ]+", rest)
    apart = rest[0] in " -/(" or found.string[found.start("unit") - 1] == " "
    if any(len(word) == 1 and not ((apart and word.lower() in _UNITS) or word in "aA") for word in words):
        return None
    if not apart and words[0].lower().removesuffix("s") not in _UNITS:
        return None
    return " ".join(re.findall(r"[A-Za-zµΩ]+|-?\d", rest)).lower()


def known_unit(unit: str) -> str | None:
    """The canonical name of a unit of measure, with its power; None for other words ("eggs", "per day")."""
    words = unit.split()
    power = next((_POWERS.get(word, word) for word in words if word in _POWERS or word.isdigit()), "")
    names = [word for word in words if word not in _POWERS and not word.isdigit()]
    name = (_UNITS.get(names[0]) or _UNITS.get(names[0].removesuffix("s"))) if len(names) == 1 else None
    return f"{name}{power}" if name else None


_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
         "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
         "nineteen"]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = re.compile(rf"(?:({'|'.join(_TENS)})[- ]?)?({'|'.join(_ONES)})?\b(?! hundred)", re.IGNORECASE)


def _in_digits(text: str) -> str:
    """A number in words from zero to ninety-nine at the start of a text as digits."""
    found = _WORDS.match(text.lower())
    if not found or not found.group():
        return text
    tens, ones = found.groups()
    number = (10 * _TENS.index(tens) + 20 if tens else 0) + (_ONES.index(ones) if ones else 0)
    return f"{number}{' ' * found.group().endswith(' ')}{text[found.end() :]}"
