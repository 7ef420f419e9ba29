"""Logs of a deployed model, as prompts that bring their logged answers.

A line is a conversation and what was answered, as OpenAI's clients and servers write them, with a rating:

    {"messages": [{"role": "user", …}, {"role": "assistant", …}], "rating": 1}
    {"messages": […], "response": "text", a message or {"choices": [{"message": …, "rating": …}, …]}, …}
    {"request": {"messages": …}, "response": {"choices": …}, "rating": …}             (or a "body" in each)

A rating stands in the line, in a choice, or in a message of the assistant; so do `token_ids` of the answer.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gvpo.data.sources import Row, numbered_rows
from gvpo.errors import InputError

RATINGS = ("rating", "score", "reward", "feedback")
RESPONSES = ("response", "completion", "output")
TOKENS = ("completion_ids", "token_ids")
WORDS = {"up": 1.0, "thumbs_up": 1.0, "like": 1.0, "good": 1.0, "positive": 1.0}
WORDS |= {"down": 0.0, "thumbs_down": 0.0, "dislike": 0.0, "bad": 0.0, "negative": 0.0}


class _LeaveOut(Exception):
    """An answer that is nothing to learn from, and why."""


@dataclass
class Logs:
    """Reads logs.

    Attributes:
        rating: field of the rating, `a.b` for one inside another; None: the first of `RATINGS` that is there.
        words: ratings that are words, lower case.
        scale: the ratings that become the rewards 0 and 1; None: a rating is the reward.
        answer: field of the ground truth, for reward functions that want one.
        rewards: of logged answers. "ratings": their ratings, and unrated ones are left out; "functions":
            those of the reward functions; "both": the rating where there is one.
        lines: read so far.
        dropped: answers left out, by reason.
    """

    rating: str | None = None
    words: Mapping[str, float] = field(default_factory=dict)
    scale: tuple[float, float] | None = None
    answer: str | None = None
    rewards: Literal["ratings", "functions", "both"] = "ratings"
    lines: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def prompts(self, files: Sequence[Path]) -> list[Row]:
        """A row for each different prompt: `prompt`, `logged` answers and, if there is one, its `answer`.

        Raises:
            InputError: a line that cannot be read, with the file and the number of the line.
        """
        found: dict[str, Row] = {}
        for file in files:
            for line, row in numbered_rows(file):
                self.lines += 1
                try:
                    for prompt, answer in self._answers(row):
                        known = found.setdefault(
                            json.dumps(prompt), {"prompt": prompt, **self._truth(row), "logged": []}
                        )
                        if known.get("answer") != self._truth(row).get("answer"):
                            raise InputError(f"an earlier line has another {self.answer} to the same prompt")
                        known["logged"].append(answer)
                except InputError as error:
                    raise InputError(f"{file}, line {line}: {error}.") from error
        return list(found.values())

    def _truth(self, row: Row) -> Row:
        if self.answer is None:
            return {}
        if (value := _inside(row, self.answer)) is None:
            raise InputError(f"there is no field {self.answer!r} with the ground truth")
        return {"answer": value if isinstance(value, str) else json.dumps(value)}

    def _answers(self, row: Row) -> Iterator[tuple[list[Row], Row]]:
        """The conversations before the answers of a line, and the answers."""
        request, response = _body(row.get("request")), next((row[n] for n in RESPONSES if n in row), None)
        messages = row.get("messages", row.get("prompt", request.get("messages")))
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"there are no messages (fields: {', '.join(row) or 'none'})")
        if response is None:
            turns = [i for i, said in enumerate(messages) if _role(said) == "assistant"]
            rated = [i for i in turns if self._rating(messages[i]) is not None]
            for i in rated or [len(messages) - 1]:
                own = messages[i] if rated else row | messages[i]
                yield from self._answer(messages[:i], messages[i], own)
            return
        response = _body(response)
        choices = response.get("choices") or [response]
        if not all(isinstance(choice, Mapping) for choice in choices):
            raise InputError("a choice is not an object")
        alone = all(self._rating(choice) is None for choice in choices)
        if alone and len(choices) > 1 and self._rating(row) is not None:
            raise InputError(f"the rating is of one of {len(choices)} choices: put it into that choice")
        for choice in choices:
            facts = row | dict(choice) if alone else choice
            yield from self._answer(messages, choice.get("message", choice), facts)

    def _answer(self, before: list[Any], message: Any, facts: Row) -> Iterator[tuple[list[Row], Row]]:
        """One answer; `facts` has its rating, its finish_reason and its tokens, as far as there are any."""
        try:
            if _role(message, "assistant") != "assistant":
                raise _LeaveOut("the conversation does not end with the assistant's message")
            prompt = [{"role": _role(said), "content": _text(said)} for said in before]
            if not (text := _text(message)).strip():
                raise _LeaveOut("no text")
            rating = None if self.rewards == "functions" else self._rating(facts)
            if rating is None and self.rewards == "ratings":
                raise _LeaveOut("no rating")
        except _LeaveOut as reason:
            self.dropped[str(reason)] += 1
            return
        if not prompt:
            raise InputError("there is no message before the answer")
        answer = {
            "content": text,
            "reward": rating,
            "complete": facts.get("finish_reason", "stop") in ("stop", None),
            "completion_ids": _tokens(facts | message),
        }
        yield prompt, answer

    def _rating(self, row: Mapping[str, Any]) -> float | None:
        """The reward that a rating stands for; None if there is none."""
        names = RATINGS if self.rating is None else (self.rating,)
        value: Any = next((found for name in names if (found := _inside(row, name)) is not None), None)
        if value is None:
            return None
        if isinstance(value, str):
            value = (WORDS | dict(self.words)).get(value.strip().lower(), value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"the rating is {value!r}, not a finite number: words need --word WORD=NUMBER")
        if self.scale is None:
            return number
        low, high = self.scale
        if not min(low, high) <= number <= max(low, high):
            raise InputError(f"the rating {number:g} is outside the scale from {low:g} to {high:g}")
        return (number - low) / (high - low)


def _body(value: Any) -> dict[str, Any]:
    """A request or response without what was around it; an answer that is a text, as a message."""
    if isinstance(value, list) and len(value) == 1 and "role" in value[0]:
        value = value[0]
    if isinstance(value, Mapping):
        return dict(value.get("body") or value)
    return {} if value is None else {"role": "assistant", "content": value}


def _inside(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field, `a.b` being b inside a; None if it is not there."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _role(message: Any, default: str | None = None) -> str:
    role = message.get("role", default) if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise InputError("a message is no object with role and content")
    return "system" if role == "developer" else role


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content", message.get("text"))
    if message.get("tool_calls") or message.get("role") in ("tool", "function"):
        raise _LeaveOut("tools (--offline reads episodes)")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        if any("text" not in part for part in content):
            raise _LeaveOut("images or sounds")
        content = "".join(str(part["text"]) for part in content)
    if content is None:
        raise _LeaveOut("no text")
    if not isinstance(content, str):
        raise InputError(f"the content of a message is {content!r}, not text")
    return content


def _tokens(row: Mapping[str, Any]) -> list[int] | None:
    ids = next((row[name] for name in TOKENS if row.get(name) is not None), None)
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise InputError(f"the token ids of the answer are {str(ids)[:60]}, not a list of numbers")
    return ids
