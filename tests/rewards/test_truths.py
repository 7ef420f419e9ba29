"""Ground truths in the forms that data sets write."""

import json

import pytest

from gvpo.rewards.truths import any_answer, hash_answer


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        (142.0, "142"),
        (["9.6\n"], "9.6"),
        (["4.4e7\n", r"4.4 \times 10^7", "4.4e7"], json.dumps(["4.4e7", r"4.4 \times 10^7"])),
        ([r"$\frac{1}{2n}$"], r"\frac{1}{2n}"),
        ("$69$,$84$", "$69$,$84$"),
        (r"\frac{1}{", None),
        ("", None),
        (None, None),
        (True, None),
        ([], None),
    ],
)
def test_ground_truths(value, truth):
    assert any_answer(value) == truth


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 72", "72"), ("#### -5", "-5"), ("#### 1,450,000", "1450000"), ("#### five", None), ("72", None)],
)
def test_hash_answers(text, answer):
    assert hash_answer(text) == answer
