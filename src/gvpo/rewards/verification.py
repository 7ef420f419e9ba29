"""Batches of completions against ground truths: extraction, the exact comparison, then computer algebra."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from gvpo.rewards.comparison import compare
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


def verify(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    *,
    pool: VerifierPool | None = None,
    closing: str | None = None,
) -> list[Verdict]:
    """Extract each completion's final answer and compare it with its ground truth.

    Args:
        completions: the model's texts.
        ground_truths: one for each completion, as the data set writes it; of a JSON list any will do.
        pool: worker processes for the comparisons that need computer algebra. None for the process's own.
        closing: "sentence" to take the value of a last sentence where no answer is stated.

    Raises:
        ValueError: the two have different lengths.
    """
    answers = [extract_answer(completion, closing) for completion in completions]
    texts = [answer.text if answer else "" for answer in answers]
    correct = answers_equal(list(zip(ground_truths, texts, strict=True)), pool=pool)
    return [Verdict(answer, right) for answer, right in zip(answers, correct, strict=True)]


def answers_equal(pairs: Sequence[tuple[str, str]], *, pool: VerifierPool | None = None) -> list[bool]:
    """For each (ground truth, answer), whether the answer is right."""
    results = [False] * len(pairs)
    undecided: list[tuple[int, tuple[str, str]]] = []
    for index, (ground_truth, answer) in enumerate(pairs):
        truths = _any_of(ground_truth) if answer.strip() else []
        verdicts = [compare(truth, answer) for truth in truths]
        results[index] = any(verdicts)
        if not results[index]:
            unknown = (truth for truth, verdict in zip(truths, verdicts, strict=True) if verdict is None)
            undecided += [(index, (clean(truth), clean(answer))) for truth in unknown]
    if undecided:
        equal = (pool or shared_pool()).compare([pair for _, pair in undecided])
        for (index, _), right in zip(undecided, equal, strict=True):
            results[index] = results[index] or right
    return results


def _any_of(ground_truth: str) -> list[str]:
    if ground_truth.startswith('["'):
        with suppress(json.JSONDecodeError):
            several = json.loads(ground_truth)
            if all(isinstance(item, str) for item in several):
                return list(several)
    return [ground_truth]
