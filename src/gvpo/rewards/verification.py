"""Batches of completions against ground truths: extraction, the exact comparison, then computer algebra."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from gvpo.rewards.comparison import closes_with_words, compare
from gvpo.rewards.extraction import Answer, extract_answer
from gvpo.rewards.normalization import clean
from gvpo.rewards.pool import VerifierPool, shared_pool


@dataclass(frozen=True)
class Verdict:
    """What became of one completion.

    Attributes:
        answer: the extracted final answer; None when the completion has none.
        correct: whether it equals the ground truth.
    """

    answer: Answer | None
    correct: bool


def truths_of(ground_truth: str) -> list[str]:
    """The acceptable answers that a ground truth stands for: a JSON list of strings is any of them."""
    if ground_truth.startswith('["'):
        try:
            several = json.loads(ground_truth)
        except json.JSONDecodeError:
            return [ground_truth]
        if isinstance(several, list) and all(isinstance(item, str) for item in several):
            return several
    return [ground_truth]


def verify(
    completions: Sequence[str], ground_truths: Sequence[str], *, pool: VerifierPool | None = None
) -> list[Verdict]:
    """Extract each completion's final answer and compare it with its ground truth.

    Args:
        completions: the model's texts.
        ground_truths: one for each completion, as the data set writes it.
        pool: worker processes for the comparisons that need computer algebra. None for the process's own.

    Raises:
        ValueError: the two have different lengths.
    """
    answers = [extract_answer(completion) for completion in completions]
    correct = answers_equal(
        [
            (truth, answer.text if answer else "")
            for truth, answer in zip(ground_truths, answers, strict=True)
        ],
        pool=pool,
    )
    # A word that is the answer can be told from other closing words only by knowing it.
    return [
        Verdict(answer, right or (answer is None and closes_with_words(completion, truth)))
        for answer, right, completion, truth in zip(answers, correct, completions, ground_truths, strict=True)
    ]


def answers_equal(pairs: Sequence[tuple[str, str]], *, pool: VerifierPool | None = None) -> list[bool]:
    """For each (ground truth, answer), whether the answer is right."""
    results = [False] * len(pairs)
    undecided: list[tuple[str, str]] = []
    owners: list[int] = []
    for index, (ground_truth, answer) in enumerate(pairs):
        if not answer.strip():
            continue
        truths = truths_of(ground_truth)
        verdicts = [compare(truth, answer) for truth in truths]
        if any(verdict is True for verdict in verdicts):
            results[index] = True
            continue
        for truth, verdict in zip(truths, verdicts, strict=True):
            if verdict is None:
                undecided.append((clean(truth), clean(answer)))
                owners.append(index)
    if undecided:
        for index, equal in zip(owners, (pool or shared_pool()).compare(undecided), strict=True):
            results[index] = results[index] or equal
    return results
