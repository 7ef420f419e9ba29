"""The final answer of a model-written completion, as text.

Where several answers are stated the last one counts, as a reader would take it. Statements are looked for in
this order of trust: explicit ones (`\\boxed{}`, `#### 5`, `<answer>5</answer>`, "the answer is 5",
"**Answer:** 5", `A: 5`), and only without any of those the value that the closing sentence arrives at. A
completion that breaks off before it arrives anywhere has no answer.

All patterns are linear in the text's length: no nested or adjacent unbounded repetition.
"""

import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["boxed", "hash", "tag", "phrase", "closing"]

# The end of a completion is what holds its answer; a model may write megabytes before it.
_TAIL = 16_000
_MAX_ANSWER = 1_000
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end_of_text|end|im_start)\|>|</s>|<eos>|<end_of_turn>"
)
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
# A base model goes on with a problem of its own once it has answered ours.
_NEXT_PROBLEM = re.compile(
    r"^[ \t]*(?:[#*]{1,4}[ \t]*)?(?:Q|Question|Problem|Exercise|Human|User|Instruction|Student)"
    r"(?:[ \t]*\d{1,4})?(?:\*\*)?[ \t]*[:.：]",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """A final answer: its text as written and the form in which it was stated."""

    text: str
    form: Form

    @property
    def explicit(self) -> bool:
        """Whether the completion says that this is the answer."""
        return self.form != "closing"


@dataclass(frozen=True)
class _Statement:
    start: int
    end: int
    text: str
    form: Form


def extract_answer(completion: str) -> Answer | None:
    """The final answer of a completion; None when it states none.

    Args:
        completion: the model's text without the prompt. Only its last 16,000 characters are looked at.
    """
    text = completion[-_TAIL:]
    end = _END_OF_TURN.search(text)
    if end:
        text = text[: end.start()]
    unfinished_thought = False
    if _THINK_CLOSE in text:
        text = text[text.rfind(_THINK_CLOSE) + len(_THINK_CLOSE) :]
    elif _THINK_OPEN in text:
        unfinished_thought = True
    text = _without_next_problem(text.replace("\r\n", "\n"))
    statement = _last(_explicit(text))
    if statement is not None:
        correction = _corrected(text[statement.end :])
        if correction is not None:
            return Answer(correction[:_MAX_ANSWER], "closing")
        return Answer(statement.text[:_MAX_ANSWER], statement.form)
    if unfinished_thought:
        return None
    closing = closing_value(text)
    return None if closing is None else Answer(closing[:_MAX_ANSWER], "closing")


def _without_next_problem(text: str) -> str:
    for found in _NEXT_PROBLEM.finditer(text):
        before = text[: found.start()]
        if before.strip() and _explicit(before):
            return before
    return text


def _explicit(text: str) -> list[_Statement]:
    boxes = _boxed(text)
    others = [*_hashed(text), *_tagged(text), *_phrased(text)]
    # "The answer is \boxed{5}" is one statement, and the box has the exact extent.
    return boxes + [other for other in others if "\\boxed" not in other.text and "\\fbox" not in other.text]


def _last(statements: list[_Statement]) -> _Statement | None:
    return max(statements, key=lambda s: (s.start, s.end), default=None)


# --- \boxed{} -----------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*")
_BOX_JOINT = re.compile(
    r"[\s$\\,;.()\[\]*]{0,20}(?:and|or|,|;|\\text\{ ?(?:and|or) ?\})?[\s$\\,;()\[\]*]{0,20}(?:[a-zA-Z]\s?=\s?)?"
)


def boxed_contents(text: str) -> list[str]:
    """The content of each `\\boxed{}`, in order, braces balanced; unfinished ones are left out."""
    return [box.text for box in _boxes(text)]


def _boxes(text: str) -> list[_Statement]:
    boxes: list[_Statement] = []
    end = 0
    for found in _BOX.finditer(text):
        if found.start() < end:  # a box in a box: the outer one counts, its wrapping is taken off later
            continue
        content = _braced(text, found.end())
        if content is not None:
            end = content[1]
            boxes.append(_Statement(found.start(), end, content[0], "boxed"))
    return boxes


def _braced(text: str, start: int) -> tuple[str, int] | None:
    """The argument that starts at `start`, and where it ends; None when it breaks off."""
    if start >= len(text):
        return None
    if text[start] != "{":
        bare = re.compile(r"[^\s${}\\]{1,40}").match(text, start)
        return (bare.group().rstrip(".,;:"), bare.end()) if bare else None
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        if character in "{}" and text[position - 1] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start + 1 : position], position + 1
    # A brace was forgotten. What follows the formula shows that the text did not simply break off.
    stop = re.compile(r"\$|\\\]|\\\)|\n").search(text, start)
    if stop and stop.start() > start + 1:
        return text[start + 1 : stop.start()], stop.end()
    return None


