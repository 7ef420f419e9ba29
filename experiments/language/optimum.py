"""Where β aims: reward, KL and different right answers of π* ∝ π_ref·exp(R/β), from samples of the start.

With rewards of 0 and 1, π* is right with probability q = p·e^{1/β} / Z, Z = 1 − p + p·e^{1/β}, where p is the
start's, at KL(π*‖π_ref) = q/β − log Z; among its right answers it is the start's own distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.frontier import binary_target
from experiments.language.measure import right_answers, sample_all
from experiments.language.tasks import Task

BETAS = (1000.0, 10.0, 3.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)


def optimum(
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    each: int,
    rounds: int,
    strengths: Sequence[float],
) -> dict[str, Any]:
    """`rounds` × `each` samples of every held-out prompt, and π* for many β, means over the prompts.

    Returns:
        "answers": for each prompt how often each right answer was given, and "sampled", of how many samples;
        "optimum": for each β reward, kl, distinct (among `each`), pass@8 and pass@64.
    """
    keys = task.keys[: task.held_out]
    counts: dict[str, Counter[str]] = {key: Counter() for key in keys}
    for _ in range(rounds):
        texts = [text for part in sample_all(start, tokenizer, task, keys, each) for text in part.texts]
        for i, key in enumerate(keys):
            counts[key].update(right_answers(task, key, texts[i * each : (i + 1) * each]))
    sampled = rounds * each
    return {"answers": counts, "sampled": sampled, "optimum": targets(counts, sampled, each, strengths)}


def targets(
    counts: Mapping[str, Mapping[str, int]], sampled: int, each: int, strengths: Sequence[float]
) -> list[dict[str, float]]:
    """π* for many β and those of `strengths`: means over prompts, whose right answers were so often given."""
    found = []
    for beta in sorted({*BETAS, *strengths}, reverse=True):
        by_prompt = []
        for count in counts.values():
            target = binary_target(sum(count.values()) / sampled, beta)
            right = target["right"]
            passed = {f"pass@{k}": 1 - (1 - right) ** k for k in (8, 64) if k <= each}
            distinct = expected_distinct(list(count.values()), each, right)
            by_prompt.append({"reward": right, "kl": target["kl"], "distinct": distinct, **passed})
        names = by_prompt[0]
        mean = {name: sum(one[name] for one in by_prompt) / len(by_prompt) for name in names}
        found.append({"beta": beta, **mean})
    return found


def expected_distinct(counts: Sequence[int], samples: int, right: float) -> float:
    """Different right answers among `samples`, each right with probability `right` and then as in `counts`.

    m right answers are m draws without replacement of those that were seen (rarefaction, which is unbiased);
    if fewer were seen than m, all of them: too few.
    """
    seen = sum(counts)
    total = 0.0
    for m in range(1, samples + 1):
        drawn = min(m, seen)
        if drawn:
            missing = sum(math.comb(seen - c, drawn) / math.comb(seen, drawn) for c in counts)
            probability = math.comb(samples, m) * right**m * (1 - right) ** (samples - m)
            total += probability * (len(counts) - missing)
    return total
