"""How `accuracy` and Math-Verify alone grade labelled answers: `python -m benchmarks.rewards [DATA]`.

A wrong 1 is a reward for a wrong answer, a missed 1 a right answer without one. With a folder that holds
copies of `gsm8k/{train,test}.jsonl` and `math_eval/math500.jsonl`, their solutions are graded too, and timed.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gvpo.data.recipes import RECIPES
from gvpo.rewards import verify

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "rewards"
Grader = Callable[[list[str], list[str]], list[bool]]


def stated(completions: list[str], truths: list[str]) -> list[bool]:
    return [verdict.correct for verdict in verify(completions, truths)]


def closing(completions: list[str], truths: list[str]) -> list[bool]:
    return [verdict.correct for verdict in verify(completions, truths, closing="sentence")]


def math_verify(completions: list[str], truths: list[str]) -> list[bool]:
    from math_verify import parse
    from math_verify import verify as equal

    return [
        bool(equal(parse(f"${truth}$"), parse(text))) for text, truth in zip(completions, truths, strict=True)
    ]


GRADERS: dict[str, Grader] = {
    "accuracy": stated,
    "accuracy:sentence": closing,
    "Math-Verify alone": math_verify,
}


def labelled() -> dict[str, list[dict[str, Any]]]:
    """The labelled sets by name: fresh answers by their split, and those that rules were once fitted to."""

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]

    fresh = read("fresh.jsonl")
    sets = {split: [row for row in fresh if row["split"] == split] for split in ("dev", "held-out", "unseen")}
    return sets | {
        "fitted": [row for name in ("endings", "styles", "forms") for row in read(f"{name}.jsonl")]
    }


def mistakes(rows: list[dict[str, Any]], grader: Grader) -> tuple[list[int], list[int]]:
    """The rows with a wrong 1, and those with a missed 1."""
    found = grader([row["completion"] for row in rows], [row["truth"] for row in rows])
    pairs = list(enumerate(zip(found, (row["correct"] for row in rows), strict=True)))
    return [i for i, (ours, label) in pairs if ours > label], [
        i for i, (ours, label) in pairs if ours < label
    ]


def table() -> None:
    print("| set | right + wrong | grader | wrong 1s | missed 1s | precision | recall |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in labelled().items():
        right = sum(row["correct"] for row in rows)
        for grader, grade in GRADERS.items():
            wrong, missed = (len(found) for found in mistakes(rows, grade))
            hits = right - missed
            print(
                f"| {name} | {right} + {len(rows) - right} | {grader} | {wrong} | {missed} "
                f"| {hits / (hits + wrong):.1%} | {hits / right:.1%} |"
            )


def solutions(data: Path) -> None:
    """Whole data sets' solutions against their own answers and those of other rows."""
    for recipe, files in (("gsm8k", ["gsm8k/train", "gsm8k/test"]), ("math", ["math_eval/math500"])):
        rows = [
            json.loads(line) for file in files for line in (data / f"{file}.jsonl").read_text().splitlines()
        ]
        truths = [RECIPES[recipe].ground_truth(row["answer"]) or "" for row in rows]
        texts = [row.get("solution", row["answer"]) for row in rows]
        shuffled = random.Random(0).sample(truths, len(truths))
        verify(texts, random.Random(1).sample(truths, len(truths)))  # the workers start
        for name, given in (("own", truths), ("others'", shuffled)):
            started = time.perf_counter()
            ones = sum(verdict.correct for verdict in verify(texts, given))
            rate = len(rows) / (time.perf_counter() - started)
            equal = sum(a == b for a, b in zip(truths, given, strict=True))
            print(
                f"{recipe}, {name} answers: {ones} of {len(rows)} score 1 ({equal} are equal); {rate:.0f}/s"
            )


if __name__ == "__main__":
    table()
    if len(sys.argv) > 1:
        solutions(Path(sys.argv[1]))
