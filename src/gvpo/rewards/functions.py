"""Reward functions in TRL's protocol, and verl's `compute_score`, from one implementation.

A reward function is called with `prompts`, `completions` (texts, or lists of messages) and the data set's
columns as keywords, and returns one float for each completion; None where it cannot tell.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gvpo.errors import InputError, refused
from gvpo.rewards.extraction import any_answer, extract_answer
from gvpo.rewards.verification import verify

Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]
Completion = str | Sequence[Mapping[str, Any]]
Completions = Sequence[Completion]
Column = Sequence[Any]


def completion_text(completion: Completion) -> str:
    """The text of a completion: of its last assistant message, when it is a conversation."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text", "") for part in content)  # multimodal: a list of parts
    return ""


def _answers(answer: Column | None, count: int, name: str) -> Column:
    if answer is None:
        raise InputError(f"the {name} reward needs the column 'answer': add the ground truths.")
    if len(answer) != count:
        raise InputError(f"the {name} reward got {count} completions, {len(answer)} answers: give one each.")
    return answer


def accuracy(
    prompts: Column,
    completions: Completions,
    *,
    answer: Column | None = None,
    closing: str | None = None,
    **_: Any,
) -> Rewards:
    """1 when the completion's final answer equals `answer`, else 0; None where there is no ground truth.

    With `closing="sentence"` (by name `accuracy:sentence`) the value of a last sentence is an answer, too,
    where none is stated.

    Raises:
        InputError: the data set has no column `answer`.
    """
    answers = _answers(answer, len(completions), "accuracy")
    truths = ["" if truth is None else str(truth) for truth in answers]
    verdicts = verify([completion_text(completion) for completion in completions], truths, closing=closing)
    return [
        float(verdict.correct) if truth.strip() else None
        for verdict, truth in zip(verdicts, truths, strict=True)
    ]


def exact(prompts: Column, completions: Completions, *, answer: Column | None = None, **_: Any) -> Rewards:
    """1 when the completion is `answer` to the letter, apart from white space around it, else 0.

    Raises:
        InputError: the data set has no column `answer`.
    """
    answers = _answers(answer, len(completions), "exact")
    return [
        None if truth is None else float(completion_text(completion).strip() == str(truth).strip())
        for completion, truth in zip(completions, answers, strict=True)
    ]


def format(prompts: Column, completions: Completions, **_: Any) -> Rewards:
    """1 when the completion says which its final answer is (`\\boxed{}`, `####`, "the answer is"), else 0."""
    found = (extract_answer(completion_text(completion)) for completion in completions)
    return [float(answer is not None and answer.explicit) for answer in found]


def length(
    prompts: Column,
    completions: Completions,
    *,
    completion_ids: Column | None = None,
    max_length: int = 1024,
    **_: Any,
) -> Rewards:
    """0 up to 80 % of `max_length`, from there down in a straight line to −1 at `max_length` and beyond.

    Lengths are in tokens where the trainer passes `completion_ids`, as TRL does, else in words.
    """
    words = (completion_text(completion).split() for completion in completions)
    sizes = map(len, words if completion_ids is None else completion_ids)
    free = 0.8 * max_length
    return [-min(1.0, max(0.0, size - free) / (max_length - free)) for size in sizes]


def reasoning_gym(
    prompts: Column,
    completions: Completions,
    *,
    entry: Column | None = None,
    task: Column | None = None,
    **_: Any,
) -> Rewards:
    """The task's own score of the completion's final answer, 0 to 1.

    Raises:
        InputError: the columns `task` and `entry` are missing, or reasoning_gym is.
    """
    if entry is None or task is None:
        raise InputError(
            "the reasoning_gym reward needs columns 'task' and 'entry': load reasoning_gym:<task>."
        )
    return [
        _score_entry(name, completion_text(completion), json.loads(text))
        for completion, name, text in zip(completions, task, entry, strict=True)
    ]


def _score_entry(task: str, text: str, entry: dict[str, Any]) -> float:
    with refused("reasoning_gym is not installed", "pip install 'gvpo[reasoning-gym]'", ImportError):
        from reasoning_gym import get_score_answer_fn
    score = get_score_answer_fn(task)
    found = extract_answer(text)
    # Many tasks ask for grids or sequences, which only the scorer can read in a text that states no answer.
    return float(score(answer=found.text if found else text.strip(), entry=entry))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    closing: str | None = None,
    **_: Any,
) -> float:
    """verl's custom reward function: 1.0 when `solution_str` arrives at `ground_truth`, else 0.0.

    Args:
        data_source: the row's `data_source`; `reasoning_gym/<task>` is scored by the task.
        solution_str: the model's text.
        ground_truth: the row's `reward_model.ground_truth`; the full solution of GSM8K or MATH will do.
        extra_info: for reasoning_gym, `entry`.
        closing: as for `accuracy`; verl passes it from `custom_reward_function.reward_kwargs`.
    """
    if str(data_source).startswith("reasoning_gym/"):
        entry = (extra_info or {}).get("entry")
        if entry is None:
            raise InputError("a reasoning_gym row has no extra_info.entry: write the data with `gvpo data`.")
        return _score_entry(str(data_source).partition("/")[2], solution_str, json.loads(entry))
    truth = any_answer(ground_truth)
    if truth is None:
        return 0.0
    return float(verify([solution_str], [truth], closing=closing)[0].correct)
