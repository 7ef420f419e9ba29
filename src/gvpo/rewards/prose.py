"""Model-written prose taken apart: sentences, formulas, quantities, and the value it closes with.

All patterns are linear in the text's length: no nested or adjacent unbounded repetition.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A piece of a text: from `start` up to `end`, and what it says without its delimiters."""

    start: int
    end: int
    text: str


# --- Sentences ----------------------------------------------------------------------------------------------

# The delimiters that close with a sentence, "so $x = 5.$", belong to it.
_SENTENCE_END = re.compile(r"\n|[.!?](?:\*\*|[)\"”’*]|\$\$?|\\[\])]){0,3}(?=\s|$)|。")
_ABBREVIATION = re.compile(r"\b(?:a|p|approx|vs|sq|Mr|Mrs|Ms|Dr|U\.S|i\.e|e\.g)$")


def sentence_at(text: str, start: int) -> tuple[str, int]:
    """The sentence, or line, that begins at `start`, and where the next one begins."""
    end = _SENTENCE_END.search(text, start)
    while (
        end
        and end.group()[0] == "."
        and _ABBREVIATION.search(text[max(start, end.start() - 6) : end.start()])
    ):
        end = _SENTENCE_END.search(text, end.end())
    if end is None:
        return text[start:], len(text)
    return text[start : end.start()] + end.group()[1:], end.end()


# --- Formulas -----------------------------------------------------------------------------------------------

_FORMULA = re.compile(
    r"\$\$(?P<dd>[^$]{1,800})\$\$|\\\[(?P<br>.{1,800}?)\\\]|\\\((?P<pa>.{1,800}?)\\\)"
    r"|(?<!\\)\$(?P<d>[^$\n]{1,400})(?<!\\)\$",
    re.DOTALL,
)
_JOINT = re.compile(r"\s*(?:,?\s*and|,?\s*or|,|;)\s*")


def formulas(text: str) -> list[Span]:
    """Formulas in order, those joined by commas, "and" or "or" as one. Amounts of money are not formulas."""
    spans: list[Span] = []
    position = 0
    while match := _FORMULA.search(text, position):
        content = next(group for group in match.groups() if group is not None).strip()
        if match.group("d") is not None and _is_money(content):
            position = match.start() + 1
            continue
        position = match.end()
        previous = spans[-1] if spans else None
        if previous and _JOINT.fullmatch(text, previous.end, match.start()):
            spans[-1] = Span(previous.start, match.end(), f"{previous.text}, {content}")
        else:
            spans.append(Span(match.start(), match.end(), content))
    return spans


def _is_money(content: str) -> bool:
    """Whether `$…$` is really two amounts with prose between them: "$5 each, so $"."""
    if not re.match(r"\s?\d", content):
        return False
    prose = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\[a-zA-Z]+", " ", content)
    return bool(re.search(r"[A-Za-z]{2,}", prose) or re.search(r"[-+*/×=,(]\s*$", content))


# --- Quantities ---------------------------------------------------------------------------------------------

QUANTITY = re.compile(
    r"(?<![\w.,^_])[-−+]?(?:(?:[$£€¥₹]|\\\$)[ \t]?)?[-−]?"
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]|[ \t]?/[ \t]?\d+(?![\d/])|[ \t]+\d+/\d+)?"
    r"(?::\d\d(?:[ \t]?[ap]\.?m\b)?)?"
    r"(?:[ \t]?(?:%|\\%|percent\b|thousand\b|million\b|billion\b|°))?"
)
_QUALIFIES = re.compile(
    r"\b(?:for|of|in|over|after|from|among|within|during|at|to)\s+(?:the|all|his|her|their|its|those|these)?\s*$",
    re.IGNORECASE,
)
_BETWEEN_QUANTITIES = re.compile(r"[ \t]*,?[ \t]*(?:and|or|,|or maybe|or possibly)[ \t]*")
VALUE_START = re.compile(r"[\s*_$(\[{=~≈'\"£€¥₹-]*(?:\d|\.\d|\\[a-zA-Z({\[$]|−)")


