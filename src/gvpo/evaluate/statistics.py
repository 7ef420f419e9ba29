"""Estimates over samples and prompts: pass@k, maj@k, bootstrap intervals, a paired test."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2_000
_FLIPS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval.

    Attributes:
        mean: over prompts, each counting once.
        low, high: ends of the interval.
    """

    mean: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples, drawn without replacement from `samples`, is among `correct`.

    The unbiased estimator 1 − C(n−c, k) / C(n, k) of Chen et al., arXiv 2107.03374.

    Raises:
        ValueError: not 0 ≤ correct ≤ samples or not 1 ≤ k ≤ samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} right ones is not defined")
    if samples - correct < k:
        return 1.0
    wrong = np.arange(samples - correct + 1, samples + 1)
    return float(1.0 - np.prod(1.0 - k / wrong))


def majority_correct(answers: Sequence[Hashable | None], correct: Sequence[float]) -> float:
    """How right the most frequent answer is; a tie counts as the mean of the tied answers.

    Args:
        answers: one a sample, equal ones equal; None for a sample without an answer, which has no vote.
        correct: of the same samples.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    return float(np.mean([correct[list(answers).index(answer)] for answer in tied]))


def bootstrap(values: Sequence[float] | np.ndarray, seed: int) -> Estimate:
    """The mean of one value a prompt, with the percentile interval over resampled prompts.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # One resample at a time: a matrix of all of them would not fit for large sets.
    means = [data[generator.integers(0, len(data), len(data))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(data.mean()), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same prompts.

    Attributes:
        difference: of the means, this run less the other, with its 95 % interval.
        p_value: two-sided, of the sign-flip permutation test on the differences prompt by prompt.
        better, worse: numbers of prompts on which this run is so.
    """

    difference: Estimate
    p_value: float
    better: int
    worse: int


def paired_test(these: Sequence[float], others: Sequence[float], seed: int) -> Comparison:
    """Whether two runs differ, prompt by prompt.

    Raises:
        ValueError: different numbers of prompts, or none.
    """
    difference = np.asarray(these, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    estimate = bootstrap(difference, seed)
    generator = np.random.default_rng(seed)
    changed = difference[difference != 0]
    flips = 0
    for _ in range(_FLIPS):
        signs = generator.integers(0, 2, len(changed)) * 2 - 1
        flips += abs(float(signs @ changed)) >= abs(float(changed.sum())) - 1e-12
    better, worse = (int((sign * difference > 0).sum()) for sign in (1, -1))
    return Comparison(estimate, (flips + 1) / (_FLIPS + 1), better, worse)
