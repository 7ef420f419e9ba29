"""The loop that verl's adapters share: its updates are the formula's, and bad ones change nothing."""

import math
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gvpo.errors import InputError
from gvpo.verl.rollouts import Rollouts, weigh
from gvpo.verl.settings import Settings
from gvpo.verl.updates import Updates, _summarise, count_updates
from tests.test_objective import literal_loss
from tests.verl import records

BETA, LR, GROUP = 0.3, 0.5, 3


class Table:
    """Workers whose model is a table: S of a row is a parameter; plain gradient descent."""

    def __init__(self, prompts=4, seed=0):
        n = prompts * GROUP
        random = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.theta = random[0] - 20
        names = [f"p{i // GROUP}" for i in range(n)]
        self.rollouts = Rollouts(
            sessions=[(name, str(i)) for i, name in enumerate(names)],
            reference=random[1] - 20,
            start=self.theta.clone(),
            rewards=random[2],
            valid=torch.ones(n, dtype=torch.bool),
            ages=torch.zeros(n, dtype=torch.long),
        )
        self.prompts = {name: [i for i, p in enumerate(names) if p == name] for name in dict.fromkeys(names)}
        self.scored, self.bad_scores, self.bad_norms, self.calls = 0, set(), set(), 0

    def score(self, rows):
        self.scored += 1
        scores = self.theta[list(rows)].clone()
        if self.scored in self.bad_scores:
            scores[1] = math.nan
        return scores

    def update(self, rows, weights):
        self.calls += 1
        norm = math.nan if self.calls in self.bad_norms else weights.norm().item()
        if math.isfinite(norm):
            self.theta[list(rows)] += LR * weights
        return {"actor/grad_norm": norm, "actor/pg_loss": 7.0, "actor/lr": self.calls}

    def record(self, rows):
        return {
            "input_ids": [torch.arange(i + 3) for i in rows],
            "responses": [torch.arange(i + 1) for i in rows],
            "response_mask": [torch.ones(i + 1) for i in rows],
        }


def settings(folder, **changes):
    defaults = Settings(
        beta=BETA,
        reference="rollout",
        scale=1.0,
        mini_batch=2,
        epochs=2,
        shuffle=False,
        seed=0,
        row_multiple=1,
        incidents_dir=str(folder / "incidents"),
        warn_when=[],
        reference_every=None,
        keep_versions=2,
        leave_out_zero_weights=True,
        poll_seconds=None,
        watch_seconds=5,
        max_bad_steps=3,
        dump_dir=None,
    )
    return replace(defaults, **changes)


def descend(table, mini_batches, scale=1.0):
    """The same by autograd of the formula."""
    theta = table.rollouts.start.clone()
    for rows in mini_batches:
        leaf = theta[rows].requires_grad_()
        ids = torch.tensor([int(table.rollouts.prompts[i][1:]) for i in rows])
        rollouts = table.rollouts.take(rows)
        every = torch.ones(len(rows), dtype=torch.bool)
        literal_loss(leaf, rollouts.reference, rollouts.rewards, ids, BETA, every).backward()
        theta[rows] -= LR * scale * leaf.grad
    return theta