def is_bare(value: str) -> bool:
    """Whether this is a value alone, with at most a few words of unit."""
    value = value.strip().strip("*").strip()
    if not value:
        return False
    if VALUE_START.match(value) and "=" not in value:
        words = re.sub(r"\\text\{[^{}]*\}|\\[a-zA-Z]+", " ", value)
        return len(re.findall(r"[A-Za-z]{2,}", words)) <= 4
    return len(value.split()) <= 2 and not value.endswith(",")


def prose_value(sentence: str) -> str | None:
    """The right side of the last equation of a sentence, or its last quantity with those joined to it."""
    if "=" in sentence:
        right = sentence.rpartition("=")[2].strip()
        if re.search(r"\d|\\[a-z]|[a-z]", right):
            quantity = QUANTITY.match(right)
            # "= 72 clips in May" is 72; "= 2x + 1" or "= 3\sqrt{2}" is taken as it stands.
            if quantity and _followed_by_words(right[quantity.end() :]):
                return quantity.group().strip()
            return right
    if VALUE_START.match(sentence) and is_bare(sentence):
        return sentence.strip()
    quantities = _main_quantities(sentence)
    before = sentence[: quantities[-1].start()] if quantities else ""
    # "20 + 15" has no result yet, and "not 15" says what the value is not.
    if not quantities or re.search(r"(?:\bnot|\d[^.=]{0,30}[-+*/×])\s*$", before):
        return None
    first = len(quantities) - 1
    while first and _BETWEEN_QUANTITIES.fullmatch(
        sentence, quantities[first - 1].end(), quantities[first].start()
    ):
        first -= 1
    return ", ".join(quantity.group().strip() for quantity in quantities[first:])


def _main_quantities(sentence: str) -> list[re.Match[str]]:
    """The quantities of a sentence, less those that only qualify another: "$64 for the 16 glasses"."""
    quantities = list(QUANTITY.finditer(sentence))
    return _unqualified(sentence, quantities) or quantities


def _unqualified(sentence: str, quantities: list[re.Match[str]]) -> list[re.Match[str]]:
    return [found for found in quantities if not _QUALIFIES.search(sentence[: found.start()][-24:])]


def _followed_by_words(rest: str) -> bool:
    return bool(re.match(r"[,;]?[ \t]*(?:[ \t(][A-Za-z]{2,}|$)", rest)) and not re.search(
        r"[-+*/^]\s*\d", rest
    )


# --- The closing sentences ----------------------------------------------------------------------------------

UNIT_TAIL = re.compile(
    r"\s{0,2}(?:%|\\%|°)?[ \t]?[A-Za-z²³/%-]*(?:[ \t](?:per|an?|of|[A-Za-z]{1,12})){0,3}\s*"
)
_LAST_SENTENCES = 3
_VARIABLE = re.compile(r"\\?[A-Za-z]+")
_DRAWING = re.compile(r"\[asy\].{0,2000}?\[/asy\]", re.DOTALL)
_CALCULATOR = re.compile(r"<<[^<>]{0,200}>>")  # GSM8K's annotations
_ENVIRONMENT = re.compile(
    r"(?:\\\[|\$\$)?\s{0,9}\\begin\{(align|aligned|equation|gather|eqnarray|split)(\*?)\}(?P<rows>.{1,1600}?)"
    r"\\end\{\1\2\}\s{0,9}(?:\\\]|\$\$)?",
    re.DOTALL,
)
_CLOSING_TAIL = 2_000
_FINISHED = re.compile(r"(?:[.!?。…)\]}$*%\"'”’]|\\\]|\\\))\s*$")
_BOLD = re.compile(r"\*\*([^*\n]{1,120})\*\*")
_OPEN_END = re.compile(
    r"(?:[-+*/×÷=<>(,:\\]|\b(?:is|are|the|a|an|of|and|or|to|by|for|with|then|so|than|in|from|as|at))\s*$",
    re.IGNORECASE,
)
_RESULT = re.compile(
    r"=[ \t]*(?:\\?\$|[£€])?[ \t]*-?\d[\d,.)}%]*(?:[ \t/][\w'&/]{1,20}|st|nd|rd|th){0,12}\s*$"
    r"|(?:\b(?:so|thus|therefore|hence|total|altogether)\b|:).*\d[\d,.)}%]*(?:[ \t][A-Za-z]+){0,3}\s*$",
    re.IGNORECASE,
)
_GIVES_UP = re.compile(
    r"\b(?:can ?not|can't|unable to|could not|couldn't) (?:be )?(?:solve|determine|answer|find|compute)", re.I
)
CHOICE = re.compile(r"(?:\*\*)?\(?[A-H](?:\)(?:[ \t][^\n]{1,40})?|[.:][ \t][^\n]{1,40})?(?:\*\*)?")
_PLAN = re.compile(
    r"\b(?:(?:need|have|want|going) to (?:find|solve|calculate|compute|determine)|such that|let'?s|let us"
    r"|we know)\b",
    re.IGNORECASE,
)


