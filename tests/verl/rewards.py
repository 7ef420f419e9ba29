"""A reward that tells responses apart, but for some prompts; verl loads this file by its path."""

import math
from typing import Any


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Any = None,
    infinite: int | None = None,
    **_: Any,
) -> float:
    if int(ground_truth) == infinite:
        return math.inf
    if int(ground_truth) % 5 == 1:
        return 0.5
    digits = [int(c) for c in solution_str if c.isdigit()]
    return sum(digits) / (9 * len(digits)) + 0.1 * len(digits) / 16 if digits else -0.5
