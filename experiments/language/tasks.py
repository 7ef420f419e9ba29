"""Two tasks with verified rewards: one with one right answer, one with very many."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """Questions whose answers a rule checks; rewards are 0 or 1.

    Attributes:
        name: in results and on the command line.
        keys: what questions differ in; those held out come first.
        held_out: how many are never trained on.
        turns: of the conversation that asks a question: user, assistant, …, user.
        right: whether an answer is right for a key.
        tokens: where completions are cut off.
    """

    name: str
    keys: tuple[str, ...]
    held_out: int
    turns: Callable[[str], list[str]]
    right: Callable[[str, str], bool]
    tokens: int

    def prompt(self, tokenizer: PreTrainedTokenizerBase, key: str) -> str:
        """As the model reads it, chat template applied, without a system message's text."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.turns(key))]
        system = [{"role": "system", "content": ""}]
        return str(
            tokenizer.apply_chat_template(system + messages, tokenize=False, add_generation_prompt=True)
        )

    def reward(self, prompts: list[str], completions: list[str], key: list[str], **_: Any) -> list[float]:
        """As TRL calls it."""
        return [float(self.right(text, k)) for text, k in zip(completions, key, strict=True)]


def canonical(text: str) -> str:
    """Answers that differ in case, spaces or the dot at the end are one."""
    return " ".join(text.lower().strip().rstrip(".").split())


def _product(text: str, key: str) -> bool:
    """The last number of the answer is the product."""
    a, b = key.split(" x ")
    return re.findall(r"\d+", text)[-1:] == [str(int(a) * int(b))]


def _six_words(text: str, key: str) -> bool:
    """One sentence of exactly six words, one of them the given one."""
    words = re.findall(r"[a-z']+", text.lower())
    return (
        len(words) == 6 and key in words and re.fullmatch(r"[A-Z][A-Za-z',\- ]*\.", text.strip()) is not None
    )


def _ask_for_six_words(word: str) -> str:
    return f"Write a sentence of exactly six words with the word {word}."


_NOUNS = (
    "river dog moon garden train book winter bread window horse music island child storm coffee bridge "
    "tree fire road school mountain ocean bird city kitchen clock letter market summer teacher door "
    "apple boat cloud doctor farmer flower forest friend glass hat house ice king lamp mirror mouse "
    "night paper piano queen rain ring salt shoe snow star stone table tower village wind wolf "
    "cat lake bus chair egg field gold hill jacket key lion milk nest oil plane road rose sheep "
    "ship song spoon street sugar sister tea ticket uncle valley wall water wood yard baker bell"
)


def _shuffled(keys: list[str]) -> tuple[str, ...]:
    keys = list(dict.fromkeys(keys))
    random.Random(0).shuffle(keys)
    return tuple(keys)


TASKS = {
    task.name: task
    for task in (
        Task(
            "times",
            _shuffled([f"{a} x {b}" for a in range(2, 13) for b in range(2, 13)]),
            12,
            lambda key: [f"What is {key}? Answer with the number only."],
            _product,
            tokens=16,
        ),
        Task(
            "sentence",
            _shuffled(_NOUNS.split()),
            12,
            lambda key: [_ask_for_six_words("sun"), "The sun came up too late.", _ask_for_six_words(key)],
            _six_words,
            tokens=16,
        ),
    )
}
