"""Answers brought to one way of writing: wrappers, units, currency, separators and number formats."""

import re
from dataclasses import dataclass
from fractions import Fraction

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "＝": "=", "，": ",", "：": ":", "（": "(", "）": ")", "％": "%",
        "“": '"', "”": '"', "’": "'", "‘": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
        "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ", "÷": "/",
        "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
        "θ": r"\theta ", "°": r"^\circ ", "⁄": "/", "∅": r"\emptyset ",
        "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅖": " 2/5",
        "⅗": " 3/5", "⅘": " 4/5", "⅙": " 1/6", "⅚": " 5/6", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8",
        "⅞": " 7/8",
        "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5",
    }
)  # fmt: skip

_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname|bold|emph)\s*\{([^{}]*)\}"
)
_SPACING = re.compile(
    # not the second half of a row's end, "\\ "
    r"(?<!\\)(?:\\[!,]\s*|\\[;:> ]|\\q?quad\b"
    r"|\\(?:displaystyle|textstyle|limits|hspace\{[^{}]*\}|phantom\{[^{}]*\}))|~"
)
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])\s*\.?(?=\W|$)")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)\b)|\\degree\b|\\textdegree\b")
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("*", "*"),
    ("_", "_"), ("`", "`"),
    ('"', '"'), ("'", "'"),
)  # fmt: skip
_MODULUS = re.compile(r"\\pmod\s*\{?\s*\w+\s*\}?|\(\s*(?:\\bmod|\\mod|mod)\s+\w+\s*\)")
_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(st|nd|rd|th)\s*\}?(?![a-z])")
_AND_A_HALF = re.compile(r"\s+and\s+(?:a|one)[\s-]+half\b")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)


def clean(answer: str) -> str:
    """An answer without what says nothing about its value: delimiters, spacing, sizes, text commands.

    Money keeps its sign and units stay, since they may tell answers apart.
    """
    text = answer.translate(_CHARACTERS)
    text = _SPACING.sub(lambda m: "" if m.group()[:2] in (r"\!", r"\,") else " ", text)
    text = text.replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%").replace(r"\#", "#")
    text = _strip(text)
    text = re.sub(r"\\varnothing|\\\{\s*\\\}|\\phi(?![a-zA-Z])(?=$)", lambda _: r"\emptyset", text)
    for _ in range(3):
        boxed = _BOXED.fullmatch(text)
        if not boxed:
            break
        text = _strip(boxed.group(1))
    text = _SIZES.sub("", text)
    text = re.sub(r"\\[dtc]frac\b", r"\\frac", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = re.sub(r"\\(?:leq|leqslant|le)(?![a-zA-Z])", r"\\le ", text)
    text = re.sub(r"\\(?:geq|geqslant|ge)(?![a-zA-Z])", r"\\ge ", text)
    text = _DEGREES.sub(" degrees", text)
    text = _MODULUS.sub("", text)
    for _ in range(3):
        replaced = _TEXT.sub(r" \1 ", text)
        if replaced == text:
            break
        text = replaced
    text = _AND_A_HALF.sub(" 1/2", _ORDINAL.sub(r"\1", text))
    return _strip(re.sub(r"\s+", " ", text))


def _strip(text: str) -> str:
    """Without wrapping delimiters and closing punctuation."""
    previous = None
    while previous != text:
        previous = text
        text = text.strip().rstrip(".,;:!").strip() if not text.endswith("!") else text.strip()
        text = re.sub(r"^[=:≈~]\s*", "", text)
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            wrapped = text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)
            if wrapped and left not in inner:
                text = inner
        if text.count("$") == 1 and text.endswith("$") and len(text) > 1:
            text = text[:-1]
        if text.count("**") == 1:  # one half of a pair that the extraction cut through
            text = text.removeprefix("**").removesuffix("**")
    return text


