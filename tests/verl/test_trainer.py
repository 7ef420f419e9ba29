"""Whole runs of verl 0.9 on CPUs: every update is that of the formula, whatever computes it."""

import json
from pathlib import Path

import pytest
import torch

from tests.verl.harness import arguments, make_assets, replay, run
from tests.verl.records import updates

pytestmark = pytest.mark.slow

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
UNEVEN = [  # mini-batches of 2, 2 and 1 prompts, and sessions of several turns and no row, one or two
    "data.train_batch_size=5",
    "data.max_response_length=20",
    f"{ROLLOUT}.multi_turn.format=plus",
    f"{ROLLOUT}.multi_turn.max_parallel_calls=2",
    f"{ROLLOUT}.multi_turn.function_tool_path={Path(__file__).with_name('tools.py')}",
    f"{ROLLOUT}.agent.default_agent_loop=rewriting",
    f"{ROLLOUT}.agent.agent_loop_config_path={Path(__file__).with_name('agents.yaml')}",
]
DYNAMIC = [
    f"{ACTOR}.use_dynamic_bsz=True",
    f"{ACTOR}.ppo_max_token_len_per_gpu=128",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu=128",
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def two_workers(assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    metrics = output / "metrics.jsonl"
    extra = [
        *UNEVEN,
        "trainer.logger=[file]",
        *(f"trainer.{name}=3" for name in ("total_training_steps", "save_freq", "test_freq")),
        # The second mini-batch of the third step cannot be used.
        "+reward.custom_reward_function.reward_kwargs.infinite=12",
    ]
    run(arguments(assets, output, *extra), output, VERL_FILE_LOGGER_PATH=str(metrics))
    incidents = updates(output / "checkpoints" / "incidents")
    logged = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    return updates(output / "updates"), logged, incidents


@pytest.fixture(scope="module")
def one_worker(assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    run(arguments(assets, output, *UNEVEN, *DYNAMIC, workers=1), output)
    return updates(output / "updates")


def assert_exact(assets, dumps, **how):
    done = replay(assets, dumps, beta=0.3, lr=0.05, **how)
    for update in done:
        metrics = update.dump["metrics"]
        assert metrics["gvpo/loss"] == pytest.approx(update.loss, rel=1e-3)
        assert metrics["actor/grad_norm"] == pytest.approx(update.gradient_norm, rel=1e-3)
    return done


@pytest.mark.timeout(400)
def test_updates_of_two_workers_are_those_of_the_formula_however_ragged(assets, two_workers):
    """In one environment with TRL: docs/upstream/verl-beside-trl.md."""
    dumps, *_ = two_workers
    done = assert_exact(assets, dumps)
    sizes = [update.groups for update in done]
    assert [len(groups) for groups in sizes] == [2, 2, 1] * 2 + [2, 1]
    assert any(group < 4 for groups in sizes for group in groups)
    assert any(len(update.dump["sessions"]) > len(set(update.dump["sessions"])) for update in done)
    # Later updates of a step are not where the policy is the reference: there the groups' means matter.
    assert all(abs(update.dump["metrics"]["gvpo/kl"]) > 1e-3 for update in done[1:3])
    lengths = [len(row) for update in done for row in update.dump["responses"]]
    assert len(set(lengths)) > 3
    # What tools answered stands among the model's own tokens, and is none of them.
    masks = ["".join(map(str, row.tolist())) for update in done for row in update.dump["response_mask"]]
    assert sum("01" in mask for mask in masks) > 5


def test_a_group_of_equal_rewards_takes_no_part_in_the_first_update(two_workers):
    dumps, *_ = two_workers
    assert dumps[0]["metrics"]["gvpo/rows_left_out"] == 0.5
    assert dumps[1]["metrics"]["gvpo/rows_left_out"] == 0


def test_verl_logs_the_diagnostics_and_counts_its_passes(two_workers):
    _, logged, _ = two_workers
    assert [entry["gvpo/updates"] for entry in logged] == [3, 3, 2]
    assert [entry["gvpo/steps_skipped"] for entry in logged] == [0, 0, 1]
    for entry in logged:
        assert entry["gvpo/scoring_passes"] == 2
        halves = entry["gvpo/implicit_reward_variance"] / 2 - entry["gvpo/covariance"]
        assert entry["gvpo/loss"] == pytest.approx(halves + entry["gvpo/reward_variance"] / 2)
        assert entry["critic/advantages/mean"] == pytest.approx(entry["critic/returns/mean"], nan_ok=True)
    assert any(name.startswith("val-core/toy/") for name in logged[-1])


def test_an_update_that_cannot_be_made_is_left_out_and_kept(two_workers):
    """That the updates after it are exact says that it changed nothing."""
    dumps, _, (incident,) = two_workers
    assert [dump["step"] for dump in dumps] == [1] * 3 + [2] * 3 + [3] * 2
    assert incident["step"] == 3
    assert incident["why"].startswith("rewards is inf")
    assert not set(incident["prompts"]) & {prompt for dump in dumps for prompt in dump["prompts"]}


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_one_worker_with_dynamic_batches_makes_the_same_updates_as_two_without(
    assets, two_workers, one_worker
):
    assert_exact(assets, one_worker)
    assert len(one_worker) == 6
    for one, two in zip(one_worker, two_workers[0][:6], strict=True):
        first, second = by_tokens(one), by_tokens(two)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)
        for name in ("gvpo/loss", "actor/grad_norm"):
            assert one["metrics"][name] == pytest.approx(two["metrics"][name], rel=1e-4)


def by_tokens(dump):
    """Weights under the names of their sequences; equal sequences have equal weights."""
    return {tuple(ids.tolist()): w for ids, w in zip(dump["input_ids"], dump["weights"], strict=True)}
