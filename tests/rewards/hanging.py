"""Reward functions that hang, in a module that a worker process imports quickly."""

import time
from typing import Any


def hangs(completions: list[str], **_: Any) -> list[float]:
    time.sleep(600)
    return []


def hangs_on_7(completions: list[str], **_: Any) -> list[float]:
    return hangs(completions) if "7" in completions else [1.0] * len(completions)