def _boxed(text: str) -> list[_Statement]:
    """The boxes, those that stand beside each other joined: "\\boxed{3} and \\boxed{4}" is "3, 4"."""
    joined: list[_Statement] = []
    for box in _boxes(text):
        if not box.text.strip():
            continue
        previous = joined[-1] if joined else None
        if previous and _BOX_JOINT.fullmatch(text, previous.end, box.start):
            parts = previous.text.split("\n")
            both = previous.text if box.text in parts else previous.text + "\n" + box.text
            joined[-1] = _Statement(previous.start, box.end, both, "boxed")
        else:
            joined.append(_Statement(box.start, box.end, box.text.replace("\n", " "), "boxed"))
    return [_Statement(box.start, box.end, box.text.replace("\n", ", "), "boxed") for box in joined]


# --- #### and <answer> --------------------------------------------------------------------------------------

_HASH = re.compile(r"#{4}(?!#)[ \t]*(?:\n[ \t]*)?([^\n]*)")
_HEADING = re.compile(
    r"(?:\d{1,3}[.):]\s+[A-Za-z]|step\b|part\b|case\b|solution\b|explanation\b|[A-Z][^.!?\d$]*:?$)", re.I
)
_VALUE_START = re.compile(r"[\s*$(\[{=~≈'\"£€¥₹-]*(?:\d|\.\d|\\[a-zA-Z({\[$]|−)")
_TAG = re.compile(r"<answer>\s*", re.IGNORECASE)


def _hashed(text: str) -> list[_Statement]:
    """`#### 18` as GSM8K ends; not a Markdown heading of level four."""
    found = []
    matches = list(_HASH.finditer(text))
    for match in matches:
        line = match.group(1).split("####")[0].strip()
        if not line:
            continue
        last_line = not text[match.end() :].strip()
        phrase = _last(_phrased(line))
        if phrase is not None:
            line = phrase.text
        elif _VALUE_START.match(line):
            if re.match(r"\d{1,3}[.):]\s+[A-Za-z]", line):
                continue
            line = _tidy_value(line)
        elif not last_line or (_HEADING.match(line) and len(line.split()) > 3):
            continue
        found.append(_Statement(match.start(), match.end(), line, "hash"))
    return found


def _tagged(text: str) -> list[_Statement]:
    found = []
    for match in _TAG.finditer(text):
        end = text.lower().find("</answer>", match.end())
        content = text[match.end() : end if end >= 0 else match.end()].strip()
        if not content:
            continue
        inner = _last([*_boxed(content), *_hashed(content), *_phrased(content)])
        value = inner.text if inner else content if len(content) < 80 else closing_value(content) or content
        found.append(_Statement(match.start(), end + len("</answer>"), value, "tag"))
    return found


# --- "the answer is 5" --------------------------------------------------------------------------------------

