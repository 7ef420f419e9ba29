"""Problems that are made rather than loaded: arithmetic and reasoning_gym's tasks."""

import json
import random
from collections.abc import Iterator
from typing import Any

from gvpo.errors import InputError, refused

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
