"""verl's asynchronous trainers: with stale rollouts, too, every update is that of the formula."""

import json

import pytest
import torch

from tests.verl.harness import arguments, make_assets, run
from tests.verl.records import updates
from tests.verl.test_trainer import DYNAMIC, assert_exact, by_tokens

pytestmark = pytest.mark.slow

V1, ROLLOUT = "trainer.v1", "actor_rollout_ref.rollout"
COLOCATE = [f"{V1}.trainer_mode=colocate_async"]
SEPARATE = [f"{V1}.trainer_mode=separate_async", f"{V1}.separate_async.parameter_sync_step=2"]


def train(folder, *extra, steps=4, workers=1, pace="tests.verl.unhurried"):
    """Rollouts of four prompts a step, one step in advance, that take longer than an update."""
    assets = folder / "assets"
    if not assets.exists():
        make_assets(assets)
    metrics = folder / "metrics.jsonl"
    words = [
        *("trainer.logger=[file]", f"trainer.total_training_steps={steps}"),
        f"{ROLLOUT}.max_num_seqs=6",  # one group and half of another at a time
        *extra,
    ]
    environment = {"VERL_FILE_LOGGER_PATH": str(metrics), "VERL_USE_EXTERNAL_MODULES": pace}
    run(arguments(assets, folder, *words, workers=workers), folder, **environment)
    logged = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    return assets, updates(folder / "updates"), logged


def groups(dump):
    """The versions that began and ended each response, and that it is measured against, by prompt."""
    found = {}
    columns = (dump[f"{name}_versions"].long().tolist() for name in ("oldest", "newest", "reference"))
    for prompt, *versions in zip(dump["prompts"], *columns, strict=True):
        found.setdefault(prompt, []).append(versions)
    return found


def assert_stale(dumps):
    """Else the run proves nothing: a group of several versions, and a response that an update interrupted."""
    every = [rows for dump in dumps for rows in groups(dump).values()]
    assert any(len({(oldest, newest) for oldest, newest, _ in rows}) > 1 for rows in every)
    assert any(oldest != newest for rows in every for oldest, newest, _ in rows)


def assert_measured_against_the_oldest_that_is_kept(dumps, keep):
    for dump in dumps:
        newest = dump["step"] - 1
        for rows in groups(dump).values():
            wanted = max(min(oldest for oldest, *_ in rows), newest - keep)
            assert {reference for *_, reference in rows} == {wanted}


@pytest.mark.timeout(400)
def test_colocated_updates_are_those_of_the_formula_for_groups_of_several_versions(tmp_path):
    """With micro-batches of as many tokens, whatever rows those are."""
    assets, dumps, _ = train(tmp_path, *COLOCATE, *DYNAMIC, "gvpo.keep_versions=1")
    assert_exact(assets, dumps)
    assert len(dumps) == 8
    assert_stale(dumps)
    assert_measured_against_the_oldest_that_is_kept(dumps, keep=1)


@pytest.mark.timeout(400)
def test_separate_updates_are_those_of_the_formula_while_the_policy_moves_between_syncs(tmp_path):
    """Without servers on the trainer's own GPUs: docs/upstream/verl-async.md."""
    assets, dumps, _ = train(tmp_path, *SEPARATE)
    assert_exact(assets, dumps)
    assert len(dumps) == 8
    assert_stale(dumps)
    assert_measured_against_the_oldest_that_is_kept(dumps, keep=2)


@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", [COLOCATE, SEPARATE], ids=["colocate", "separate"])
def test_the_initial_reference_needs_no_old_policy(tmp_path, mode):
    """With two workers, whose rows are filled up for each pass."""
    extra = [
        "gvpo.reference=initial",
        "data.train_batch_size=6",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
    ]
    assets, dumps, logged = train(tmp_path, *mode, *extra, f"{ROLLOUT}.n=5", workers=2)
    assert_exact(assets, dumps, reference="initial")
    assert_stale(dumps)
    seconds = {name: sum(entry[f"timing_s/{name}"] for entry in logged) for name in ("old_log_prob", "ref")}
    assert seconds["old_log_prob"] < seconds["ref"] / 3  # no pass, however small
    for entry in logged:
        assert (entry["gvpo/updates"], entry["gvpo/scoring_passes"]) == (2, 2)
        assert entry["actor/entropy"] > 0
        assert not any(name.startswith("rollout_corr/") for name in entry)
    assert max(entry["staleness/age_max"] for entry in logged) >= 2
    assert 0 < max(entry["staleness/spanning_rows"] for entry in logged) <= 1
    assert any(name.startswith("gvpo/kl/age_") for name in logged[-1])


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_moving_reference_stays_between_its_moves_and_through_resuming(tmp_path):
    moving = ["gvpo.reference=moving", "gvpo.reference_every=6"]  # three steps of two updates
    kept = ["trainer.save_freq=1", "trainer.resume_mode=auto"]
    for steps in (2, 4):
        assets, dumps, logged = train(tmp_path, *moving, *kept, steps=steps, workers=2, pace="")
    assert_exact(assets, dumps)
    references = [set(dump["reference_versions"].tolist()) for dump in dumps]
    assert references == [{0}] * 6 + [{3}] * 2
    assert [entry["staleness/reference_age"] for entry in logged] == [4, 0]  # of the resumed steps


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_groups_in_flight_keep_the_moving_reference_of_their_time(tmp_path):
    moving = ["gvpo.reference=moving", "gvpo.reference_every=4"]
    assets, dumps, _ = train(tmp_path, *SEPARATE, *moving, steps=6)
    assert_exact(assets, dumps)
    assert_stale(dumps)
    several = False
    for dump in dumps:
        wanted = {min(oldest for oldest, *_ in rows) // 2 * 2 for rows in groups(dump).values()}
        assert wanted == {reference for rows in groups(dump).values() for *_, reference in rows}
        several |= len(wanted) > 1
    assert several


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_without_a_lag_the_separate_trainer_makes_the_synchronous_updates(tmp_path):
    common = ["actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_epochs=2"]
    separate = [
        *SEPARATE,
        f"{V1}.separate_async.parameter_sync_step=1",
        f"{V1}.separate_async.num_warmup_batches=0",
    ]
    _, synchronous, _ = train(tmp_path / "sync", *common, steps=3, pace="")
    _, asynchronous, _ = train(tmp_path / "separate", *common, *separate, steps=3, pace="")
    assert len(synchronous) == len(asynchronous) == 6
    for one, other in zip(synchronous, asynchronous, strict=True):
        first, second = by_tokens(one), by_tokens(other)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)
        for name in ("gvpo/loss", "actor/grad_norm"):
            assert one["metrics"][name] == pytest.approx(other["metrics"][name], rel=1e-4)
