"""Logged completions with rewards, for training without generation.

A file (.parquet or .jsonl) or a data set has either one row a group or one row a completion:

    prompt: text or messages | completions: [answers] | rewards: [numbers]                     a row a group
    prompt                   | completion: answer     | reward: number   (| group: anything)   a row each

Rows of one completion each make a group where `group` is the same, or the prompt if there is no such
column. An answer of several messages is an episode: the assistant's make up S, what tools said is context.
Optional columns, a list per group or one value per completion: `complete` (False where the completion was
cut off and has no end-of-turn), `reference_logp(s)` (S' in nats) with `reference` (the name of the policy
that they are from). Instead of texts there may be token ids: `prompt_ids` (of all, or a list for each
completion), `completion_ids`, with `counted` (which of them make up S) and `valid` (False: takes no part), as
`gvpo replay export` writes them. `gvpo data logs` writes rows of a prompt and its `logged` answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo.data.sources import read_file
from gvpo.errors import InputError
from gvpo.replay.buffer import check_identity
from gvpo.replay.group import Group, Response
from gvpo.replay.tokens import Encoder, check_ids, fingerprint
from gvpo.replay.view import ReplayView

Row = Mapping[str, Any]

# Columns of a row a group → of a row a completion.
_PER_COMPLETION = {
    "completions": "completion",
    "completion_ids": "completion_ids",
    "rewards": "reward",
    "complete": "complete",
    "counted": "counted",
    "valid": "valid",
    "reference_logps": "reference_logp",
}


@dataclass
class Logged:
    """Groups read from logs.

    Attributes:
        groups: with two or more responses each.
        alone: prompts left out because they have a single response, which nothing can be compared with.
    """

    groups: list[Group] = field(default_factory=list)
    alone: int = 0

    @property
    def group_size(self) -> int:
        """k of the largest group."""
        return max(map(len, self.groups))

    @property
    def scored(self) -> bool:
        """Whether every group came with reference log-probs."""
        return all(group.reference is not None for group in self.groups)


def load_offline(
    source: str | Path | Iterable[Row], encoder: Encoder, *, longest: int | None = None
) -> Logged:
    """Groups of logged completions; nothing is generated and no reward function is called.

    Args:
        source: a .parquet or .jsonl file, a data set in the same columns, or the folder of a replay buffer.
        encoder: makes tokens of the texts.
        longest: tokens that a completion may have; None: any number.

    Raises:
        InputError: an unreadable file, missing columns, a completion that is empty or too long, a reward
            that is missing or no number, token ids outside the vocabulary, a group that mixes references, or
            no group of two; with the row, counting from 1.
    """
    if not isinstance(source, str | Path):
        name, rows = "The data", iter(source)
    elif Path(source).is_dir():
        return _from_replay(Path(source), encoder, longest)
    else:
        name, rows = str(source), read_file(source)
    gathered: dict[Any, tuple[list[int], list[Response]]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            prompt, responses, whole = _read(row, encoder, longest)
        except InputError as error:
            raise InputError(f"{name}, row {number}: {error}.") from error
        key = number if whole else row.get("group")
        if key is None:
            key = row["prompt"] if isinstance(row.get("prompt"), str) else repr(prompt)
        known, its = gathered.setdefault(key, (prompt, []))
        if known != prompt:
            raise InputError(
                f"{name}, row {number} has another prompt than the rows before it of the group {_short(key)}."
            )
        its.extend(responses)
    logged = Logged()
    for where, (prompt_ids, responses) in gathered.items():
        if len(responses) < 2:
            logged.alone += 1
            continue
        try:
            logged.groups.append(Group.of_responses(prompt_ids, responses))
        except InputError as error:
            raise InputError(f"{name}, the group {_short(where)}: {error}") from error
    if not logged.groups:
        raise InputError(
            f"{name} has no prompt with two or more completions, and a single one has nothing to be compared "
            "with."
        )
    return logged


def _columns(row: Row) -> tuple[dict[str, Sequence[Any]], bool]:
    """What a row says of its completions, by the columns of a row a group; and whether it is one."""
    logged = row.get("logged")
    if isinstance(logged, list):  # of `gvpo data logs`
        names = _PER_COMPLETION | {"completions": "content"}
        have = {ours: theirs for ours, theirs in names.items() if all(theirs in answer for answer in logged)}
        return {ours: [answer[theirs] for answer in logged] for ours, theirs in have.items()}, True
    whole = "completions" in row or isinstance(_first(row.get("completion_ids")), list)
    given = {ours: row.get(ours if whole else theirs) for ours, theirs in _PER_COMPLETION.items()}
    return {name: value if whole else [value] for name, value in given.items() if value is not None}, whole


def _read(row: Row, encoder: Encoder, longest: int | None) -> tuple[list[int], list[Response], bool]:
    """The prompt of a row, its responses, and whether they are a whole group."""
    prompts = _prompts(row, encoder)
    columns, whole = _columns(row)
    answers = columns.get("completion_ids", columns.get("completions"))
    if answers is None:
        raise InputError("there is no completion: give a column completion, completions or completion_ids")
    if "rewards" not in columns:
        raise InputError("there is no reward: give a column reward, or rewards")
    if len(prompts) > 1:
        columns["prompts"] = prompts
    for name, values in columns.items():
        if len(values) != len(answers):
            raise InputError(f"there are {len(values)} {name} for {len(answers)} completions: give one each")
    responses = []
    for i in range(len(answers)):
        cell = {name: values[i] for name, values in columns.items()}
        if cell.get("valid") is False:  # takes no part
            continue
        try:
            responses.append(_response(cell, row, encoder, longest))
        except InputError as error:
            raise InputError(f"completion {i}: {error}" if len(answers) > 1 else str(error)) from error
    return prompts[0], responses, whole


def _prompts(row: Row, encoder: Encoder) -> list[list[int]]:
    """The one prompt of a row, or those of its responses."""
    ids = row.get("prompt_ids")
    if ids is not None:
        each = ids if isinstance(_first(ids), list) else [ids]
        return [check_ids(list(prompt), encoder.vocabulary_size) for prompt in each]
    if not row.get("prompt"):
        raise InputError("there is no prompt (columns: " + (", ".join(row) or "none") + ")")
    return [encoder.prompt(row["prompt"])]


def _response(cell: Row, row: Row, encoder: Encoder, longest: int | None) -> Response:
    counted, logp = cell.get("counted"), cell.get("reference_logps")
    prompt, complete = row.get("prompt") or "", cell.get("complete", True)
    said: Any = cell.get("completions")
    if cell.get("completion_ids") is not None:
        ids = check_ids(list(cell["completion_ids"]), encoder.vocabulary_size)
    elif isinstance(prompt, list) and isinstance(said, list) and len(said) > 1:
        ids, counted = encoder.episode(prompt, said, complete=complete)
    else:
        ids = encoder.answer(prompt, said, complete=complete)
    if not ids:
        raise InputError("the completion is empty and has no end")
    if longest is not None and len(ids) > longest:
        raise InputError(f"it has {len(ids)} tokens, but max_completion_length is {longest}")
    if counted is not None and len(counted) != len(ids):
        raise InputError(f"counted marks {len(counted)} of its {len(ids)} tokens: mark every token")
    reference = None if logp is None else row.get("reference") or "logged"
    reward = cell["rewards"]
    if not (isinstance(reward, bool | int | float) and math.isfinite(reward)):
        raise InputError(f"the reward is {reward!r}, not a finite number")
    return Response(ids, float(reward), reference, logp, counted, cell.get("prompts"))


def _from_replay(folder: Path, encoder: Encoder, longest: int | None) -> Logged:
    with ReplayView(folder, hold=True) as view:
        for store in view.stores:
            check_identity(store.folder, store.identity, {"tokenizer": fingerprint(encoder.tokenizer)})
        groups = view.read(range(len(view)))
    for number, group in enumerate(groups):
        check_ids(
            [int(ids.max()) for ids in (group.prompt_ids, group.token_ids) if len(ids)],
            encoder.vocabulary_size,
        )
        if longest is not None and group.lengths.max() > longest:
            raise InputError(
                f"{folder}, group {number}: a completion has {group.lengths.max()} tokens, but "
                f"max_completion_length is {longest}."
            )
    if not groups:
        raise InputError(f"The replay buffer in {folder} is empty.")
    return Logged(groups)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) < 60 else text[:56] + " …'"
