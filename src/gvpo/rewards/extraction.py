"""The final answer of a model-written completion, as text.

Where several answers are stated the last one counts, as a reader would take it. Explicit statements are
looked for first (`\\boxed{}`, `#### 5`, `<answer>5</answer>`, "the answer is 5", "**Answer:** 5", `A: 5`);
only without any does the value count that the closing sentence arrives at. A completion that breaks off
before it arrives anywhere has no answer.
"""

import re
from dataclasses import dataclass

from gvpo.rewards.prose import closing_value
from gvpo.rewards.statements import Form, Statement, explicit_statements, last_statement

# The end of a completion is what holds its answer; a model may write megabytes before it.
_TAIL = 16_000
_MAX_ANSWER = 1_000
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end_of_text|end|im_start)\|>|</s>|<eos>|<end_of_turn>"
)
_LONG_GAP = re.compile(r"[ \t]{3,}|\n{3,}")
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
# A base model goes on with a problem of its own once it has answered ours.
_NEXT_PROBLEM = re.compile(
    r"^[ \t]*(?:[#*]{1,4}[ \t]*)?(?:Q|Question|Problem|Exercise|Human|User|Instruction|Student)"
    r"(?:[ \t]*\d{1,4})?(?:\*\*)?[ \t]*[:.：]"
    r"|^#{1,4}[ \t]*(?:Problem|Question|Exercise|Example)(?:[ \t]*\d{1,4})?[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_TURN_AROUND = re.compile(
    r"(?:^|[.!?\n]|[-–—])[\s*]{0,20}(?:wait|oops|actually|correction|hold on|hmm|no,|sorry)\b", re.IGNORECASE
)
_RETRACTED = re.compile(r"\b(?:not (?:right|correct)|wrong|incorrect|mistake|error)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """A final answer.

    Attributes:
        text: as the completion has it.
        form: how it was stated; "closing" if it was not, and is the value that the text ends with.
    """

    text: str
    form: Form

    @property
    def explicit(self) -> bool:
        """Whether the completion says that this is the answer."""
        return self.form != "closing"


def extract_answer(completion: str) -> Answer | None:
    """The final answer of a completion; None when it states none.

    Args:
        completion: the model's text without the prompt. Only its last 16,000 characters are looked at.
    """
    text = _LONG_GAP.sub(lambda gap: gap.group()[:2], completion[-_TAIL:].replace("\r\n", "\n"))
    end = _END_OF_TURN.search(text)
    if end:
        text = text[: end.start()]
    _, thought, conclusion = text.rpartition(_THINK_CLOSE)
    if thought:
        text = conclusion
    unfinished_thought = not thought and _THINK_OPEN in text
    text, statements = _without_next_problem(text)
    if unfinished_thought:  # a conclusion in passing is no answer, a deliberate one may be
        statements = [statement for statement in statements if statement.form != "phrase"]
    statement = _final(statements, text)
    if statement is not None:
        return _unless_retracted(statement, text)
    broken_off = "\\boxed" in text  # an unfinished or empty box
    return None if unfinished_thought or broken_off else _closing(text)


def _closing(text: str) -> Answer | None:
    value = closing_value(text)
    return None if value is None else Answer(value[:_MAX_ANSWER], "closing")


def _unless_retracted(statement: Statement, text: str) -> Answer | None:
    """The stated answer, or what replaces it: "The answer is 5. Wait, one was eaten. So there are 4."."""
    answer = Answer(statement.text[:_MAX_ANSWER], statement.form)
    turn = _TURN_AROUND.search(text, statement.end - 1)
    if turn is None:
        return answer
    rest = text[turn.end() :]
    return _closing(rest) or (None if _RETRACTED.search(rest) else answer)


def _final(statements: list[Statement], text: str) -> Statement | None:
    """The last statement; but a mere mention after a box ("our answer is consistent") gives way to it."""
    last = last_statement(statements)
    box = last_statement([statement for statement in statements if statement.form == "boxed"])
    if last is None or box is None or last.form != "phrase":
        return last
    if "final" in text[last.start - 6 : last.end].lower():
        return last
    return last if _TURN_AROUND.search(text, box.end - 1, last.start + 1) else box


def _without_next_problem(text: str) -> tuple[str, list[Statement]]:
    """The text up to a problem that the model sets itself after it has answered, and the statements in it."""
    statements = explicit_statements(text)
    answered = min((statement.end for statement in statements), default=len(text))
    found = _NEXT_PROBLEM.search(text, answered)
    if found is None:
        return text, statements
    text = text[: found.start()]
    return text, explicit_statements(text)
