"""Completions against ground truths, end to end: labelled endings, real solutions, hostile strings."""

import json
import os
import random
import resource
import threading
import time
from pathlib import Path

import pytest

from benchmarks.rewards import labelled, mistakes, stated
from gvpo.data.recipes import RECIPES
from gvpo.rewards import VerifierPool, answers_equal, verify
from gvpo.rewards.pool import shared_pool
from tests.rewards.hostile import hostile_strings

FIXTURES = Path(__file__).parent.parent / "fixtures" / "rewards"


def read(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(workers=2)
    yield pool
    pool.close()


# What `python -m benchmarks.rewards` says, and the guide: wrong 1s, and at most so many missed 1s.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong", "missed"), [("dev", 0, 12), ("held-out", 0, 0), ("unseen", 2, 4), ("fitted", 0, 95)]
)
def test_labelled_answers(name, wrong, missed):
    rows = labelled()[name]
    paid, unpaid = mistakes(rows, stated)
    assert [rows[index]["completion"] for index in paid][wrong:] == []
    assert len(unpaid) <= missed


@pytest.mark.parametrize("name", ["gsm8k.jsonl", "math500.jsonl"])
def test_solutions_score_against_their_own_answers(name):
    recipe = RECIPES["gsm8k" if "gsm8k" in name else "math"]
    rows = read(name)
    truths = [recipe.ground_truth(row["answer"]) for row in rows]
    solutions = [row.get("solution", row["answer"]) for row in rows]
    assert all(verdict.correct for verdict in verify(solutions, truths))


@pytest.mark.slow
def test_solutions_score_zero_against_other_answers(pool):
    rows = read("math500.jsonl")
    truths = [RECIPES["math"].ground_truth(row["answer"]) for row in rows]
    rng = random.Random(0)
    pairs = [(rng.choice(truths), row) for row in rows for _ in range(8)]
    pairs = [
        (truth, row) for truth, row in pairs if not answers_equal([(truth, row["answer"])], pool=pool)[0]
    ]
    verdicts = verify([row["solution"] for _, row in pairs], [truth for truth, _ in pairs], pool=pool)
    assert sum(verdict.correct for verdict in verdicts) / len(pairs) <= 0.003


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "answer", "equal"),
    [
        ("(a+5)(b+2)", "ab+2a+5b+10", True),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", True),
        ("(3,4]", r"3 < x \le 4", True),
        ("(3,4]", "[3,4]", False),
        ("2k+2", "2(k+2)", False),
        ("$6m$", "6", False),
        ("72", "9**9**9**9", False),
        ("72", r"\infty", False),
    ],
)
def test_computer_algebra(truth, answer, equal, pool):
    assert answers_equal([(truth, answer)], pool=pool) == [equal]


@pytest.mark.slow
def test_hostile_strings_end_in_bounded_time_and_memory_and_score_nothing():
    pool = VerifierPool(workers=2)
    # `make fuzz` asks for 10,000.
    count = int(os.environ.get("GVPO_FUZZ_EXAMPLES", "2000"))
    strings = hostile_strings(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    truths = ["72", r"\frac{1}{2}", "x^2+1", "(3,4]", r"\text{east}"]
    verdicts = verify(strings, truths * (count // 5), pool=pool)
    seconds = time.monotonic() - started
    workers = pool.process_ids()
    pool.close()
    assert [s[:80] for s, verdict in zip(strings, verdicts, strict=True) if verdict.correct] == []
    assert seconds < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert not any(is_running(pid) for pid in workers)


def is_running(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_comparison_past_its_limit_costs_only_itself():
    pool = VerifierPool(workers=1, seconds=0.3)
    # Slow in Math-Verify: it solves the inequality.
    slow = ("(3,4]", r"x^5-64x+270 \le \sqrt{x^{7}+28}")
    assert pool.compare([("x+1", "1+x"), slow, ("2(k+1)", "2k+2")]) == [True, False, True]
    pool.close()


@pytest.mark.slow
def test_threads_share_a_pool(pool):
    results = {}

    def grade(name):
        results[name] = answers_equal([("2k+2", f"2(k+{i % 3})") for i in range(30)], pool=pool)

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[i] == [i % 3 == 1 for i in range(30)] for i in range(6))
    assert len(pool.process_ids()) <= 2


@pytest.mark.slow
def test_a_forked_process_grades_with_workers_of_its_own():
    assert answers_equal([("2k+2", "2(k+1)")]) == [True]
    child = os.fork()
    if child == 0:
        right = answers_equal([("2k+2", "2(k+1)"), ("2k+2", "2(k+2)")]) == [True, False]
        shared_pool().close()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert answers_equal([("x+y", "y+x")]) == [True]
    shared_pool().close()


@pytest.mark.slow
def test_a_killed_worker_is_replaced():
    pool = VerifierPool(workers=1)
    assert pool.compare([("2k+2", "2(k+1)")]) == [True]
    os.killpg(pool.process_ids()[0], 9)
    assert pool.compare([("2k+2", "2(k+1)")]) == [True]
    pool.close()


def test_the_shared_pool_starts_no_process_before_it_is_needed():
    shared_pool().close()
    assert answers_equal([("72", "72 clips"), ("72", "73")]) == [True, False]
    assert shared_pool().process_ids() == []


def test_several_acceptable_answers():
    truth = json.dumps(["4.4e7", r"4.4 \times 10^7"])
    assert answers_equal([(truth, "44000000"), (truth, "44")]) == [True, False]