def closing_value(text: str) -> str | None:
    """The value that the last sentences arrive at; None when they arrive at none or break off."""
    text = text.strip()
    sentences = _closing_sentences(text)
    if not sentences or _breaks_off(text, sentences[0]) or _GIVES_UP.search(sentences[0]):
        return None
    if CHOICE.fullmatch(text):
        return text
    values = (value_in(sentence) for sentence in sentences)
    return next((value for value in values if value is not None), None)


def _closing_sentences(text: str) -> list[str]:
    """The last sentences, last first. A displayed formula belongs to the sentence before it."""
    tail = _DRAWING.sub(" ", text[-_CLOSING_TAIL:])
    tail = _CALCULATOR.sub("", tail)
    tail = _ENVIRONMENT.sub(_last_row, tail)
    tail = re.sub(r"\s{0,9}\n\s{0,9}(?=\$\$|\\\[)", " ", tail)
    tail = re.sub(r"(?<=\$\$|\\\[)\s{0,9}\n\s{0,9}|\s{0,9}\n\s{0,9}(?=\$\$|\\\])", "", tail)
    sentences = []
    start = 0
    while start < len(tail):
        sentence, start = sentence_at(tail, start)
        if re.search(r"\w", sentence):
            sentences.append(sentence.strip())
    return sentences[::-1][:_LAST_SENTENCES]


def _last_row(environment: re.Match[str]) -> str:
    rows = [row for row in environment.group("rows").split(r"\\") if re.search(r"\w", row)]
    return f" $${rows[-1].replace('&', '').strip().rstrip('.')}$$. " if rows else " "


def _breaks_off(text: str, last_sentence: str) -> bool:
    """Whether the text stops in the middle of its last sentence."""
    if _OPEN_END.search(last_sentence) and not _FINISHED.search(text):
        return True
    if _FINISHED.search(text):
        return False
    if _PLAN.search(last_sentence):
        return True
    if len(text) < 80 and "\n" not in text:
        return False
    # Without a full stop a result still counts as an end: "So he is 180-135 = 45 miles away from home".
    return not _RESULT.search(last_sentence)


def value_in(sentence: str) -> str | None:
    """What a sentence says: its last bold value, its last formula, or its last quantity."""
    bold = [found for found in _BOLD.findall(sentence) if re.search(r"\d|\\|\$", found)]
    if bold and not bold[-1].rstrip().endswith(":"):
        return value_in(bold[-1]) or bold[-1]
    spans = formulas(sentence)
    if any(not _VARIABLE.fullmatch(span.text) for span in spans):
        # "there are $500 + 1 = 501$ values of $k$"
        while _VARIABLE.fullmatch(spans[-1].text):
            spans.pop()
    if spans:
        after = sentence[spans[-1].end :]
        if not _unqualified(after, list(QUANTITY.finditer(after))):
            unit = UNIT_TAIL.match(after)
            whole = unit is not None and unit.end() >= len(after.rstrip())
            return spans[-1].text + (after.rstrip() if whole else "")
    return prose_value(sentence)