_PHRASE = re.compile(
    r"(?<![A-Za-z])(?:"
    # "The final answer (in cm) is", "the answer to the question is"
    r"(?:answers?|ans|result(?=[ \t]*(?:\*\*)?[ \t]*:)|solution(?=[ \t]+is\b))(?:\*\*|__)?"
    r"(?:[ \t]*\([^()\n]{0,60}\))?"
    r"(?P<between>[ \t,][^\n.:=?!|]{0,70}?)?"
    r"(?:\*\*|__)?[ \t]*(?:\*\*|__)?"
    r"(?P<link>[:：]|=|\b(?:is|are|was|were|equals|becomes|(?:will|would|should|must)[ \t]+be|comes[ \t]+(?:out[ \t]+)?to)\b"
    r"(?:[ \t]+(?:therefore|thus|then|simply|just|indeed|also|equal[ \t]+to|given[ \t]+by|as[ \t]+follows|exactly))?[ \t]*[:：]?)"
    # "A: 5" at the start of a line
    r"|(?P<short>(?<![^\n])[ \t]*A[ \t]*[:：])"
    r"|(?P<chinese>(?:最终)?答案(?:为|是|应为|：|:)+)"
    # "### Final Answer" as a heading with the value below it
    r"|(?P<heading>(?<![^\n])[#*\t ]{0,8}(?:final[ \t]+)?answer[ \t]*(?:\*\*|__|#)*[ \t]*(?=\n))"
    r")(?:\*\*|__)?",
    re.IGNORECASE,
)
_NOT_A_VALUE = re.compile(
    r"(?:not|correct|wrong|incorrect|right|consistent|reasonable|verified|valid|based|found|obtained|given|"
    r"the same|in the|as follows|that\s*$|unclear|unknown|let'?s|let us|let me|we|to |first|check)\b",
    re.IGNORECASE,
)


def _phrased(text: str) -> list[_Statement]:
    found = []
    position = 0
    while match := _PHRASE.search(text, position):
        position = match.end()
        rest_start = match.end()
        while (
            rest_start < len(text) and text[rest_start] in " \t\n:：*_" and not _bold_starts(text, rest_start)
        ):
            rest_start += 1
        if rest_start >= len(text):
            break
        value, end = _value_at(text, rest_start)
        introduces = match.group("link") in (":", "：") or match.group("short") or match.group("heading")
        if introduces and not _is_bare(value) and re.search(r"\d", text[end:]):
            # "Answer: First, ..." opens a whole solution, whose own end decides.
            continue
        stated = value.strip()
        if not stated or _NOT_A_VALUE.match(stated):
            continue
        if not _is_bare(stated):
            inner = closing_value(stated)
            if inner is None and len(stated.split()) > 4:
                continue
            stated = inner if inner is not None and re.search(r"\d", stated) else stated
        found.append(_Statement(match.start(), end, stated, "phrase"))
    return found


def _bold_starts(text: str, position: int) -> bool:
    """Whether `**` at `position` opens a bold value rather than closes a bold label."""
    return bool(re.compile(r"\*\*[^*\s]").match(text, position))


def _value_at(text: str, start: int) -> tuple[str, int]:
    """What stands at `start` up to the end of its formula, bold span or sentence, and where that ends."""
    spans = _math_spans(text[start : start + _MAX_ANSWER])
    if spans and spans[0].start == 0:
        run = spans[0]
        value, end = run.text, start + run.end
        # Units or further values may follow the formula in the same sentence.
        tail, tail_end = _sentence(text, end)
        if _UNIT_TAIL.fullmatch(tail):
            return f"{value}{tail}", tail_end
        if _CONTINUES.match(tail):
            return text[start:tail_end], tail_end
        return value, end
    bold = re.compile(r"\*\*([^*\n]{1,200})\*\*").match(text, start)
    if bold:
        return bold.group(1).strip().rstrip(".,;:"), bold.end()
    return _sentence(text, start)


