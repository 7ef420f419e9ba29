"""Demonstrations: given answers, good or rated, that take slots of on-policy groups.

A prompt's row has one or more answers in a column: text, messages, or an answer that was logged (`gvpo data
logs`), {"content": text, "reward": number or None, "complete": False if cut off, "completion_ids": its tokens
or None}. They are rewarded like any completion, or with a given reward, and scored under the reference of the
group that they join.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gvpo.errors import InputError
from gvpo.replay.tokens import Encoder, check_ids, content


class Demonstration(NamedTuple):
    """The tokens of a given answer, and its own reward if it has one."""

    ids: list[int]
    reward: float | None = None


@dataclass(frozen=True)
class Demonstrations:
    """Which demonstrations go where.

    Args:
        encoder: makes their tokens.
        per_group: how many slots of a group they take, if the prompt has so many; others stay sampled.
        group_size: k.
        slots: which slots, `per_group` of 0 … k − 1; the last ones by default.
        column: of the data set: an answer, or a list of answers; nothing for a prompt without any.
        longest: tokens that a demonstration may have, its end-of-turn included.
        seed: of the choice where a prompt has more than it needs.

    Raises:
        InputError: slots that do not fit.
    """

    encoder: Encoder
    per_group: int
    group_size: int
    slots: Sequence[int] | None = None
    column: str = "demonstrations"
    longest: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_slots(self.per_group, self.group_size, self.slots)

    @property
    def places(self) -> list[int]:
        """The slots that demonstrations take, if there are enough of them."""
        if self.slots is not None:
            return list(self.slots)
        return list(range(self.group_size - self.per_group, self.group_size))

    def of(self, row: Mapping[str, Any], where: str = "A row") -> list[Demonstration]:
        """A row's demonstrations.

        Raises:
            InputError: one that is empty, too long, or cannot be encoded; named by `where`.
        """
        if self.column not in row:
            raise InputError(f"{where} has no column {self.column!r} with demonstrations.")
        found = []
        for number, answer in enumerate(_answers(row[self.column], where)):
            logged = answer if isinstance(answer, Mapping) else {"content": answer}
            if not content(logged["content"]).strip():
                raise InputError(f"{where}, demonstration {number} is empty: leave it out.")
            try:
                shown = self._read(row["prompt"], logged)
            except InputError as error:
                raise InputError(f"{where}, demonstration {number}: {error}.") from error
            if self.longest is not None and len(shown.ids) > self.longest:
                raise InputError(
                    f"{where}, demonstration {number} has {len(shown.ids)} tokens, but max_completion_length "
                    f"is {self.longest}: shorten it, raise the limit, or leave it out."
                )
            found.append(shown)
        return found

    def _read(self, prompt: Any, logged: Mapping[str, Any]) -> Demonstration:
        reward, ids = logged.get("reward"), logged.get("completion_ids")
        if reward is not None and not math.isfinite(reward):
            raise InputError(f"its reward is {reward!r}, not a finite number")
        if ids is not None:
            return Demonstration(check_ids(list(ids), self.encoder.vocabulary_size), reward)
        complete = logged.get("complete") is not False
        return Demonstration(self.encoder.answer(prompt, logged["content"], complete=complete), reward)

    def check(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Encode all demonstrations of a data set once; returns how many rows have any.

        Raises:
            InputError: the first bad one, with its row (from 0); or no row has any.
        """
        having = sum(bool(self.of(row, f"Row {i}")) for i, row in enumerate(rows))
        if not having:
            raise InputError(f"No row has a demonstration in its column {self.column!r}.")
        return having

    def chosen(self, row: Mapping[str, Any], group: int) -> dict[int, Demonstration]:
        """By slot, for the group with this number: the same on every process that holds a part of it."""
        answers = self.of(row)
        if len(answers) > self.per_group:
            answers = random.Random(f"{self.seed} {group}").sample(answers, self.per_group)
        return dict(zip(self.places, answers, strict=False))


def check_slots(per_group: int, group_size: int, slots: Sequence[int] | None) -> None:
    """Raise an InputError if so many demonstrations have no such places in a group."""
    if not 0 <= per_group <= group_size:
        raise InputError(
            f"demonstrations_per_group={per_group} does not fit into groups of {group_size} responses."
        )
    if slots is None:
        return
    if len(set(slots)) != per_group or not all(0 <= slot < group_size for slot in slots):
        raise InputError(
            f"demonstration_slots={list(slots)} must be {per_group} different slots (one each), "
            f"between 0 and {group_size - 1}."
        )


def _answers(value: Any, where: str) -> list[Any]:
    """One answer or several, each text, a list of messages, or logged."""
    if value is None:
        return []
    if isinstance(value, str) or _is_logged(value):
        return [value]
    if isinstance(value, Sequence):
        if value and all(isinstance(item, Mapping) and "role" in item for item in value):
            return [value]  # one answer, as messages
        if all(isinstance(item, str | Sequence) or _is_logged(item) for item in value):
            return list(value)
    raise InputError(f"{where}: a demonstration is text or a list of messages, not {type(value).__name__}.")


def _is_logged(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str) and "role" not in value
