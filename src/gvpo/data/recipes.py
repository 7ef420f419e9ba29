"""What is particular to each data set: where it lives, its columns, its instruction, its ground truth; and
how those are made that live nowhere.

The instructions and the `data_source` names of GSM8K and MATH are those of the published recipe, which are
verl's.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gvpo.errors import InputError, refused
from gvpo.rewards.extraction import any_answer

_STEP_BY_STEP = "Let's think step by step and output the final answer "


@dataclass(frozen=True)
class Recipe:
    """How the rows of one data set become prompts with ground truths.

    Attributes:
        name: what the user calls it.
        hub_id, hub_config: the Hub data set, if there is one to load by default.
        data_source, ability: verl's columns of these names; its reward function is told the first.
        instruction: appended to the question, after a space; empty for none.
        question_columns, answer_columns: the recognised names, the first that a row has counts.
        ground_truth: from the answer column's value to the ground truth; None when it cannot be parsed.
        splits: Hub split by our split name.
    """

    name: str
    hub_id: str | None = None
    data_source: str = ""
    hub_config: str | None = None
    ability: str = "math"
    instruction: str = _STEP_BY_STEP + r"within \boxed{}."
    question_columns: tuple[str, ...] = ("prompt", "question", "problem", "input", "query")
    answer_columns: tuple[str, ...] = ("answer", "ground_truth", "final_answer", "target", "solution")
    ground_truth: Callable[[Any], str | None] = any_answer
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})


def _gsm8k_truth(value: Any) -> str | None:
    plain = any_answer(value)
    return plain.replace(",", "") if plain and re.fullmatch(r"-?[\d.,]*\d", plain) else None


_TEST_ONLY = {"test": "test"}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "gsm8k",
            "openai/gsm8k",
            "openai/gsm8k",
            hub_config="main",
            instruction=_STEP_BY_STEP + 'after "####".',
            question_columns=("question", "prompt"),
            answer_columns=("answer",),
            ground_truth=_gsm8k_truth,
        ),
        Recipe(
            "math",
            "DigitalLearningGmbH/MATH-lighteval",
            "DigitalLearningGmbH/MATH-lighteval",
            question_columns=("problem", "question", "prompt"),
            answer_columns=("answer", "solution"),
        ),
        Recipe("math500", "HuggingFaceH4/MATH-500", "HuggingFaceH4/MATH-500", splits=_TEST_ONLY),
        Recipe("aime24", "HuggingFaceH4/aime_2024", "aime24", splits={"test": "train"}),
        Recipe("amc", "AI-MO/aimo-validation-amc", "amc", splits={"test": "train"}),
        Recipe("minerva", "math-ai/minervamath", "minerva", splits=_TEST_ONLY),
        Recipe(
            "olympiadbench",
            "math-ai/olympiadbench",
            "olympiadbench",
            answer_columns=("answer", "final_answer"),
            splits=_TEST_ONLY,
        ),
    )
}


# --- Made, not loaded ---------------------------------------------------------------------------------------

_ARITHMETIC_TEST = 1000


def arithmetic_rows(
    *, split: str, seed: int, size: int | None = None, reverse: bool = False
) -> Iterator[dict[str, Any]]:
    """Additions of two numbers below 100, as plain-text prompts.

    The 10,000 pairs are divided once and for all, 9,000 for training and 1,000 for test: the two never share
    a pair, whatever the seed, which is of their order. With `reverse`, numbers are padded with zeros and the
    sum is written least significant digit first, the form that a small model learns (`07+95=` → `201`).
    """
    pairs = list(range(10_000))
    random.Random(0).shuffle(pairs)
    chosen = pairs[:_ARITHMETIC_TEST] if split == "test" else pairs[_ARITHMETIC_TEST:]
    random.Random(seed).shuffle(chosen)
    if size is not None and size > len(chosen):
        raise InputError(f"arithmetic has {len(chosen)} problems for {split}, not {size}: ask for fewer.")
    for pair in chosen[:size]:
        left, right = divmod(pair, 100)
        if reverse:
            yield {"prompt": f"{left:02d}+{right:02d}=", "answer": f"{left + right:03d}"[::-1]}
        else:
            yield {"prompt": f"{left}+{right}=", "answer": str(left + right)}


def reasoning_gym_rows(task: str, *, split: str, seed: int, size: int | None) -> Iterator[dict[str, Any]]:
    """Problems of one reasoning_gym task (1,000 by default), with the whole entry for the task's own scorer.

    Raises:
        InputError: reasoning_gym is not installed or has no such task.
    """
    with refused("reasoning_gym is not installed", "pip install 'gvpo[reasoning-gym]'", ImportError):
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    if task not in DATASETS:
        raise InputError(f"reasoning_gym has no task {task!r}: choose one of {', '.join(sorted(DATASETS))}.")
    # Far apart, so that no training seed that a person would choose meets a test seed.
    seed = seed if split == "train" else seed + 1_000_000_007
    count = 1000 if size is None else size
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=count)
    for index in range(count):
        entry = dataset[index]
        yield {
            "question": entry["question"],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "task": task,
            # The scorers read values from `metadata`; those JSON cannot hold are kept as text.
            "entry": json.dumps(entry, default=str, sort_keys=True),
        }
