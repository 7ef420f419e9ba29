"""What is particular to each data set: where it lives, its columns, its instruction, its ground truth.

The instructions and the `data_source` names of GSM8K and MATH are those of the published recipe, which are
verl's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