def key(cleaned: str) -> str:
    """What must be equal for two cleaned answers to be the same string, whatever their spacing."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", cleaned)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return text.replace("$", "").replace("\\,", "")


# --- Numbers ------------------------------------------------------------------------------------------------

_MAX_DIGITS = 400
_MAX_EXPONENT = 400


@dataclass(frozen=True)
class Quantity:
    """A number with what was written around it.

    Attributes:
        value: exact, before any percent sign or scale word.
        percent: a percent sign or word follows.
        scale: of a word such as "million"; 1 without one.
        unit: the unit's words, lower case; empty without one.
        decimals: digits after the decimal point; None for fractions and integers.
    """

    value: Fraction
    percent: bool = False
    scale: int = 1
    unit: str = ""
    decimals: int | None = None
    currency: str = ""


_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTER_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_DECIMAL = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)(?:\.\d+)?|\d+\.\d*|\.\d+|\d+)"
_BRACED = r"(?:\{\s*(?P<%s>-?\s*" + _DECIMAL + r")\s*\}|(?P<%s1>\d))"
_FRACTION = r"\\frac\s*" + _BRACED % ("num", "num") + r"\s*" + _BRACED % ("den", "den")
_HEDGES = (
    "about|approximately|approx|probably|likely|roughly|around|exactly|only|just|a total of|a|an|the|"
    r"\\approx|\\sim|≈|~|is|="
)
_QUANTITY = re.compile(
    rf"(?P<hedge>(?:{_HEDGES})\.?\s+)*"
    r"(?P<sign>[-+]\s*|(?:negative|minus)\s+)?"
    r"(?P<currency>(?:US|USD|AUD|CAD|EUR|GBP|Rs\.?|INR)?\s*(?:[$€£¥₹]|(?<=[A-Za-z.])\s)\s*)?"
    r"(?P<sign2>-\s*)?"
    r"(?:"
    r"(?:(?P<whole>\d+)(?:\s*|\s+and\s+|\s*-\s*|\s*\+\s*))?" + _FRACTION
    + r"|(?P<mixed>\d+)(?:\s+(?:and\s+)?|-)(?P<mnum>\d+)\s*/\s*(?P<mden>\d+)(?![\d.])"
    r"|\(?(?P<snum>" + _DECIMAL + r")\s*\)?\s*/\s*\(?(?P<sden>-?" + _DECIMAL + r")\)?"
    r"|(?:(?P<mantissa>" + _DECIMAL + r")\s*(?:\\times|\\cdot|\*|x|X)\s*)?"
    r"10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[-+]?\s*\d+)\s*\}?"
    r"|(?P<decimal>" + _DECIMAL + r")(?:[eE](?P<exponent>[-+]?\d+))?"
    r")"
    r"\s*(?P<scale>(?:hundred|thousand|million|billion|trillion)s?\b|(?<=\d)[kKMB](?![A-Za-z]))?"
    r"\s*(?P<percent>%|percent\b|pct\b|percentage points?\b|per cent\b)?"
    r"(?P<unit>.*)",
    re.DOTALL,
)  # fmt: skip
_UNIT_WORD = r"(?:[A-Za-zµΩ]+[.']?)"
_UNIT = re.compile(
    r"(?:\s*[-/]?\s*(?:\(\s*)?"
    + _UNIT_WORD
    + r"(?:\s*\^\s*\{?\s*-?[1-4]\s*\}?)?(?:\s*\))?){1,8}\s*[.!]?\s*\$?\s*"
)
_NOT_UNITS = re.compile(
    r"\b(?:or|and|pi|sqrt|sin|cos|tan|sec|csc|cot|log|ln|exp|infinity|infty|plus|minus|times|divided|mod|choose|"
    r"over|equals?|is|are|not|if|when|where|remainder|base|squared root|root|to)\b",
    re.IGNORECASE,
)
_UNIT_NAMES = {
    "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard",
    "mi": "mi mile", "g": "g gram", "kg": "kg kilogram", "mg": "mg milligram", "lb": "lb pound",
    "oz": "oz ounce", "ton": "ton", "L": "l liter litre", "mL": "ml milliliter", "s": "s sec second",
    "min": "min minute", "h": "h hr hour",
    "day": "day", "week": "week", "month": "month", "year": "yr year", "$": "dollar usd buck", "cent": "cent",
    "€": "euro", "degree": "degree deg", "radian": "radian rad", "mph": "mph", "km/h": "kmh",
}  # fmt: skip
_KNOWN_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_ONE_LETTER_UNITS = frozenset("mgshLlNJWVAKCF")


def quantity(cleaned: str) -> Quantity | None:
    """The number that a cleaned answer is, with its unit; None when it is anything else.

    `5x` and `2\\pi` are not numbers with units; `5 cm`, `$18`, `1,234.50`, `2\\frac{1}{3}`, `3 \\times 10^8`,
    `7/3`, `25%`, `negative 4` and `2 million` are numbers.
    """
    if len(cleaned) > _MAX_DIGITS:
        return None
    text = cleaned.strip()
    wrapped = re.fullmatch(r"[({]\s*([-+]?[\d.,]+)\s*[)}]", text)
    found = _QUANTITY.fullmatch(wrapped.group(1) if wrapped else text)
    if found is None:
        return _number_word(text)
    value = _value(found)
    unit = _unit(found)
    if value is None or unit is None:
        return None
    if (found["sign"] or "").strip() in ("-", "negative", "minus") or (found["sign2"] or "").strip() == "-":
        value = -value
    scale_word = (
        (found["scale"] or "").rstrip("s") if found["scale"] not in _LETTER_SCALES else found["scale"]
    )
    scale = _SCALES.get(scale_word) or _LETTER_SCALES.get(scale_word) or 1
    if found["scale"] in _LETTER_SCALES and not (found["currency"] or "").strip():
        return None
    decimal = found["decimal"] or found["snum"] or ""
    decimals = len(decimal.partition(".")[2]) if found["decimal"] and "." in decimal else None
    return Quantity(value, bool(found["percent"]), scale, unit, decimals, (found["currency"] or "").strip())


def _value(found: re.Match[str]) -> Fraction | None:
    def number(name: str) -> Fraction:
        return Fraction(re.sub(r"[, ]", "", found[name]))

    try:
        if found["num"] or found["num1"]:
            top = number("num") if found["num"] else number("num1")
            bottom = number("den") if found["den"] else number("den1")
            return (number("whole") if found["whole"] else Fraction(0)) + top / bottom
        if found["mixed"]:
            return number("mixed") + number("mnum") / number("mden")
        if found["snum"]:
            return number("snum") / number("sden")
        power = found["power"] or found["exponent"]
        exponent = int(power.replace(" ", "")) if power else 0
        if abs(exponent) > _MAX_EXPONENT:
            return None
        mantissa = (
            number("mantissa")
            if found["mantissa"]
            else number("decimal")
            if found["decimal"]
            else Fraction(1)
        )
        return mantissa * Fraction(10) ** exponent
    except (ValueError, ZeroDivisionError):
        return None


def _unit(found: re.Match[str]) -> str | None:
    """The unit's words; None when what follows the number is no unit."""
    rest = found["unit"]
    if not rest.strip(" .$"):
        return ""
    if "\\" in rest or not _UNIT.fullmatch(rest) or _NOT_UNITS.search(rest):
        return None
    words = re.findall(r"[A-Za-zµΩ]+", rest)
    if words[0] in ("st", "nd", "rd", "th"):
        words, rest = words[1:], rest[2:]
        if not words:
            return ""
    apart = rest[0] in " -/(" or found.string[found.start("unit") - 1] == " "
    if len(words) == 1 and len(words[0]) == 1 and not (apart and words[0] in _ONE_LETTER_UNITS):
        return None
    if not apart and words[0].lower().rstrip("s") not in _KNOWN_UNITS and len(words[0]) < 4:
        return None
    if any(len(word) == 1 and word not in _ONE_LETTER_UNITS and word not in ("a", "A") for word in words):
        return None
    return " ".join(re.findall(r"[A-Za-zµΩ]+|\^|/|-?\d", rest)).lower()