_UNIT_TAIL = re.compile(
    r"\s{0,2}(?:%|\\%|°)?[ \t]?[A-Za-z²³/%-]*(?:[ \t](?:per|an?|of|[A-Za-z]{1,12})){0,3}\s*"
)
_CONTINUES = re.compile(r"\s*(?:,?\s*(?:and|or)\b|,\s*[$\\\d(]|[-+*/=×^<>≤≥])")
_SENTENCE_END = re.compile(r"\n|[.!?。](?=[\s*)\"”’]|$)|(?<=[\d})$])[。]")


def _sentence(text: str, start: int) -> tuple[str, int]:
    end = _SENTENCE_END.search(text, start)
    while (
        end
        and end.group() == "."
        and re.search(
            r"\b(?:a|p|approx|vs|sq|Mr|Mrs|Ms|Dr|U\.S|i\.e|e\.g)$",
            text[max(start, end.start() - 6) : end.start()],
        )
    ):
        end = _SENTENCE_END.search(text, end.end())
    stop = end.start() if end else len(text)
    return text[start:stop], end.end() if end else stop


def _is_bare(value: str) -> bool:
    """Whether this is a value alone, with at most a few words of unit."""
    value = value.strip().strip("*").strip()
    if not value:
        return False
    if _VALUE_START.match(value) and not re.search(r"[=]", value):
        words = re.findall(
            r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\text\{[^{}]*\}|\\[a-zA-Z]+", " ", value)
        )
        return len(words) <= 4
    return len(value.split()) <= 2 and not value.endswith(",")


# --- The closing sentence -----------------------------------------------------------------------------------

_TURN_AROUND = re.compile(
    r"(?:^|[.!?\n])[\s*]*(?:wait|oops|actually|correction|hold on|hmm|no,|sorry)\b", re.IGNORECASE
)
_LAST_SENTENCES = 3
_FINISHED = re.compile(r"(?:[.!?。…)\]}$*%\"'”’:]|\\\]|\\\))\s*$")
_BOLD = re.compile(r"\*\*([^*\n]{1,120})\*\*")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_QUANTITY = re.compile(
    r"(?<![\w.,^_])[-−+]?[ \t]?(?:[$£€¥₹]|\\\$)?[ \t]?[-−]?"
    + _NUMBER
    + r"(?:[ \t]?/[ \t]?\d+(?![\d/])|[ \t]+\d+/\d+)?(?::\d\d\b)?"
    r"(?:[ \t]?(?:%|\\%|percent\b|thousand\b|million\b|billion\b|°))?"
)
_OPEN_END = re.compile(
    r"(?:[-+*/×÷=<>(,:$\\]|\b(?:is|are|the|a|an|of|and|or|to|by|for|with|then|so|than|in|from|as|at))\s*$",
    re.I,
)


def closing_value(text: str) -> str | None:
    """The value that the last sentences arrive at; None when they arrive at none or break off."""
    text = text.strip()
    sentences = _closing_sentences(text)
    for position, sentence in enumerate(sentences):
        if position == 0 and _breaks_off(text, sentence):
            continue
        if position > 0 and _breaks_off(text, sentences[0]):
            return None
        value = _value_in(sentence)
        if value is not None:
            return value
    return None


def _corrected(rest: str) -> str | None:
    turn = _TURN_AROUND.search(rest)
    return closing_value(rest[turn.end() :]) if turn else None


def _closing_sentences(text: str) -> list[str]:
    """The last sentences, last first. A displayed formula belongs to the sentence before it."""
    tail = text[-2_000:]
    tail = re.sub(r"\s*\n\s*(?=\$\$|\\\[)", " ", tail)
    tail = re.sub(r"(?<=\$\$|\\\[)\s*\n\s*|\s*\n\s*(?=\$\$|\\\])", " ", tail)
    sentences = []
    start = 0
    while start < len(tail):
        sentence, start = _sentence(tail, start)
        if re.search(r"\w", sentence):
            sentences.append(sentence.strip())
    return sentences[::-1][:_LAST_SENTENCES]


