"""Rewards of the verl benchmark; verl loads this file by its path."""

import random
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
) -> float:
    """Different for each response to half of the prompts, the same for all responses to the others."""
    return 0.5 if data_source == "equal" else random.random()
