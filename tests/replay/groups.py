"""Groups that are a function of their number, and a process that appends them until it is killed."""

import os

import numpy as np

from gvpo.replay import Group, ReplayBuffer

VOCABULARY = 1000


def group(number: int, k: int = 4, longest: int = 40, **changes: object) -> Group:
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, longest + 1, k)
    settings = {
        "reference": f"step {number // 8}",
        "reference_logps": -lengths * rng.random(k),
        "policy_step": number // 8,
        "components": {"accuracy": rng.random(k)} if number % 3 else {},
        "metadata": {"number": number, "text": "é"} if number % 2 else {},
        "counted": [rng.random(n) < 0.8 for n in lengths] if number % 5 == 0 else None,
        "valid": np.arange(k) != 1 if number % 7 == 0 else None,
    }
    return Group.of(
        [rng.integers(0, VOCABULARY, rng.integers(1, 9)) for _ in range(k if number % 4 == 1 else 1)],
        [rng.integers(0, VOCABULARY, n) for n in lengths],
        rng.random(k).round(2),
        **{**settings, **changes},
    )


def same(a: Group, b: Group) -> bool:
    arrays = ("prompt_ids", "prompt_lengths", "token_ids", "lengths", "rewards", "reference_logps")
    arrays += ("counted", "valid")
    for name in arrays:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not np.array_equal(x, y)):
            return False
    if a.components.keys() != b.components.keys():
        return False
    if any(not np.array_equal(a.components[n], b.components[n], equal_nan=True) for n in a.components):
        return False
    return (a.reference, a.policy_step, a.metadata) == (b.reference, b.policy_step, b.metadata)


def append_until_killed(folder: str, report: int, start: int, **settings: object) -> None:
    """Append groups from number `start` on; tell `report` (a file descriptor) how far after each append."""
    buffer = ReplayBuffer(folder, **settings)
    rng = np.random.default_rng(start)
    number = start
    while True:
        count = int(rng.integers(1, 9))
        buffer.append([group(n) for n in range(number, number + count)])
        number += count
        os.write(report, number.to_bytes(8, "little"))
        if rng.random() < 0.05:
            buffer.save(f"{folder}-saved/{number % 3}")
