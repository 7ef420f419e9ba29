"""The final answer that a completion states: `\\boxed{}`, `####`, `<answer>`, "the answer is".

The last statement counts, and none that is retracted, denied or breaks off. What is not stated is not guessed
at, since a policy learns whatever a wrong reward pays for. Ground truths are read in any form of these.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gvpo.errors import InputError
from gvpo.rewards.normalization import NUMBER, clean, quantity

Form = Literal["boxed", "hash", "tag", "phrase", "bare", "closing"]

# The end of a completion is what holds its answer; a model may write megabytes before it.
_TAIL = 16_000
_MAX_ANSWER = 1_000


@dataclass(frozen=True)
class Answer:
    """A final answer.

    Attributes:
        text: as the completion has it.
        form: how it was stated; "bare" where the completion is nothing else, "closing" where it was not.
    """

    text: str
    form: Form

    @property
    def explicit(self) -> bool:
        """Whether the completion says that this is the answer."""
        return self.form not in ("bare", "closing")


class _Statement(NamedTuple):
    start: int
    end: int
    text: str  # empty: it says that there is none, or breaks off
    form: Form
    weak: bool = False  # gives way to any that isn't


def extract_answer(completion: str, closing: str | None = None) -> Answer | None:
    """The final answer of a completion; None when it states none.

    Args:
        completion: the model's text without the prompt. Only its last 16,000 characters are looked at.
        closing: "sentence" to take the one value of a last sentence where nothing is stated.

    Raises:
        InputError: `closing` is something else.
    """
    if closing not in (None, "sentence"):
        raise InputError(f"closing={closing!r} is unknown: use 'sentence', or None for stated answers only.")
    text = _conclusion(completion)
    statements = _statements(text)
    if statements:
        next_problem = _NEXT_PROBLEM.search(text, min(statement.end for statement in statements))
        text = text[: next_problem.start()] if next_problem else text
        statements = [statement for statement in statements if statement.start < len(text)]
        strong = [statement for statement in statements if not statement.weak]
        last = max(strong or statements, key=lambda statement: statement[:2])
        stated = last.text.strip() and not _RETRACTED.search(text, last.end - 1)
        return Answer(last.text[:_MAX_ANSWER], last.form) if stated else None
    if len(text) < 80 and "\n" not in text and (quantity(clean(text)) or _ONE_VALUE.fullmatch(text)):
        return Answer(text, "bare")
    value = _closing(text) if closing else None
    return Answer(value, "closing") if value else None


def _statements(text: str) -> list[_Statement]:
    boxes = _boxed(text)
    others = [*_hashed(text), *_tagged(text), *_phrased(text)]
    # What is said in a box is of the box.
    return boxes + [other for other in others if not any(b.start < other.start < b.end for b in boxes)]


# --- What is looked at --------------------------------------------------------------------------------------

_END_OF_TURN = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end_of_text|end|im_start)\|>|</s>|<eos>|<end_of_turn>"
)
# A base model goes on with a problem of its own once it has answered ours.
_NEXT_PROBLEM = re.compile(
    r"^[#*\t ]{0,6}(?:Q|Question|Problem|Exercise|Human|User|Instruction)(?:[ \t]?\d{1,4})?(?:\*\*)?[ \t]*"
    r"(?:[:.]|$)",
    re.MULTILINE | re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"\b(?:wait|oops|actually|hold on|hmm|scratch that|correction|let me re|made an? "
    r"|should(?: have been| be)\b|(?:can't|cannot|can not) be (?:right|correct)"
    r"|(?:this|that|it|which|answer)(?:'s| is| was)(?: \w+)? (?:wrong|incorrect|not right|not correct))",
    re.IGNORECASE,
)
_ONE_VALUE = re.compile(
    r"\**(?:\(?[A-H](?:[).:](?: [^\n]{1,40})?)?"
    r"|\$[^$]+\$|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\])\**\.?"
)


def _conclusion(completion: str) -> str:
    """The end of the model's own turn after its thoughts; empty while it is still thinking."""
    text = re.sub(r"[ \t]{3,}|\n{3,}", lambda gap: gap.group()[:2], completion[-_TAIL:].replace("\r\n", "\n"))
    text = _END_OF_TURN.split(text, maxsplit=1)[0].rpartition("</think>")[2]
    return "" if "<think>" in text else text.strip()


