"""Which groups of a replay buffer to use: by age, by the variance of their rewards, or by a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gvpo.errors import InputError


@dataclass(frozen=True)
class ReplayIndex:
    """What is known of stored groups without reading them, one entry a group, oldest first.

    Attributes:
        numbers: their numbers in the buffer.
        ages: optimizer steps since they were sampled.
        reward_means: of the rewards of each group.
        reward_variances: of the same, unbiased.
        sizes: k.
        tokens: of prompt and completions together.
    """

    numbers: Int[np.ndarray, "groups"]
    ages: Int[np.ndarray, "groups"]
    reward_means: Float[np.ndarray, "groups"]
    reward_variances: Float[np.ndarray, "groups"]
    sizes: Int[np.ndarray, "groups"]
    tokens: Int[np.ndarray, "groups"]

    def __len__(self) -> int:
        return len(self.numbers)


Weights = Callable[[ReplayIndex], Float[np.ndarray, "groups"]]

HALF_LIFE = 8  # optimizer steps


SAMPLING: dict[str, Weights | None] = {
    "uniform": None,
    "recent": lambda index: 0.5 ** (index.ages / HALF_LIFE),
    "reward_variance": lambda index: index.reward_variances,  # of equal rewards: never
}


def choose(
    index: ReplayIndex, count: int, sampling: str | Weights, generator: np.random.Generator
) -> Int[np.ndarray, "chosen"]:
    """Positions of `count` different groups (of all that have weight, if they are fewer).

    Raises:
        InputError: an unknown name; a function that returns something else than a finite weight of at least 0
            for every group.
    """
    if isinstance(sampling, str) and sampling not in SAMPLING:
        raise InputError(
            f"There is no sampling {sampling!r}: choose one of {', '.join(SAMPLING)}, or give a function."
        )
    function = SAMPLING[sampling] if isinstance(sampling, str) else sampling
    if function is None:
        return generator.choice(len(index), size=min(count, len(index)), replace=False)
    weights = np.asarray(function(index), dtype=np.float64)
    if weights.shape != (len(index),) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(
            f"The sampling function returned weights of shape {weights.shape} for {len(index)} groups: "
            "return one finite weight of at least 0 for each."
        )
    possible = weights.nonzero()[0]
    count = min(count, len(possible))
    if count == 0:
        return possible[:0]
    # The `count` first arrivals of independent exponential clocks: weighted sampling without replacement.
    arrivals = generator.standard_exponential(len(possible)) / weights[possible]
    first = np.argpartition(arrivals, count - 1)[:count]
    return possible[first[np.argsort(arrivals[first])]]
