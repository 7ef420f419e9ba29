"""Explicit statements of an answer in a completion: boxes, `####`, tags and phrases."""

import re
from dataclasses import dataclass
from typing import Literal

from gvpo.rewards.prose import UNIT_TAIL, VALUE_START, closing_value, formulas, is_bare, sentence_at

Form = Literal["boxed", "hash", "tag", "phrase", "closing"]

_MAX_VALUE = 1_000
# A completion that states more answers than this is noise; the last ones decide anyway.
_MAX_STATEMENTS = 24


@dataclass(frozen=True)
class Statement:
    """A stated answer: where it stands, its text, and the form it has."""

    start: int
    end: int
    text: str
    form: Form


def explicit_statements(text: str) -> list[Statement]:
    """Every explicit statement, in no order."""
    boxes = _boxed(text)
    others = [*_hashed(text), *_tagged(text), *_phrased(text)]
    # "The answer is \boxed{5}" is one statement, and the box has the exact extent.
    return boxes + [other for other in others if "\\boxed" not in other.text and "\\fbox" not in other.text]


def last_statement(statements: list[Statement]) -> Statement | None:
    """The one that stands last."""
    return max(statements, key=lambda statement: (statement.start, statement.end), default=None)


# --- \boxed{} -----------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*")
_BARE_ARGUMENT = re.compile(r"[^\s${}\\]{1,40}")
_FORMULA_END = re.compile(r"\$|\\\]|\\\)|\n")
_GAP = r"[\s$\\,;.()\[\]*]{0,20}"
_BOX_JOINT = re.compile(
    rf"{_GAP}(?:and|or|,|;|\\text\{{ ?(?:and|or) ?\}})?{_GAP}(?:[a-h]\)\s?)?(?:[$]?[a-zA-Z]\s?=\s?)?[\s$]?"
)


def boxed_contents(text: str) -> list[str]:
    """The content of each `\\boxed{}`, in order, braces balanced; unfinished ones are left out."""
    return [box.text for box in _boxes(text)]


def _boxes(text: str) -> list[Statement]:
    boxes: list[Statement] = []
    end = 0
    for found in list(_BOX.finditer(text))[-_MAX_STATEMENTS:]:
        if found.start() < end:  # a box in a box: the outer one counts, its wrapping is taken off later
            continue
        content = _argument(text, found.end())
        if content is not None:
            end = content[1]
            boxes.append(Statement(found.start(), end, content[0], "boxed"))
    return boxes


def _argument(text: str, start: int) -> tuple[str, int] | None:
    """The argument that starts at `start`, and where it ends; None when it breaks off."""
    if start >= len(text):
        return None
    if text[start] != "{":
        bare = _BARE_ARGUMENT.match(text, start)
        return (bare.group().rstrip(".,;:"), bare.end()) if bare else None
    depth = 0
    for position in range(start, min(len(text), start + 2 * _MAX_VALUE)):
        character = text[position]
        if character in "{}" and text[position - 1] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start + 1 : position], position + 1
    # A brace was forgotten. That the formula ends all the same shows that the text did not just break off.
    stop = _FORMULA_END.search(text, start)
    if stop and stop.start() > start + 1:
        return text[start + 1 : stop.start()], stop.end()
    return None


def _boxed(text: str) -> list[Statement]:
    """The boxes, those that stand beside each other joined: "\\boxed{3} and \\boxed{4}" is "3, 4"."""
    joined: list[list[Statement]] = []
    for box in _boxes(text):
        if not box.text.strip():
            continue
        if joined and _BOX_JOINT.fullmatch(text, joined[-1][-1].end, box.start):
            joined[-1].append(box)
        else:
            joined.append([box])
    return [
        Statement(run[0].start, run[-1].end, ", ".join(dict.fromkeys(box.text for box in run)), "boxed")
        for run in joined
    ]


# --- #### and <answer> --------------------------------------------------------------------------------------

_HASH = re.compile(r"#{4}(?!#)[ \t]*(?:\n[ \t]*)?((?:(?!####)[^\n])*)")
_LAST_HASH = re.compile(r"(?<![^\n])#{1,3}[ \t]+([-$\\\d.,]{1,30})\s*$")
_NUMBERED_HEADING = re.compile(r"\d{1,3}[.):]\s+[A-Za-z]")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</answer>", re.IGNORECASE)


def _hashed(text: str) -> list[Statement]:
    """`#### 18` as GSM8K ends; not a Markdown heading of level four."""
    found = []
    for match in list(_HASH.finditer(text))[-_MAX_STATEMENTS:]:
        line = match.group(1).strip()
        phrase = last_statement(_phrased(line))
        if phrase is not None:
            line = phrase.text
        elif VALUE_START.match(line):
            if _NUMBERED_HEADING.match(line):
                continue
            line = _plain_value(line) or line
        elif not line or len(line.split()) > 3 or text[match.end() :].strip():
            continue
        found.append(Statement(match.start(), match.end(), line, "hash"))
    last = _LAST_HASH.search(text)
    if last:
        found.append(Statement(last.start(), last.end(), last.group(1), "hash"))
    return found


def _tagged(text: str) -> list[Statement]:
    found = []
    for match in list(_TAG.finditer(text))[-_MAX_STATEMENTS:]:
        end = _TAG_END.search(text, match.end())
        content = text[match.end() : end.start()].strip() if end else ""
        if not end or not content:
            continue
        inner = last_statement([*_boxed(content), *_hashed(content), *_phrased(content)])
        short = len(content) < 80
        value = inner.text if inner else content if short else closing_value(content) or content
        found.append(Statement(match.start(), end.end(), value, "tag"))
    return found