# --- \boxed{}, #### and <answer> ----------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*(?:(?P<brace>\{)|(?P<bare>[^\s${}\\]{1,40}))?")
_BESIDE = re.compile(
    r"[\s$\\,;.()\[\]*]{0,20}(?:and|or)?[\s$\\,;()\[\]]{0,20}(?:[a-h]\)\s?|[a-zA-Z]\s?=\s?)?"
)
_HASH = re.compile(r"####(?!#)[ \t]*(?:\n[ \t]*)?((?:(?!####)[^\n])*)")
_HEADING = re.compile(r"\d{1,3}[.):]\s+[A-Za-z]|[*_$(\[]*(?:[A-Za-z]+[ *]+){3}")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</answer>", re.IGNORECASE)


def _boxes(text: str) -> Iterator[_Statement]:
    end = 0
    for found in list(_BOX.finditer(text))[-24:]:
        if found.start() < end:  # a box in a box: the outer one counts
            continue
        content, end = (found["bare"] or "").rstrip(".,;:"), found.end()
        if found["brace"]:
            content, end = _balanced(text, found.end())
        yield _Statement(found.start(), end, content, "boxed")


def _balanced(text: str, start: int) -> tuple[str, int]:
    """What stands between braces, the first of which is before `start`, and where the last one ends."""
    depth = 1
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, start, start + 2 * _MAX_ANSWER):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()], brace.end()
    return "", start


def _boxed(text: str) -> list[_Statement]:
    """The boxes, those beside each other as one: naming two answers where one is asked for is wrong."""
    joined: list[_Statement] = []
    for box in _boxes(text):
        last = joined[-1] if joined else None
        if last and last.text and box.text and _BESIDE.fullmatch(text, last.end, box.start):
            both = last.text if box.text in last.text.split(", ") else f"{last.text}, {box.text}"
            joined[-1] = last._replace(end=box.end, text=both)
        else:
            joined.append(box)
    return joined


def _hashed(text: str) -> Iterator[_Statement]:
    """`#### 18` as GSM8K ends; not a Markdown heading of level four."""
    for found in list(_HASH.finditer(text))[-24:]:
        line = found[1].strip()
        if line and not _HEADING.match(line) and "\\boxed" not in line and not _PHRASE.search(line):
            weak = not _VALUE.match(line)
            yield _Statement(found.start(), found.end(), _stated(line) or line, "hash", weak)


def _tagged(text: str) -> Iterator[_Statement]:
    for found in list(_TAG.finditer(text))[-24:]:
        end = _TAG_END.search(text, found.end())
        if end:
            content = text[found.end() : end.start()].strip()
            inner = [*_boxed(content), *_hashed(content), *_phrased(content)]
            value = max(inner).text if inner else (_stated(content) or content) if len(content) < 80 else ""
            yield _Statement(found.start(), end.end(), value, "tag")


# --- "the answer is 5" --------------------------------------------------------------------------------------

_PHRASE = re.compile(
    r"(?<![A-Za-z])(?:"
    # "the answer (in cm) is", "the answer to the question would be", "**Answer:**"
    r"(?:answers?|ans|(?:option|choice)(?=[ \t]is))(?:\*\*|__|[\"'}])?(?:[ \t]*\([^()\n]{0,60}\))?"
    r"(?:[ \t,](?:(?!part|first|step)[^\n.:=?!|]){0,70}?)?[ \t*_]*"
    r"(?:[:：=]|\b(?:is|are|was|equals|becomes|(?:will|would|should|must)[ \t]be)\b"
    r"(?:[ \t](?:therefore|thus|then|simply|just|indeed|equal[ \t]to|given[ \t]by))?[ \t]*:?)"
    r"|(?<![^\n])[ \t]*A[ \t]*:"  # "A: 5" at the start of a line
    r"|(?<![^\n])[#*\t ]{0,8}(?:final[ \t])?answer[*_# \t]*(?=\n)"  # a heading with the value below it
    r"|答案(?:为|是|应为|：|:)+"
    r")[\s:*_\"'`]*",
    re.IGNORECASE,
)
# What somebody else says, or what would be if.
_NOT_OURS = re.compile(
    r"\b(?:if|whether|says|said|told|thinks|claims|suppose|check(?:ing)? (?:that )?)\b[^.\n]*$", re.I
)
_FORMULA = re.compile(r"\$\$[^$]{1,800}\$\$|\$[^$\n]{1,400}\$|\\\[.{1,800}?\\\]|\\\(.{1,800}?\\\)", re.DOTALL)
_SENTENCE_END = re.compile(r"\n|[.!?](?:[*)\"”’`$]|\\[\])]){0,3}(?=\s|$)|。")
_VALUE = re.compile(r"[\s*_`$(\[{≈~€£¥-]*(?:\d|\.\d|\\[a-zA-Z({\[]|[−√π]|[A-Za-z]\b(?! ?[a-z']))")
_REASON = re.compile(
    r",?\s+(?:since|because|as (?:there|we|it|the)|where|which|so that|when|given|(?:and )?not)\b.*", re.S
)
_DENIED = re.compile(
    r"(?:\w+ly )?(?:not|never|neither|unknown|unclear|undetermined|impossible)\b", re.IGNORECASE
)
_DOUBTFUL = re.compile(
    r"\b(?:not|never|neither|no|or|than|least|most|between|over|under|either|if|unless|guess|maybe|need|let"
    r"|wrong|incorrect|one of)\b|n't\b|[?=]",
    re.IGNORECASE,
)


