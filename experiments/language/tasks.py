"""Tasks with verified rewards, two with one right answer and two with very many.

*times* and *sentence* are conversations; *product* and *word* are lines to go on with, which cost a third.
"""

from __future__ import annotations

import copy
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
        line: the one turn is text to go on with, no conversation, and the answer ends with its line.
        thorough: whether methods are run with all their strengths, not with the first alone, and evaluated
            half-way too.
        demonstrations: right answers to a question that no model gave; with them a task has runs off policy.
    """

    name: str
    keys: tuple[str, ...]
    held_out: int
    turns: Callable[[str], list[str]]
    right: Callable[[str, str], bool]
    tokens: int
    line: bool = False
    thorough: bool = True
    demonstrations: Callable[[PreTrainedTokenizerBase, str], list[str]] | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """The keys of the questions that are trained on."""
        return self.keys[self.held_out :]

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """One whose end of sequence is the end of an answer."""
        if not self.line:
            return tokenizer
        own = copy.deepcopy(tokenizer)
        own.eos_token = own.convert_ids_to_tokens(own.encode("\n", add_special_tokens=False)[0])
        return own

    def prompt(self, tokenizer: PreTrainedTokenizerBase, key: str) -> str:
        """As the model reads it: chat template applied, without a system message's text."""
        if self.line:
            return self.turns(key)[0]
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


def _stated_product(text: str, key: str) -> bool:
    """The answer is the product and nothing else."""
    a, b = key.split(" x ")
    return text.strip() == str(int(a) * int(b))


def _word(text: str, key: str) -> bool:
    """One word that begins with the letters."""
    return re.fullmatch(r"[a-z]+", text.strip().lower()) is not None and text.strip().lower().startswith(key)


def common_words(tokenizer: PreTrainedTokenizerBase, key: str) -> list[str]:
    """Eight words, or their beginnings: of five letters and more, those that the tokenizer learnt first."""
    found = {
        i: tokenizer.decode([i]) for token, i in tokenizer.get_vocab().items() if token[1:].startswith(key)
    }
    words = [found[i] for i in sorted(found) if re.fullmatch(r" [a-z]{5,}", found[i])]
    return [f"{word}\n" for word in words[:8]]


_BEGINNINGS = (
    "ba be bl bo br bu ca ch cl co cr da de di do dr fa fe fi fl fo fr ga ge gl go gr ha he ho hu in la le "
    "li lo ma me mi mo mu na ne no pa pe pi pl po pr pu ra re ri ro sa sc se sh si sk sl sm sn so sp st su "
    "sw ta te th ti to tr tu un va ve vi wa we wh wi wo"
)
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
        Task(
            "product",
            _shuffled([f"{a} x {b}" for a in range(2, 13) for b in range(2, 20)]),
            12,
            lambda key: [f"3 x 5 = 15\n{key} ="],
            _stated_product,
            tokens=6,
            line=True,
            thorough=False,
        ),
        Task(
            "word",
            _shuffled(_BEGINNINGS.split()),
            12,
            lambda key: [f"st: stone\nmu: music\n{key}:"],
            _word,
            tokens=5,
            line=True,
            demonstrations=common_words,
        ),
    )
}