# --- "the answer is 5" --------------------------------------------------------------------------------------

_PHRASE = re.compile(
    r"(?<![A-Za-z])(?:"
    # "The final answer (in cm) is", "the answer to the question is", "Result:"
    r"(?:answers?|ans|result(?=[ \t]*(?:\*\*)?[ \t]*:)|solutions?(?=[ \t]+(?:is|are)\b)"
    r"|(?:option|choice)(?=[ \t]+is\b))(?:\*\*|__)?\}?"
    r"(?:[ \t]*\([^()\n]{0,60}\))?"
    r"(?:[ \t,][^\n.:=?!|]{0,70}?)?"
    r"(?:\*\*|__)?[ \t]*(?:\*\*|__)?"
    r"(?P<link>[:：]|=|->|→|\b(?:is|are|was|were|equals|becomes|(?:will|would|should|must)[ \t]+be"
    r"|comes[ \t]+(?:out[ \t]+)?to)\b"
    r"(?:[ \t]+(?:therefore|thus|then|simply|just|indeed|also|equal[ \t]+to|given[ \t]+by|as[ \t]+follows"
    r"|exactly))?[ \t]*[:：]?)"
    # "A: 5" at the start of a line
    r"|(?P<short>(?<![^\n])[ \t]*A[ \t]*[:：])"
    # "**18**" above its explanation
    r"|\A\s*(?=\*\*[^*\n]{1,40}\*\*\s*\n\s*\**(?:explanation|reasoning|solution|step|justification)\b)"
    r"|(?:最终)?答案(?:为|是|应为|：|:)+"
    # "### Final Answer" as a heading with the value below it
    r"|(?P<heading>(?<![^\n])[#*\t ]{0,8}(?:final[ \t]+)?answer[ \t]*(?:\*\*|__|#)*[ \t]*(?=\n))"
    r")(?:\*\*|__)?",
    re.IGNORECASE,
)
_NOT_A_VALUE = re.compile(
    r"(?:not|correct|wrong|incorrect|right|consistent|reasonable|verified|valid|based|found|obtained|given|"
    r"the same|as follows|that\s*$|unclear|unknown|let'?s|let us|let me|we|to|first|check|in|confirmed)\b",
    re.IGNORECASE,
)
_CHECKING = re.compile(
    r"\b(?:check|verify|confirm)(?:ing)?\s+(?:our|the|my|this|your)\s+(?:final\s+)?$", re.IGNORECASE
)
_REASON = re.compile(
    r"\s*,?\s+(?:since|because|as (?:there|we|it|the|he|she|they)|given that|where|which|so that|when)\b",
    re.IGNORECASE,
)
_BOUND = re.compile(r"(?:at least|at most|(?:more|less|greater|fewer) than|between)\b", re.IGNORECASE)
_CONTRAST = re.compile(r",?\s+(?:and )?not\s")
_BOLD_VALUE = re.compile(r"\*\*([^*\s][^*\n]{0,200})\*\*")
_CONTINUES = re.compile(r"\s*(?:,?\s*(?:and|or)\b|,\s*[$\\\d(]|[-+*/=×^<>≤≥])")


def _phrased(text: str) -> list[Statement]:
    found = []
    for match in list(_PHRASE.finditer(text))[-_MAX_STATEMENTS:]:
        start = match.end()
        if _CHECKING.search(text, max(0, match.start() - 40), match.start()):
            continue
        while start < len(text) and text[start] in " \t\n:：*_" and not _BOLD_VALUE.match(text, start):
            start += 1
        if start >= len(text):
            break
        value, end, exact = _value_at(text, start)
        opens = match.group("link") in (":", "：") or match.group("short") or match.group("heading")
        if opens and not exact and not is_bare(value) and re.search(r"\d", text[end:]):
            # "Answer: First, ..." opens a whole solution, whose own end decides.
            continue
        stated = value if exact else _plain_value(value)
        if stated is not None:
            found.append(Statement(match.start(), end, stated, "phrase"))
    return found


def _value_at(text: str, start: int) -> tuple[str, int, bool]:
    """What stands at `start` up to the end of its formula, bold span or sentence; where that ends; whether
    the text itself marks off the value."""
    spans = formulas(text[start : start + _MAX_VALUE])
    if spans and spans[0].start == 0:
        value, end = spans[0].text, start + spans[0].end
        # Units or further values may follow the formula in the same sentence.
        tail, tail_end = sentence_at(text[: end + _MAX_VALUE], end)
        if UNIT_TAIL.fullmatch(tail):
            return value + tail, tail_end, True
        if _CONTINUES.match(tail):
            return text[start:tail_end], tail_end, False
        return value, end, True
    bold = _BOLD_VALUE.match(text, start)
    if bold:
        return bold.group(1).strip().rstrip(".,;:"), bold.end(), is_bare(bold.group(1))
    sentence, end = sentence_at(text[: start + _MAX_VALUE], start)
    return sentence, end, False


def _plain_value(value: str) -> str | None:
    """The value in a sentence's end such as "5, since there are 8"; None when it holds none."""
    for cut in (_REASON, _CONTRAST):
        found = cut.search(value)
        value = value[: found.start()] if found else value
    stated = value.strip()
    if not stated or _NOT_A_VALUE.match(stated):
        return None
    if is_bare(stated) or _BOUND.match(stated):
        return stated
    inner = closing_value(stated)
    if inner is None:
        return stated if len(stated.split()) <= 5 else None
    return inner if re.search(r"\d", stated) else stated
