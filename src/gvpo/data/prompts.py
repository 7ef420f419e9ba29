"""Prompt data sets by name: rows with a prompt, a ground truth and what the reward needs."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from gvpo.data.recipes import RECIPES, Recipe, arithmetic_rows, reasoning_gym_rows
from gvpo.data.sources import Row, looks_like_file, read_file, read_hub
from gvpo.errors import InputError

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
_REASONING_GYM = "reasoning_gym:"
_ARITHMETIC = {"arithmetic": False, "arithmetic:reversed": True}


@dataclass
class Prompts:
    """How the rows of a source become prompts, and what became of them.

    Attributes:
        where: the source, for messages.
        columns, system_prompt, instruction, chat, keep, answers: as for `load_prompts`.
        generated: a task's own scorer decides what is right; `answer` is one right answer, taken as it is.
        dropped: rows that did not become prompts, by reason.
        seen: rows read so far.
    """

    recipe: Recipe
    where: str
    columns: Mapping[str, str]
    system_prompt: str | None
    instruction: str | None
    chat: bool
    keep: Sequence[str]
    answers: bool = True
    generated: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    seen: int = 0

    def convert(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The prompts, one at a time; counts as it goes."""
        first: dict[Any, int] = {}  # where an id was seen
        columns: list[str] | None = None
        for index, row in enumerate(rows):
            where = f"{self.where}, row {index + 1}"
            self.seen += 1
            columns = columns or self._columns(row)
            for column in (*columns, *self.keep):
                if column not in row:
                    raise InputError(f"{where} has no column {column!r}: give every row the same columns.")
            same = row.get("id", row.get("unique_id"))
            if isinstance(same, str | int) and first.setdefault(same, index) != index:
                raise InputError(
                    f"{where} repeats the id {same!r} of row {first[same] + 1}: remove one of them."
                )
            question, *truths = (row[column] for column in columns)
            prompt = self._messages(question, where)
            if not self.generated:
                truths = [self.recipe.ground_truth(truth) for truth in truths]
            if prompt is None or None in truths:
                what = "the question is empty" if prompt is None else "the ground truth cannot be parsed"
                self.dropped[what] += 1
                continue
            kept = (*self.keep, *(("task", "entry") if self.generated else ()))
            last = prompt[-1]["content"]
            yield {
                "prompt": prompt if self.chat else last,
                **({"answer": truths[0]} if truths else {}),
                "question": question if isinstance(question, str) else last,
                "index": index,
                "data_source": self.recipe.data_source,
                **{key: row[key] for key in kept},
            }

    def _columns(self, row: Row) -> list[str]:
        """Those of question and ground truth; settles the instruction, which is for checked answers."""
        found = [self._column(row, "prompt", self.recipe.question_columns)]
        named = self.columns.get("answer")
        if named or (named is None and (self.answers or set(self.recipe.answer_columns) & set(row))):
            found.append(self._column(row, "answer", self.recipe.answer_columns))
        if self.instruction is None:
            self.instruction = self.recipe.instruction if self.chat and len(found) == 2 else ""
        return found

    def _column(self, row: Row, ours: str, recognised: tuple[str, ...]) -> str:
        candidates = (self.columns[ours],) if ours in self.columns else recognised
        for candidate in candidates:
            if candidate in row:
                return candidate
        raise InputError(
            f"{self.where} has no column {' or '.join(map(repr, candidates))} for the {ours} (it has "
            f"{', '.join(map(repr, row)) or 'none'}): rename one, or map it with {ours}=COLUMN"
            f"{', or with nothing if there are no ground truths' if ours == 'answer' else ''}."
        )

    def _messages(self, question: Any, where: str) -> list[dict[str, str]] | None:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        if isinstance(question, list):
            messages = [dict(message) for message in question if isinstance(message, Mapping)]
            if len(messages) != len(question) or any({"role", "content"} - set(m) for m in messages):
                raise InputError(f"{where}: the prompt is a list but not of messages: give role and content.")
            if not messages:
                return None
            return messages if messages[0]["role"] == "system" else [*system, *messages]
        if question is not None and not isinstance(question, str):
            raise InputError(f"{where}: the question is a {type(question).__name__}: give text or messages.")
        if not question or not question.strip():
            return None
        content = f"{question} {self.instruction}" if self.instruction else question
        return [*system, {"role": "user", "content": content}]

    def describe_dropped(self) -> str:
        """How many rows were dropped and why, in words."""
        return ", ".join(f"{count} rows: {reason}" for reason, count in sorted(self.dropped.items()))


