"""Tasks, measures and the optimum that they are compared with."""

import math
import random

import pytest
import torch
from transformers import PreTrainedModel

from experiments.comparison import Record
from experiments.language.measure import Samples, divergence
from experiments.language.optimum import expected_distinct, targets
from experiments.language.report import summary
from experiments.language.tasks import TASKS, canonical
from tests.models import VOCAB, tiny_model


def two_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    policy, start = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return policy.requires_grad_(False), start.requires_grad_(False)


@pytest.mark.parametrize(
    ("task", "text", "key", "right"),
    [
        ("times", "7 x 8 = 56.", "7 x 8", True),
        ("times", "It is 54, not 56", "7 x 8", True),
        ("times", "56 is not 54", "7 x 8", False),
        ("times", "It is large.", "7 x 8", False),
        ("times", "561", "7 x 8", False),
        ("sentence", "The river runs to the sea.", "river", True),
        ("sentence", "The river runs to the sea", "river", False),
        ("sentence", "The river runs to sea.", "river", False),
        ("sentence", "The riverside runs to the sea.", "river", False),
        ("sentence", "The river. It runs to sea.", "river", False),
        ("sentence", "the river runs to the sea.", "river", False),
        ("sentence", "The river runs to the sea. Oh", "river", False),
        ("sentence", "", "river", False),
        ("product", " 56", "7 x 8", True),
        ("product", " 54 or 56", "7 x 8", False),
        ("product", "", "7 x 8", False),
        ("word", " River\n", "ri", True),
        ("word", " a river", "ri", False),
        ("word", " sea", "ri", False),
        ("word", "", "ri", False),
    ],
)
def test_answers_are_checked(task: str, text: str, key: str, right: bool) -> None:
    assert TASKS[task].right(text, key) is right
    assert TASKS[task].reward(prompts=[""], completions=[text], key=[key]) == [float(right)]


def test_questions_are_different_and_answers_that_differ_in_writing_only_are_one() -> None:
    for task in TASKS.values():
        assert len(set(task.keys)) == len(task.keys) > 3 * task.held_out
    assert canonical(" The  Sun rose. ") == canonical("the sun rose")


def test_divergence_of_one_token_is_exact_whatever_was_sampled() -> None:
    policy, start = two_models()
    prompt = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])  # the first is padded
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    one = torch.ones(2, 1)
    samples = Samples(torch.cat([prompt, one.long() * 3], 1), torch.cat([mask, one.bool()], 1), 1, [])
    kl, entropy = divergence(policy, start, samples)
    for row, ids in enumerate(([5, 6, 7], [8, 9, 10, 11])):
        p, q = (m(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for m in (policy, start))
        assert kl[row] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert entropy[row] == pytest.approx(float(-(p.exp() * p).sum()), rel=1e-4)
    assert kl.min() > 0.01
    assert entropy.max() <= math.log(VOCAB)


def test_divergence_of_sequences_is_unbiased() -> None:
    """Over all pairs of tokens, weighed by their probabilities: the exact KL of two-token sequences."""
    policy, start = two_models()
    first = torch.arange(VOCAB)
    ids = torch.stack([torch.full((VOCAB,), 5), first, torch.zeros_like(first)], 1)
    kl, _ = divergence(policy, start, Samples(ids, torch.ones_like(ids).bool(), 2, []))
    p, q = (m(ids[:, :2]).logits.double().log_softmax(-1) for m in (policy, start))
    both_p = p[0, 0][:, None] + p[:, 1]
    exact = (both_p.exp() * (both_p - q[0, 0][:, None] - q[:, 1])).sum()
    assert float((p[0, 0].exp() * kl.double()).sum()) == pytest.approx(float(exact), rel=1e-4)


def test_expected_distinct_agrees_with_drawing() -> None:
    counts, samples, right = [6, 3, 2, 1, 1, 1, 1], 8, 0.7
    seen = [answer for answer, count in enumerate(counts) for _ in range(count)]
    rng = random.Random(0)
    drawn = [
        len(set(rng.sample(seen, sum(rng.random() < right for _ in range(samples))))) for _ in range(20000)
    ]
    assert expected_distinct(counts, samples, right) == pytest.approx(sum(drawn) / len(drawn), abs=0.03)
    assert expected_distinct([1] * 8, 8, 1.0) == pytest.approx(8)
    assert expected_distinct([], 8, 0.0) == 0


def test_the_optimum_is_the_start_weighed_by_its_rewards() -> None:
    """Of a question that the start gets right once in ten, and of one that it never does."""
    counts: dict[str, dict[str, int]] = {"a": {"stone": 60, "stair": 40}, "b": {}}
    by_beta = {found["beta"]: found for found in targets(counts, 1000, 64, (0.5,))}
    right = 0.1 * math.exp(2) / (0.9 + 0.1 * math.exp(2))
    found = by_beta[0.5]
    assert found["reward"] == pytest.approx(right / 2)
    kl = right * math.log(right / 0.1) + (1 - right) * math.log((1 - right) / 0.9)
    assert found["kl"] == pytest.approx(kl / 2)
    assert found["pass@8"] == pytest.approx((1 - (1 - right) ** 8) / 2)
    assert found["pass@64"] > found["pass@8"]
    assert found["distinct"] == pytest.approx(1.0, abs=1e-3)  # both words, and none


def test_rows_say_how_far_they_are_from_the_optimum() -> None:
    def of(arm: str, seed: int, setting: dict, **metrics: float) -> Record:
        return Record(arm, "times", setting, seed, metrics)

    setting = {"beta": 0.1, "lr": 1e-5}
    found = [
        of("start", 900, {"updates": 0, "source": "policy"}, reward=0.2, kl=0.0, distinct=2.0),
        of("optimum", 900, {"beta": 10.0}, reward=0.2, kl=0.0, distinct=2.0),
        of("optimum", 900, {"beta": 0.1}, reward=1.0, kl=1.6, distinct=10.0),
        *(
            of("gvpo", seed, setting | {"updates": 10, "source": "policy"}, reward=0.3, kl=0.4, distinct=3.0)
            for seed in (20, 21)
        ),
        *(
            of("gvpo", seed, setting | {"updates": 20, "source": "policy"}, reward=0.6, kl=1.2, distinct=4.5)
            for seed in (20, 21)
        ),
        of("gvpo", 900, setting | {"updates": 20, "source": "policy"}, reward=0.0, kl=9.0, distinct=0.0),
    ]
    found.append(Record("start", "without runs", {"updates": 0, "source": "policy"}, 900, found[0].metrics))
    assert list(summary(found, [20, 21])) == ["times"]
    here = summary(found, [20, 21])["times"]
    (row,) = here["rows"]
    assert (row["reward"]["mean"], row["tried"]) == (0.6, 1)
    assert row["gap"]["mean"] == pytest.approx(0.2)  # 0.8 is the best at 1.2 nats
    assert row["kept"]["mean"] == pytest.approx(0.75)  # 6 of which the optimum gives at 0.6
    assert [point["updates"] for point in row["course"]] == [10, 20]
    (tried,) = here["tuning"]
    assert (tried["arm"], tried["condition"], tried["kl"]) == (row["arm"], f"rate {setting['lr']:g}", 9.0)