@hypothesis.settings(deadline=None)  # a busy machine is no error
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(1, 9))
def test_each_epoch_takes_each_prompt_once_in_mini_batches_of_the_size(n, size, epochs, shuffle, step):
    updates = Updates(settings(Path(), mini_batch=size, epochs=epochs, shuffle=shuffle))
    prompts = {f"p{i}": [2 * i, 2 * i + 1] for i in range(n)}
    batches = list(updates.mini_batches(prompts, step))
    per_epoch = -(-n // size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        taken = [row for batch in mine for row in batch]
        assert sorted(taken) == list(range(2 * n))
        assert shuffle or taken == list(range(2 * n))
        assert all(len(batch) == 2 * size for batch in mine[:-1])
        assert all(first + 1 == second for first, second in zip(taken[::2], taken[1::2], strict=True))
    assert batches == list(updates.mini_batches(prompts, step))


@pytest.mark.parametrize("changes", [{}, {"shuffle": True, "scale": 2.0}, {"mini_batch": 3, "epochs": 1}])
def test_the_updates_of_a_step_are_the_formulas(tmp_path, changes):
    table, how = Table(), settings(tmp_path, **changes)
    updates = Updates(how)
    metrics = updates.run(5, table.prompts, table)
    parts = list(updates.mini_batches(table.prompts, 5))
    torch.testing.assert_close(table.theta, descend(table, parts, how.scale), rtol=1e-12, atol=1e-12)
    assert metrics["gvpo/updates"] == len(parts)
    assert metrics["gvpo/scoring_passes"] == table.scored == len(parts) - 1
    assert metrics["gvpo/steps_skipped"] == 0
    assert metrics["actor/lr"] == len(parts)
    assert metrics["actor/loss"] == metrics["gvpo/loss"]
    assert "actor/pg_loss" not in metrics
    assert list(tmp_path.iterdir()) == []


def test_an_update_with_a_bad_log_probability_is_skipped_and_its_inputs_are_kept(tmp_path):
    table = Table()
    table.bad_scores = {2}  # of the third mini-batch
    updates = Updates(settings(tmp_path))
    with pytest.warns(UserWarning, match=r"step 7 is skipped: policy_logps is nan in row 1"):
        metrics = updates.run(7, table.prompts, table)
    first, second, third, fourth = updates.mini_batches(table.prompts, 7)
    torch.testing.assert_close(table.theta, descend(table, [first, second, fourth]), rtol=1e-12, atol=1e-12)
    assert (metrics["gvpo/updates"], metrics["gvpo/steps_skipped"]) == (3, 1)
    assert updates.bad_in_a_row == 0
    (kept,) = records.updates(tmp_path / "incidents")
    assert kept["why"] == "policy_logps is nan in row 1"
    assert kept["sessions"] == [table.rollouts.sessions[i] for i in third]
    assert kept["policy_logps"].isnan().tolist() == [False, True] + [False] * 4
    assert torch.equal(kept["rewards"], table.rollouts.rewards[third])
    assert [row.tolist() for row in kept["input_ids"]] == [list(range(i + 3)) for i in third]


def test_while_nothing_moved_the_policy_needs_no_scoring(tmp_path):
    table = Table()
    rewards = table.rollouts.rewards.clone()
    rewards[0] = math.inf
    table.rollouts = replace(table.rollouts, rewards=rewards)
    updates = Updates(settings(tmp_path, epochs=1))
    with pytest.warns(UserWarning, match="is skipped"):
        metrics = updates.run(1, table.prompts, table)
    assert (metrics["gvpo/updates"], metrics["gvpo/scoring_passes"], table.scored) == (1, 0, 0)


@pytest.mark.parametrize("known", [[], [0, 2, 7]])
def test_rows_whose_log_probability_is_not_known_yet_are_scored_alone(tmp_path, known):
    table, scored = Table(), []
    start = torch.full_like(table.rollouts.start, math.nan)
    start[known] = table.rollouts.start[known]
    table.rollouts = replace(table.rollouts, start=start)
    score = table.score
    table.score = lambda rows: scored.append(sorted(rows)) or score(rows)
    updates = Updates(settings(tmp_path, epochs=1))
    metrics = updates.run(1, table.prompts, table)
    first, second = updates.mini_batches(table.prompts, 1)
    assert scored == [sorted({*first} - {*known}), sorted(second)]  # the policy has moved before the second
    assert metrics["gvpo/scoring_passes"] == 2
    table.rollouts = replace(table.rollouts, start=Table().rollouts.start)
    torch.testing.assert_close(table.theta, descend(table, [first, second]), rtol=1e-12, atol=1e-12)


def test_kl_and_explained_variance_are_told_by_age(tmp_path):
    table = Table()
    ages = torch.tensor([0, 5, 7, 1]).repeat_interleave(GROUP)
    table.rollouts = replace(table.rollouts, ages=ages)
    metrics = Updates(settings(tmp_path, epochs=1, mini_batch=4)).run(1, table.prompts, table)
    for age, groups in {0: ["p0"], 1: ["p3"], 4: ["p1", "p2"]}.items():
        rows = [row for group in groups for row in table.prompts[group]]
        only = table.rollouts.take(rows)
        kl = (only.start - only.reference).mean()
        assert metrics[f"gvpo/kl/age_{age}"] == pytest.approx(kl.item())
        expected = weigh(only, only.start, BETA)[1].metrics["explained_variance"]
        assert metrics[f"gvpo/explained_variance/age_{age}"] == pytest.approx(expected.item())
    assert sum(name.startswith("gvpo/kl/") for name in metrics) == 3


def test_a_gradient_that_is_not_finite_counts_as_skipped(tmp_path):
    """verl's workers leave the parameters alone then; the driver keeps the inputs and counts."""
    table = Table()
    table.bad_norms = {1}
    with pytest.warns(UserWarning, match="gradient's norm is nan"):
        metrics = Updates(settings(tmp_path)).run(1, table.prompts, table)
    assert (metrics["gvpo/updates"], metrics["gvpo/steps_skipped"]) == (3, 1)
    assert math.isfinite(metrics["actor/grad_norm"])
    assert metrics["gvpo/scoring_passes"] == 3


def test_too_many_in_a_row_stop_the_run_with_a_diagnosis(tmp_path):
    rewards = torch.full((12,), math.inf, dtype=torch.float64)
    bad, good = Table(), Table()
    bad.rollouts = replace(bad.rollouts, rewards=rewards)
    updates = Updates(settings(tmp_path, epochs=1))
    with pytest.warns(UserWarning, match="rewards is inf"):
        assert "actor/loss" not in updates.run(1, bad.prompts, bad)
    assert updates.bad_in_a_row == 2
    updates.run(2, good.prompts, good)
    with pytest.warns(UserWarning, match="is skipped"):
        updates.run(3, bad.prompts, bad)
    with pytest.raises(InputError, match=r"3 updates in a row, the last at step 4,.*optim\.lr.*incidents"):
        updates.run(4, bad.prompts, bad)
    assert [kept["step"] for kept in records.updates(tmp_path / "incidents")] == [1, 1, 3, 3, 4]
    assert torch.equal(bad.theta, bad.rollouts.start)


def test_inputs_that_cannot_be_kept_do_not_end_the_run(tmp_path):
    (tmp_path / "incidents").write_text("a file, where the folder would be")
    table = Table()
    table.bad_scores = {1}
    with pytest.warns(UserWarning, match="cannot be kept"):
        metrics = Updates(settings(tmp_path)).run(1, table.prompts, table)
    assert metrics["gvpo/steps_skipped"] == 1


def test_a_dump_holds_what_an_update_was_made_of(tmp_path):
    table = Table()
    updates = Updates(settings(tmp_path, dump_dir=str(tmp_path / "dump"), epochs=1, scale=4.0))
    updates.run(3, table.prompts, table)
    first, second = records.updates(tmp_path / "dump")
    rows = table.prompts["p0"] + table.prompts["p1"]
    assert first["prompts"] == [table.rollouts.prompts[i] for i in rows]
    assert torch.equal(first["policy_logps"], table.rollouts.start[rows])
    assert torch.equal(first["reference_logps"], table.rollouts.reference[rows])
    assert [len(row) for row in first["responses"]] == [i + 1 for i in rows]
    moved = table.rollouts.start[rows] + LR * 4 * first["weights"]  # the weights are the formula's, unscaled
    torch.testing.assert_close(table.theta[rows], moved)
    assert second["metrics"]["gvpo/loss"] == second["metrics"]["actor/loss"]


def test_a_value_that_an_update_does_not_have_is_left_out_of_the_mean():
    found = _summarise([{"a": 1.0, "actor/lr": 2.0}, {"a": 3.0, "b": math.nan, "actor/lr": 1.0}])
    assert found == {"a": 2.0, "actor/lr": 1.0}


def test_the_schedule_is_told_in_updates_megatron_s_too(tmp_path):
    optim = {
        "total_training_steps": -1,
        "lr_warmup_steps": 3,
        "lr_decay_steps": 50,
        "lr_wsd_decay_steps": None,
    }
    config = OmegaConf.create(
        {"data": {"train_batch_size": 5}, "actor_rollout_ref": {"actor": {"optim": optim}}}
    )
    count_updates(config, settings(tmp_path), rollouts=10)  # 2 epochs of mini-batches of 2, 2 and 1 prompts
    assert dict(config.actor_rollout_ref.actor.optim) == {
        "total_training_steps": 60,
        "lr_warmup_steps": 18,
        "lr_decay_steps": 300,
        "lr_wsd_decay_steps": None,
    }


def test_each_epoch_and_each_step_is_shuffled_anew():
    updates = Updates(settings(Path(), mini_batch=30, epochs=2, shuffle=True))
    prompts = {f"p{i}": [i] for i in range(30)}
    orders = [tuple(rows) for step in (1, 2) for rows in updates.mini_batches(prompts, step)]
    assert len(set(orders)) == 4
