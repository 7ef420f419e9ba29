"""Runs off policy are trained on the completions that they say, with the log-probabilities those had."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments.language.methods import METHODS, K, make_trainer
from experiments.language.sources import Logs, logged, rollout
from experiments.language.tasks import Task
from tests.models import tiny_model
from tests.trl.common import CHARACTERS, tokenizer

TASK = Task(
    "letters",
    tuple(CHARACTERS[:12]),
    4,
    lambda key: [key],
    lambda text, key: text[:1].isdigit(),
    tokens=4,
    line=True,
    demonstrations=lambda _, key: [f"{key}7"],
)


@pytest.fixture
def logs() -> Logs:
    torch.manual_seed(0)
    return logged(tiny_model(), tokenizer(), TASK)


def test_logs_have_the_tempered_log_probabilities_of_every_token(logs: Logs) -> None:
    model, words = tiny_model(), tokenizer()
    assert set(logs) == set(TASK.trained)
    assert {len(found) for found in logs.values()} == {32}
    for key, found in logs.items():
        prompt = words(TASK.prompt(words, key))["input_ids"]
        for one in found[:2]:
            ids = torch.tensor([prompt + one["ids"]])
            logps = (model(ids).logits[0, len(prompt) - 1 : -1] / 1.5).log_softmax(-1)
            expected = logps[torch.arange(len(one["ids"])), torch.tensor(one["ids"])]
            assert one["logps"] == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_logged_completion_comes_once_before_any_comes_twice(logs: Logs) -> None:
    random.seed(0)
    draw = rollout("logs", TASK, tokenizer(), logs)
    assert draw is not None
    key = TASK.trained[0]
    drawn = [draw([key] * K, None) for _ in range(8)]
    twice = Counter(tuple(ids) for part in drawn for ids in part["completion_ids"])
    assert twice == Counter({ids: 2 * n for ids, n in Counter(tuple(x["ids"]) for x in logs[key]).items()})
    of = {tuple(one["ids"]): one["logps"] for one in logs[key]}
    for ids, logps in zip(drawn[0]["completion_ids"], drawn[0]["logprobs"], strict=True):
        assert of[tuple(ids)] == pytest.approx(logps, abs=1e-3)


def test_the_weighted_ratio_is_to_the_sampler(logs: Logs, tmp_path: Path) -> None:
    trainers = {
        name: make_trainer(
            METHODS[name], tiny_model(), tokenizer(), TASK, strength=0.0, rate=1e-3, seed=0, updates=2,
            rows=16, output=tmp_path / name, source="logs", logs=logs,
        )
        for name in ("grpo", "grpo_weighted")
    }  # fmt: skip
    rows = [{"prompt": key, "key": key} for key in TASK.trained[:2] for _ in range(K)]
    batches = {}
    for name, trainer in trainers.items():
        random.seed(0)
        batches[name] = trainer._generate_and_score_completions(rows)
    plain, weighted = batches["grpo"], batches["grpo_weighted"]
    assert torch.equal(plain["completion_ids"], weighted["completion_ids"])
    there = weighted["completion_mask"].bool()
    assert torch.equal(weighted["old_per_token_logps"], weighted["sampling_per_token_logps"])
    apart = (plain["old_per_token_logps"] - weighted["old_per_token_logps"])[there].abs()
    assert apart.max() > 0.01  # of temperature 1.5, and the policy's own


def test_a_quarter_are_demonstrations_and_the_rest_the_policys(tmp_path: Path) -> None:
    trainer = make_trainer(
        METHODS["gvpo"], tiny_model(), tokenizer(), TASK, strength=0.1, rate=1e-3, seed=0, updates=2,
        rows=16, output=tmp_path, source="demonstrations",
    )  # fmt: skip
    prompts = [key for key in TASK.trained[:2] for _ in range(K)]
    torch.manual_seed(0)
    out = trainer.rollout_func(prompts, trainer)
    texts = trainer.processing_class.batch_decode(out["completion_ids"])
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert (text == f"{prompt}7") is (row % 4 == 0)