def load_prompts(
    name: str,
    *,
    split: str = "train",
    seed: int = 0,
    size: int | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    source: str | None = None,
    system_prompt: str | None = None,
    instruction: str | None = None,
    chat: bool = True,
    keep: Sequence[str] = (),
    answers: bool = True,
) -> datasets.Dataset:
    """A prompt data set for `GVPOTrainer`, from a name, a file or the Hub.

    Args:
        name: `gsm8k`, `math`, `math500`, `aime24`, `amc`, `minerva`, `olympiadbench`; `arithmetic` or
            `arithmetic:reversed` (plain-text additions); `reasoning_gym:<task>`; a .jsonl or .parquet file;
            or a Hub id. A known name may carry its own file, `gsm8k:path/to/train.jsonl`.
        split: "train" or "test". A file is taken as it is: it *is* the split.
        seed: of the generated problems and of the choice made by `size`.
        size: how many prompts: so many drawn at random, in their order. None for all (generated tasks: all
            pairs of `arithmetic`, 1,000 of a reasoning_gym task).
        columns: for other column names, `{"prompt": theirs, "answer": theirs}`; "" for no answers.
        revision: commit, branch or tag on the Hub.
        source: file or Hub id to read instead of the name's own.
        system_prompt: first message of each conversation.
        instruction: appended to each question after a space. None for the data set's own (the published
            recipe's for GSM8K and MATH), "" for none. Prompts that are conversations already have none added.
        chat: prompts as conversations; else as plain text, without an instruction unless one is given.
        keep: further columns that are taken as they are, such as one of demonstrations.
        answers: whether there must be ground truths. Rewards of one's own may do without: then a source
            without a column of them gives prompts without `answer`, and without an instruction.

    Returns:
        A `datasets.Dataset` with `prompt` (list of messages; for `arithmetic` a string), `answer` (the ground
        truth) and `data_source`; for reasoning_gym also `task` and `entry`. Rows whose ground truth cannot be
        parsed are left out, and their number is logged as a warning.

    Raises:
        InputError: unknown name, unreadable or empty source, missing columns, or no usable row.
    """
    arguments = dict(locals())

    if split not in SPLITS:
        raise InputError(f"the split is {split!r}: choose train or test.")
    if size is not None and size < 1:
        raise InputError(f"the size is {size}: ask for at least one prompt.")
    if name in _ARITHMETIC:
        rows = arithmetic_rows(split=split, seed=seed, size=size, reverse=_ARITHMETIC[name])
        return datasets.Dataset.from_list([row | {"data_source": "arithmetic"} for row in rows])

    prompts, converted = iterate_prompts(**arguments)
    kept = ("prompt", "answer", "data_source", "task", "entry", *keep)
    loaded = [{key: row[key] for key in kept if key in row} for row in converted]
    if prompts.dropped:
        logger.warning("%s: left out %s", name, prompts.describe_dropped())
    if not loaded:
        raise InputError(f"{name} has no usable row of {prompts.seen} ({prompts.describe_dropped()}).")
    dataset = datasets.Dataset.from_list(loaded)
    if size is not None and size < len(dataset):
        chosen = sorted(dataset.shuffle(seed=seed)._indices["indices"][:size].to_pylist())
        dataset = dataset.select(chosen)
    return dataset


def iterate_prompts(
    name: str,
    *,
    split: str,
    seed: int = 0,
    size: int | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    source: str | None = None,
    system_prompt: str | None = None,
    instruction: str | None = None,
    chat: bool = True,
    keep: Sequence[str] = (),
    answers: bool = True,
) -> tuple[Prompts, Iterator[Row]]:
    """The same rows one at a time, for data larger than memory; see `load_prompts` for the arguments.

    Returns:
        The tally, filled while the rows are consumed, and the rows: `prompt`, `answer`, `question`, `index`
        (the row's number in the source, from 0), `data_source` and, for reasoning_gym, `task` and `entry`.
    """
    columns = columns or {}
    if unknown := sorted(set(columns) - {"prompt", "answer"}):
        raise InputError(f"the column mapping names {unknown[0]!r}: it maps prompt and answer only.")
    generated = name.startswith(_REASONING_GYM)
    if generated:
        task = name.removeprefix(_REASONING_GYM)
        recipe = Recipe(name, data_source=f"reasoning_gym/{task}", ability="reasoning", instruction="")
        rows = reasoning_gym_rows(task, split=split, seed=seed, size=size)
    else:
        recipe, rows = _open(name, split, source, revision)
    where = source or name
    prompts = Prompts(recipe, where, columns, system_prompt, instruction, chat, keep, answers, generated)
    return prompts, prompts.convert(rows)


def _open(name: str, split: str, source: str | None, revision: str | None) -> tuple[Recipe, Iterator[Row]]:
    """The recipe that a name stands for and its rows, from `source` where given."""
    known, _, attached = name.partition(":")
    if known in RECIPES:
        recipe = RECIPES[known]
        origin = source or attached or recipe.hub_id or ""
    elif source is not None or looks_like_file(name) or "/" in name:
        # A file's name without its folder, so that the same file gives the same rows wherever it lies.
        recipe = Recipe(name, data_source=Path(name).stem if looks_like_file(name) else name)
        origin = source or name
    else:
        names = ", ".join([*RECIPES, *_ARITHMETIC, f"{_REASONING_GYM}<task>"])
        raise InputError(f"there is no data set {name!r}: choose one of {names}, a file or a Hub id.")
    if looks_like_file(origin):
        return recipe, read_file(origin)
    if split not in recipe.splits:
        raise InputError(f"{name} has no {split} split: choose {' or '.join(recipe.splits)}.")
    config = recipe.hub_config if origin == recipe.hub_id else None
    return recipe, read_hub(origin, config=config, split=recipe.splits[split], revision=revision)
