"""verl's asynchronous trainers: with stale rollouts, too, every update is that of the formula."""

import json

import pytest

from tests.verl.harness import arguments, make_assets, run
from tests.verl.records import updates
from tests.verl.test_trainer import assert_exact

pytestmark = pytest.mark.slow

V1, ROLLOUT = "trainer.v1", "actor_rollout_ref.rollout"
COLOCATE = [f"{V1}.trainer_mode=colocate_async"]
SEPARATE = [f"{V1}.trainer_mode=separate_async", f"{V1}.separate_async.parameter_sync_step=2"]


def train(folder, *extra, steps=4, workers=1):
    """Rollouts of four prompts a step, one step in advance, that take longer than an update."""
    assets = make_assets(folder / "assets")
    metrics = folder / "metrics.jsonl"
    words = [
        *("trainer.logger=[file]", f"trainer.total_training_steps={steps}"),
        f"{ROLLOUT}.max_num_seqs=6",  # one group and half of another at a time
        *extra,
    ]
    environment = {"VERL_FILE_LOGGER_PATH": str(metrics), "VERL_USE_EXTERNAL_MODULES": "tests.verl.unhurried"}
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
    assert any(len({oldest for oldest, *_ in rows}) > 1 for rows in every)
    assert any(oldest != newest for rows in every for oldest, newest, _ in rows)


def assert_measured_against_the_oldest_that_is_kept(dumps, keep):
    for dump in dumps:
        newest = dump["step"] - 1
        for rows in groups(dump).values():
            wanted = max(min(oldest for oldest, *_ in rows), newest - keep)
            assert {reference for *_, reference in rows} == {wanted}


@pytest.mark.timeout(300)
def test_colocated_updates_are_those_of_the_formula_for_groups_of_several_versions(tmp_path):
    assets, dumps, _ = train(tmp_path, *COLOCATE, "gvpo.keep_versions=1")
    assert_exact(assets, dumps)
    assert len(dumps) == 8
    assert_stale(dumps)
    assert_measured_against_the_oldest_that_is_kept(dumps, keep=1)


@pytest.mark.timeout(300)
def test_separate_updates_are_those_of_the_formula_while_the_policy_moves_between_syncs(tmp_path):
    """Without servers on the trainer's own GPUs: docs/upstream/verl-async.md."""
    assets, dumps, _ = train(tmp_path, *SEPARATE)
    assert_exact(assets, dumps)
    assert len(dumps) == 8
    assert_stale(dumps)
    assert_measured_against_the_oldest_that_is_kept(dumps, keep=2)