def _phrased(text: str) -> Iterator[_Statement]:
    for found in list(_PHRASE.finditer(text))[-24:]:
        if _NOT_OURS.search(text, max(0, found.start() - 80), found.start()):
            continue
        formula = _FORMULA.match(text, found.end())
        end = _SENTENCE_END.search(text, formula.end() if formula else found.end())
        segment = text[found.end() : end.start() if end else len(text)]
        value = _stated(segment)
        asked = end is not None and end.group()[0] == "?"
        if value is not None and not asked and not _BOX.search(segment):
            weak = bool(value) and not _VALUE.match(segment)
            stop = found.end() + len(value if segment.startswith(value) else segment)
            yield _Statement(found.start(), stop, value, "phrase", weak)


def _stated(segment: str) -> str | None:
    """The value in what follows "the answer is": empty where it is denied, None where there is none."""
    segment = _REASON.sub("", segment).strip()
    if segment.count("{") < segment.count("}"):  # of JSON
        segment = re.sub(r"[\"']?\s*\}$", "", segment)
    if _DENIED.match(segment) or re.search(r"\s[-+*/×=]$|\b(?:and|or|times)$", segment):
        return ""
    if _VALUE.match(segment):
        return segment
    return _only_number(segment) or (segment if 0 < len(segment.split()) <= 3 else None)


def _only_number(sentence: str) -> str | None:
    """The number of a sentence that has one, and no doubt about it."""
    numbers = [found.group() for found in NUMBER.finditer(sentence)]
    return numbers[0] if len(numbers) == 1 and not _DOUBTFUL.search(sentence) else None


def _closing(text: str) -> str | None:
    """The right side of the equation that a finished last sentence ends with, or its only number."""
    plain = re.sub(r"<<[^<>]{0,200}>>", "", text)  # without GSM8K's calculator annotations
    sentence = re.split(r"\n|[.!?]\s", plain.rstrip(".!* "))[-1]
    before, equals, value = sentence.rpartition("=")
    if equals and _VALUE.match(value) and not _DOUBTFUL.search(before.replace("=", "")):
        number = NUMBER.match(value.strip())  # "= 72 clips in May" is 72
        if number and not re.search(r"[-+*/×^\\]", value.strip()[number.end() :]):
            return number.group()
        return None if re.search(r"[-+*/×]$", value) else value.strip()
    return _only_number(sentence) if re.search(r"[.!$*%\])]$", text) else None


# --- Ground truths ------------------------------------------------------------------------------------------


def any_answer(value: Any) -> str | None:
    """A ground truth in whichever form it is written; None when it cannot be read.

    Solutions are reduced to the number after GSM8K's last `####`, without thousands separators, or to what is
    in MATH's last `\\boxed{}`; a whole float to an integer, `$72$` to `72`. A list stands for answers each of
    which is right: one is taken as it is, several are kept as a JSON list.
    """
    if isinstance(value, list):
        parts = list(dict.fromkeys(part for part in map(any_answer, value) if part))
        if len(parts) > 1:
            return json.dumps(parts, ensure_ascii=False)
        return parts[0] if parts else None
    if value is None or isinstance(value, bool | dict):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value).strip()
    if "####" in text:
        number = re.search(r"####\s*(-?[\d.,]*\d)$", text)
        return number[1].replace(",", "") if number else None
    if "\\boxed" in text:
        boxes = [box.text.strip() for box in _boxes(text) if box.text]
        return boxes[-1] or None if boxes else None
    single_formula = re.fullmatch(r"\$([^$]+)\$\.?", text)
    text = single_formula.group(1).strip() if single_formula else text
    balanced = re.sub(r"\\[{}]", "", text)
    # A formula cut in the middle cannot be parsed, and is not guessed at.
    return text if text and balanced.count("{") == balanced.count("}") else None