def _breaks_off(text: str, sentence: str) -> bool:
    """Whether the text stops in the middle of its last sentence."""
    if _OPEN_END.search(sentence) and not text.endswith((".", "$$", "\\]", "$", "!", "?")):
        return True
    if _FINISHED.search(text) or (len(text) < 80 and "\n" not in text):
        return False
    # Without a full stop, a closing value with at most three words of unit still counts as an end.
    return not re.search(r"\d[\d,.)}%]*(?:[ \t][A-Za-z]+){0,3}\s*$", sentence)


def _value_in(sentence: str) -> str | None:
    bold = [b for b in _BOLD.findall(sentence) if re.search(r"\d|\\|\$", b)]
    if bold and not bold[-1].rstrip().endswith(":"):
        return _value_in(bold[-1]) or bold[-1]
    spans = _math_spans(sentence)
    if spans:
        after = sentence[spans[-1].end :]
        if not _QUANTITY.search(after):
            unit = _UNIT_TAIL.match(after)
            return spans[-1].text + (
                unit.group().rstrip() if unit and unit.end() >= len(after.rstrip()) else ""
            )
    return _tidy_value(sentence)


def _tidy_value(sentence: str) -> str | None:
    """The last quantity of plain prose, with the quantities joined to it by "and" or "or"."""
    if "=" in sentence:
        right = sentence.rpartition("=")[2].strip()
        if re.search(r"\d|\\[a-z]|[a-z]", right):
            quantities = list(_QUANTITY.finditer(right))
            # "= 72 clips in May" is 72; "= 2x + 1" or "= 3\sqrt{2}" is taken as it stands.
            if quantities and quantities[0].start() == 0 and _followed_by_words(right[quantities[0].end() :]):
                return quantities[0].group().strip()
            return right
    if _VALUE_START.match(sentence) and _is_bare(sentence):
        return sentence.strip()
    quantities = list(_QUANTITY.finditer(sentence))
    if not quantities:
        return None
    first = len(quantities) - 1
    while first and re.fullmatch(
        r"[ \t]*,?[ \t]*(?:and|or|,|or maybe|or possibly)[ \t]*",
        sentence[quantities[first - 1].end() : quantities[first].start()],
    ):
        first -= 1
    return ", ".join(q.group().strip() for q in quantities[first:])


def _followed_by_words(rest: str) -> bool:
    return bool(re.match(r"[ \t]*(?:[ \t(][A-Za-z]{2,}|$)", rest)) and not re.search(r"[-+*/^]\s*\d", rest)


# --- Formulas -----------------------------------------------------------------------------------------------

_MATH = re.compile(
    r"\$\$(?P<dd>[^$]{1,800})\$\$|\\\[(?P<br>.{1,800}?)\\\]|\\\((?P<pa>.{1,800}?)\\\)|(?<!\\)\$(?P<d>[^$\n]{1,400})(?<!\\)\$",
    re.DOTALL,
)
_JOINT = re.compile(r"\s*(?:,?\s*and|,?\s*or|,|;)\s*")


def _math_spans(text: str) -> list[_Statement]:
    """Formulas in order, those joined by commas, "and" or "or" as one; amounts of money are not formulas."""
    spans: list[_Statement] = []
    position = 0
    while match := _MATH.search(text, position):
        content = next(group for group in match.groups() if group is not None)
        if match.group("d") is not None and _is_money(content):
            position = match.start() + 1
            continue
        position = match.end()
        previous = spans[-1] if spans else None
        if previous and _JOINT.fullmatch(text, previous.end, match.start()):
            spans[-1] = _Statement(previous.start, match.end(), f"{previous.text}, {content}", "closing")
        else:
            spans.append(_Statement(match.start(), match.end(), content.strip(), "closing"))
    return spans


def _is_money(content: str) -> bool:
    """Whether `$…$` is really two amounts with prose between them: "$5 each, so $"."""
    if not re.match(r"\s?\d", content):
        return False
    prose = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\[a-zA-Z]+", " ", content)
    return bool(re.search(r"[A-Za-z]{2,}", prose) or re.search(r"[-+*/×=,(]\s*$", content))
