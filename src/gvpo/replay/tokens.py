"""Prompts and given answers as the tokens that the policy would have read and written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo.errors import InputError

Messages = Sequence[Mapping[str, Any]]


def fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary: two tokenizers with the same one give the same token ids a meaning."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]


def content(answer: str | Messages) -> str:
    """The text of an answer, or of its last message."""
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


@dataclass
class Encoder:
    """Encodes prompts and answers as generation would have made them.

    Args:
        tokenizer: of the policy, with a chat template if prompts or answers are messages.
        end_ids: tokens at which generation ends; the tokenizer's end-of-sequence token by default.
        vocabulary_size: token ids must be below it.
        chat_template: instead of the tokenizer's own.
        chat_template_kwargs: for the tokenizer's `apply_chat_template`.
    """

    tokenizer: Any
    end_ids: Collection[int] = ()
    vocabulary_size: int | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.end_ids = set(self.end_ids) or {self.tokenizer.eos_token_id}

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Tokens of a prompt, up to where the policy goes on."""
        text = prompt if isinstance(prompt, str) else self._render(prompt, True)
        ids = self.tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        return check_ids(ids, self.vocabulary_size)

    def answer(self, prompt: str | Messages, answer: str | Messages, *, complete: bool = True) -> list[int]:
        """Tokens of an answer to `prompt`, its end-of-turn included (unless it is not `complete`).

        Raises:
            InputError: messages that the chat template cannot render, or a token outside the vocabulary.
        """
        text = self._after(prompt, answer)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        check_ids(ids, self.vocabulary_size)
        # Some templates write a line break after the end of a turn, which generation never gets to.
        ends = [i for i, token in enumerate(ids) if token in self.end_ids]
        if ends:
            ids = ids[: ends[0] + 1]
        if complete and not ends:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids if complete or not ends else ids[:-1]

    def episode(
        self, prompt: Messages, turns: Messages, *, complete: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Tokens of an assistant's turns and of what it read between them, and which of them are its own.

        What it read after its last turn it did not answer, and is left out.

        Raises:
            InputError: as `answer`; turns that do not begin with the assistant's; or a chat template that
                does not show earlier turns as they were written.
        """
        if turns[0]["role"] != "assistant":
            raise InputError(f"the completion begins with a message of {turns[0]['role']}, not of assistant")
        said, ids, own = list(prompt), list[int](), list[bool]()
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        for i, following in zip(places, [*places[1:], None], strict=True):
            before = self._render(said, True)
            mine = self.answer(said, turns[i : i + 1], complete=complete or following is not None)
            ids, own = ids + mine, own + [True] * len(mine)
            if following is None:
                break
            said += turns[i:following]
            after = self._render(said, True)
            both = self.tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
            if not after.startswith(before) or both[: len(mine)] != mine:
                raise InputError(
                    "the chat template changes earlier turns when later ones follow: give completion_ids and "
                    "counted in place of messages"
                )
            ids, own = ids + both[len(mine) :], own + [False] * (len(both) - len(mine))
        return check_ids(ids, self.vocabulary_size), own

    def _after(self, prompt: str | Messages, answer: str | Messages) -> str:
        """What follows the prompt's text."""
        if isinstance(prompt, str):
            return content(answer)
        turn = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
        before = self._render(prompt, True)
        whole = self._render([*prompt, *turn], False)
        if whole.startswith(before):
            return whole[len(before) :]
        # A template that opens the turn otherwise for generation (with an empty thought, say).
        return content(turn)

    def _render(self, messages: Messages, generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                add_generation_prompt=generation,
                tokenize=False,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # whatever a template, which is a program, may raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"the chat template cannot render it ({reason})") from error


def check_ids(ids: list[int], vocabulary_size: int | None) -> list[int]:
    """The ids, all of them in the vocabulary.

    Raises:
        InputError: one that is not.
    """
    for token in ids if vocabulary_size is not None else ():
        if not 0 <= token < (vocabulary_size or 0):
            raise InputError(f"the token id {token} is outside the model's vocabulary of {vocabulary_size}")
    return ids