def known_unit(unit: str) -> str | None:
    """The canonical name of a unit of measure, with its power; None for other words ("eggs", "per day")."""
    tokens = unit.split()
    power = ""
    if tokens and tokens[0] in ("square", "sq"):
        tokens, power = tokens[1:], "2"
    elif tokens and tokens[0] in ("cubic", "cu"):
        tokens, power = tokens[1:], "3"
    elif len(tokens) == 3 and tokens[1] == "^":
        tokens, power = tokens[:1], tokens[2]
    elif len(tokens) == 2 and tokens[1] in ("squared", "cubed"):
        tokens, power = tokens[:1], "2" if tokens[1] == "squared" else "3"
    if len(tokens) != 1:
        return None
    name = _KNOWN_UNITS.get(tokens[0]) or _KNOWN_UNITS.get(tokens[0].removesuffix("s"))
    return f"{name}{power}" if name else None


# --- Number words -------------------------------------------------------------------------------------------

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: index for index, word in enumerate(_ONES.split())} | {
    word: 10 * index for index, word in enumerate(_TENS.split(), start=2)
}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth"
_DENOMINATORS = {part: index for index, part in enumerate(_PARTS.split(), start=2)} | {
    "quarter": 4,
    "halve": 2,
}


def _number_word(text: str) -> Quantity | None:
    """A number from zero to ninety-nine, or a fraction such as "two thirds", in words, with its unit."""
    found = re.match(r"(?:([a-z]+ty)[- ])?([a-z]+)\b(?:[- ]([a-z]+)\b)?", text.lower())
    if not found or len(text) > 60:
        return None
    hundreds = re.match(r"([a-z]+) hundred(?: and)?(?: (?=[a-z])|$)", text.lower())
    if hundreds and _WORDS.get(hundreds.group(1)) in range(1, 10):
        rest = quantity(text[hundreds.end() :]) if hundreds.end() < len(text) else None
        count = 100 * _WORDS[hundreds.group(1)]
        if rest and rest.value < 100 and rest.value.denominator == 1:
            return quantity(f"{count + rest.value} {rest.unit}")
        return quantity(f"{count} {text[hundreds.end() :]}")
    tens, ones, part = found.groups()
    if ones not in _WORDS or (tens and (tens not in _WORDS or _WORDS[ones] not in range(1, 10))):
        return None
    number = _WORDS.get(tens or "", 0) + _WORDS[ones]
    denominator = _DENOMINATORS.get((part or "").removesuffix("s"))
    if denominator:
        return quantity(f"{number}/{denominator}{text[found.end() :]}")
    return quantity(f"{number}{text[found.end(2) :]}")
