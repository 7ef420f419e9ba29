"""A reward for answers to the letter; verl loads this file by its path."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
) -> float:
    """1.0 when `solution_str` is `ground_truth`, apart from white space around it, else 0.0."""
    return float(solution_str.strip() == str(ground_truth).strip())
