"""Replay and demonstrations on verl: stored groups are rows of TransferQueue, and updates the formula's."""

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

import gvpo.verl
from gvpo.data.logs import Logs
from gvpo.data.writer import write_logs
from gvpo.errors import InputError
from gvpo.replay import ReplayView
from gvpo.replay.options import OffPolicyConfig
from gvpo.replay.tokens import Encoder
from gvpo.verl.queued import Queued
from gvpo.verl.rollouts import Rollouts
from gvpo.verl.settings import check, prepare
from gvpo.verl.updates import REPLAYED, Updates
from tests.verl.harness import arguments, make_assets, run, start, stop
from tests.verl.records import updates
from tests.verl.test_recovery import steps as logged_steps
from tests.verl.test_recovery import wait_for
from tests.verl.test_settings import config
from tests.verl.test_trainer import assert_exact
from tests.verl.test_updates import settings

with warnings.catch_warnings():  # of engines that are not installed
    warnings.simplefilter("ignore")
    from gvpo.verl.offpolicy import Replay

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
AGENT = f"{ROLLOUT}.agent"


def with_logged(assets: Path) -> Path:
    """The prompts with one or two answers each that were logged, of which the second has no rating."""
    lines = []
    for i, row in enumerate(pq.read_table(assets / "prompts.parquet").to_pylist()):
        line = {"messages": row["prompt"], "truth": row["reward_model"]["ground_truth"]}
        lines.append({**line, "response": f"{i}", "rating": 90})
        lines += [{**line, "response": f"{i}+{i}"}] * (i % 2)
    (assets / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = Logs(scale=(0, 100), answer="truth", rewards="both")
    write_logs([assets / "log.jsonl"], assets / "logged", reader)
    return assets / "logged" / "train.parquet"


def with_versions(dumps):
    """The dumps, replayed rows with the version that the same tokens were measured against when fresh."""
    seen = {}
    for dump in dumps:
        names = zip(dump["prompts"], dump["input_ids"], dump["reference_versions"].tolist(), strict=True)
        versions = []
        for name, ids, version in names:
            tokens = tuple(ids.tolist())
            if not name.startswith(REPLAYED):
                seen[tokens] = version
            versions.append(seen[tokens])
        assert version == -1 or not name.startswith(REPLAYED)
        dump["reference_versions"] = torch.tensor(versions, dtype=torch.float64)
    return dumps


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_replayed_groups_and_demonstrations_are_weighed_by_the_formula(tmp_path):
    assets = make_assets(tmp_path / "assets")
    metrics = tmp_path / "metrics.jsonl"
    words = [
        f"data.train_files={with_logged(assets)}",
        "trainer.logger=[file]",
        "trainer.total_training_steps=3",
        "gvpo.replay_ratio=0.5",
        "gvpo.demonstrations_per_group=2",
        "gvpo.demonstration_column=logged",
    ]
    run(arguments(assets, tmp_path, *words, workers=1), tmp_path, VERL_FILE_LOGGER_PATH=str(metrics))
    dumps = with_versions(updates(tmp_path / "updates"))
    done = assert_exact(assets, dumps)
    # Two updates of a step, one of its two replayed groups each, from the second step on.
    names = [dict.fromkeys(update.dump["prompts"]) for update in done]
    assert [sum(name.startswith(REPLAYED) for name in each) for each in names] == [0, 0, 1, 1, 1, 1]
    ages = [u.dump["step"] - 1 - v for u in done for v in u.dump["reference_versions"].tolist()]
    assert max(ages) > 0
    logged = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    assert [entry["replay/size"] for entry in logged] == [0, 4, 8]
    assert [entry["demonstrations/rows"] for entry in logged] == [6, 6, 6]
    with ReplayView(tmp_path / "checkpoints" / "replay") as view:
        groups = view.read(range(len(view)))
    assert [group.metadata["demonstrations"] for group in groups] == [[2], [2, 3]] * 6
    # A logged answer's reward is its rating, else the reward function's.
    assert [group.rewards[2] for group in groups] == pytest.approx([0.9] * 12)
    assert all(group.rewards[3] != pytest.approx(0.9) for group in groups)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_demonstrations_teach_random_weights_what_they_never_sample(tmp_path):
    """To copy a number; 24 prompts, six updates a step."""
    assets = make_assets(tmp_path / "assets")
    rows = pq.read_table(assets / "prompts.parquet").to_pylist()
    rows = [{**row, "demonstrations": [row["reward_model"]["ground_truth"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), assets / "shown.parquet")
    words = [
        f"data.train_files={assets / 'shown.parquet'}",
        f"reward.custom_reward_function.path={Path(gvpo.verl.__file__).with_name('reward.py')}",
        "reward.custom_reward_function.name=exact",
        *("data.train_batch_size=24", f"{ACTOR}.ppo_mini_batch_size=4", "data.max_response_length=4"),
        *(f"{ACTOR}.optim.optimizer=Adam", f"{ACTOR}.optim.lr=0.01", "trainer.logger=[file]"),
        *(f"{ACTOR}.ppo_micro_batch_size_per_gpu=16", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=16"),
    ]
    found = {}
    for shown, steps in ((0, 8), (1, 40)):
        folder = tmp_path / str(shown)
        extra = [f"gvpo.demonstrations_per_group={shown}", f"trainer.total_training_steps={steps}"]
        metrics = folder / "metrics.jsonl"
        run(arguments(assets, folder, *words, *extra, workers=1), folder, VERL_FILE_LOGGER_PATH=str(metrics))
        found[shown] = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    assert np.mean([entry["critic/score/mean"] for entry in found[0]]) < 0.03
    sampled = [entry["demonstrations/sampled_reward"] for entry in found[1]]
    assert np.mean(sampled[:3]) < 0.03
    assert np.mean(sampled[-5:]) > 0.3


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mode", "reference"),
    [("sync", "rollout"), ("colocate_async", "rollout"), ("separate_async", "initial")],
)
def test_kill_9_of_the_driver_loses_no_group_and_trains_none_twice(tmp_path, mode, reference):
    """With the initial reference, replayed groups are scored anew."""
    assets, steps = make_assets(tmp_path / "assets"), 6
    metrics, home = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    words = [
        f"data.train_files={with_logged(assets)}",
        *(f"trainer.v1.trainer_mode={mode}", "trainer.v1.separate_async.parameter_sync_step=2"),
        f"gvpo.reference={reference}",
        f"gvpo.replay_reference={'stored' if reference == 'rollout' else 'current'}",
        f"trainer.total_training_steps={steps}",
        *("trainer.logger=[file]", "trainer.save_freq=1", "trainer.resume_mode=auto"),
        *("gvpo.replay_ratio=0.5", "gvpo.demonstrations_per_group=1", "gvpo.demonstration_column=logged"),
    ]
    words = arguments(assets, tmp_path, *words, workers=1)
    process = start(words, tmp_path, VERL_FILE_LOGGER_PATH=str(metrics))
    try:
        wait_for(lambda: len(logged_steps(metrics)) >= 3, 300, "three steps")
    finally:
        stop(process)
    saved = int((home / "latest_checkpointed_iteration.txt").read_text())
    for file in (tmp_path / "updates").iterdir():
        if int(file.name.split("_")[1]) > saved:
            file.unlink()  # made after the checkpoint, and lost with the run
    metrics.unlink()
    run(words, tmp_path, VERL_FILE_LOGGER_PATH=str(metrics))
    dumps = with_versions(updates(tmp_path / "updates"))
    assert_exact(assets, dumps, reference=reference)
    fresh = [{n for n in dump["prompts"] if not n.startswith(REPLAYED)} for dump in dumps]
    assert sum(map(len, fresh)) == len(set.union(*fresh)) == 4 * steps
    replayed = [{n for n in dump["prompts"] if n.startswith(REPLAYED)} for dump in dumps]
    assert [len(names) for names in replayed] == [0, 0] + [1] * (len(dumps) - 2)
    with ReplayView(home / "replay") as view:
        kept = [group.token_ids.tobytes() for group in view.read(range(len(view)))]
    assert len(kept) == len(set(kept)) == 4 * steps


class Queue:
    """TransferQueue in this process, as far as replay asks for it."""

    def __init__(self):
        self.rows, self.tags = {}, {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for i, key in enumerate(keys):
            if fields is not None:
                self.rows.setdefault(key, {}).update({name: fields[name][i] for name in fields.keys()})  # noqa: SIM118
            if tags is not None:
                self.tags[key] = tags[i]

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        names = select_fields or self.rows[keys[0]]
        data = {name: [self.rows[key][name] for key in keys] for name in names}
        jagged = {
            name: torch.nested.as_nested_tensor(values, layout=torch.jagged)
            for name, values in data.items()
            if isinstance(values[0], torch.Tensor)
        }
        if len(keys) == 1:
            return [{name: values[0] for name, values in data.items()}]
        return {**data, **jagged}


def row(prompt, response, mask, reward, **others):
    """A row as verl's agent loop leaves it."""
    scores = torch.zeros(len(response))
    scores[-1] = reward
    ids = torch.tensor([*prompt, *response])
    return {
        "prompts": torch.tensor(prompt),
        "responses": torch.tensor(response),
        "input_ids": ids,
        "position_ids": torch.arange(len(ids)),
        "response_mask": torch.tensor(mask),
        "loss_mask": torch.tensor(mask),
        "rm_scores": scores,
        "rollout_log_probs": torch.full((len(response),), -1.0),
        "uid": "x",
        "session_id": 0,
        "num_turns": 4,
        "data_source": "toy",
        "multi_modal_inputs": {},
        **others,
    }


class Tokens:
    eos_token_id = 2

    def get_vocab(self):
        return {str(i): i for i in range(50)}


@pytest.fixture
def queue(monkeypatch):
    found = Queue()
    monkeypatch.setattr("gvpo.verl.offpolicy.tq", found)
    return found


def driver(folder, **options):
    options = OffPolicyConfig(**{"replay_ratio": 1.0, **options})
    return Replay(options, folder, Encoder(Tokens(), vocabulary_size=50), seed=3, reference="rollout")


def step_of(queue, names, *, k=3, seed=0, version=0):
    """Fresh rows of a step in the queue, as `Queued` knows them, and the rows of each prompt."""
    random, keys, rewards, valid = np.random.default_rng(seed), [], [], []
    for name in names:
        prompt = random.integers(3, 50, size=random.integers(1, 6)).tolist()
        for session in range(k):
            response = random.integers(3, 50, size=random.integers(1, 7)).tolist()
            mask = [1, *random.integers(0, 2, size=len(response) - 1).tolist()]
            keys.append(f"{name}_{session}_0")
            rewards.append(float(np.float32(random.random())))
            valid.append(True)
            queue.rows[keys[-1]] = row(prompt, response, mask, rewards[-1])
    order = random.permutation(len(keys)).tolist()
    keys = [keys[i] for i in order]
    sessions = [(key.split("_")[0], key.split("_")[1]) for key in keys]
    numbers = torch.from_numpy(random.normal(-20, 5, len(keys)))
    rollouts = Rollouts(
        sessions=sessions,
        reference=numbers,
        start=numbers,
        rewards=torch.tensor([rewards[i] for i in order], dtype=torch.float64),
        valid=torch.tensor(valid),
        ages=torch.zeros(len(keys), dtype=torch.long),
    )
    tags = [{"min_global_steps": version, "max_global_steps": version, "seq_len": 3} for _ in keys]
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=tags)
    prompts = {name: [i for i, (p, _) in enumerate(sessions) if p == name] for name in names}
    queued = SimpleNamespace(batch=batch, rollouts=rollouts, references=dict.fromkeys(names, version))
    return queued, prompts


def test_what_is_kept_comes_back_token_for_token_with_its_reference(queue, tmp_path):
    buffer = driver(tmp_path)
    rows, prompts = step_of(queue, ["a", "b"])
    rows.rollouts.rewards[prompts["b"][0]] = math.nan  # one without a reward takes no part
    assert buffer.store(rows, prompts, 0, {"a": [2]}) == 0
    groups = buffer.take(2, 4)
    batch = buffer.join(rows.batch, groups, 4, updates=2)
    added = [i for i, tag in enumerate(batch.tags) if tag.get("is_replayed")]
    assert len(added) == 5
    assert batch.keys[:6] == rows.batch.keys
    fresh = {tuple(queue.rows[key]["input_ids"].tolist()): i for i, key in enumerate(rows.batch.keys)}
    for i in added:
        again, tag = queue.rows[batch.keys[i]], batch.tags[i]
        was = fresh.pop(tuple(again["input_ids"].tolist()))
        old = queue.rows[rows.batch.keys[was]]
        for name in ("prompts", "responses", "response_mask", "loss_mask", "rm_scores", "position_ids"):
            assert torch.equal(again[name], old[name]), name
        assert again.keys() == old.keys()
        assert tag["reference_logp"] == rows.rollouts.reference[was].item()
        assert tag["seq_len"] == len(again["input_ids"])
        assert (tag["age"], tag["min_global_steps"]) == (8, 4)
        assert again["uid"] == batch.keys[i].split("_")[0]
    assert list(fresh.values()) == [prompts["b"][0]]
    assert [group.metadata for group in buffer.take(2, 0) if group.metadata] == [{"demonstrations": [2]}]
    # What is replayed is not kept again.
    again, prompts = step_of(queue, ["c"])
    again.batch.tags[:] = [tag | {"is_replayed": True} for tag in again.batch.tags]
    buffer.store(again, prompts, 1, {})
    assert len(buffer.buffer) == 2
    buffer.buffer.close()


def test_scored_anew_rows_bring_no_reference(queue, tmp_path):
    with pytest.warns(UserWarning, match="re-anchors"):
        buffer = driver(tmp_path, replay_reference="current")
    rows, prompts = step_of(queue, ["a"])
    buffer.store(rows, prompts, 0, {})
    batch = buffer.join(rows.batch, buffer.take(1, 1), 1, updates=1)
    assert not any("reference_logp" in tag for tag in batch.tags)
    buffer.buffer.close()


def test_groups_that_teach_nothing_or_are_no_rows_each_are_not_kept(queue, tmp_path):
    buffer = driver(tmp_path)
    rows, prompts = step_of(queue, ["a", "b", "c", "d"])
    rows.rollouts.reference[prompts["a"][0]] = math.nan
    rows.rollouts.rewards[prompts["b"][:2]] = math.nan
    rows.rollouts.sessions[prompts["c"][0]] = rows.rollouts.sessions[prompts["c"][1]]  # two rows of one
    assert buffer.store(rows, prompts, 0, {}) == 1
    (group,) = buffer.take(9, 0)
    assert len(group) == 3
    queue.rows[rows.batch.keys[0]]["multi_modal_inputs"] = {"pixels": 1}
    with pytest.raises(InputError, match="does not go with images"):
        buffer.join(rows.batch, [group], 0, updates=1)
    buffer.buffer.close()


def test_draws_are_a_function_of_the_seed_and_go_on_after_a_crash(queue, tmp_path):
    """Resumed from the checkpoint, what is drawn, owed and kept is as if the run had never stopped."""

    def tokens(groups):
        return [group.token_ids.tolist() for group in groups]

    def steps(buffer, first, last):
        drawn = []
        for step in range(first, last):
            drawn.append(tokens(buffer.take(buffer.owed(2), step)))
            buffer.store(
                *step_of(queue, [f"p{2 * step}", f"p{2 * step + 1}"], seed=step, version=step), step, {}
            )
        return drawn

    one = driver(tmp_path / "one", replay_ratio=0.75)
    drawn = steps(one, 0, 6)
    assert [len(each) for each in drawn] == [0, 2, 1, 2, 1, 2]
    one.buffer.close()
    two = driver(tmp_path / "two", replay_ratio=0.75)
    assert steps(two, 0, 3) == drawn[:3]
    saved = tmp_path / "two" / "global_step_3" / "gvpo_replay"
    state = two.save(saved)
    steps(two, 3, 5)
    two.buffer.close()  # killed
    for after, size in (("keep", 10), ("rollback", 6)):
        again = driver(tmp_path / "two", replay_ratio=0.75, replay_after_crash=after)
        again.restore(state, saved)
        assert len(again.buffer) == size
        if after == "rollback":
            assert steps(again, 3, 6) == drawn[3:]
            kept = tokens(again.buffer.read(range(len(again.buffer))))
            assert len(set(map(str, kept))) == len(kept) == 12  # none lost, none twice
        again.buffer.close()


def test_a_row_s_own_reference_goes_before_what_the_workers_scored(queue, monkeypatch):
    """In float64, though every other number of a row is a float32."""
    rows, prompts = step_of(queue, ["a", f"{REPLAYED}0"])
    batch, own = rows.batch, -1234.5678901234567
    for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
        queue.rows[key]["old_log_probs"] = torch.full_like(queue.rows[key]["rm_scores"], -1.0)
        if i in prompts[f"{REPLAYED}0"]:
            tag |= {"reference_logp": own, "age": 5}
    monkeypatch.setattr("gvpo.verl.queued.tq", queue)
    trainer = SimpleNamespace(settings=SimpleNamespace(reference="rollout"))
    queued = Queued(trainer, batch, {}, {"a": 2}, {key for key in batch.keys if key[0] == "a"})
    counted = torch.stack([queue.rows[key]["response_mask"].sum() for key in batch.keys]).double()
    replayed = torch.tensor([key[0] != "a" for key in batch.keys])
    assert queued.rollouts.reference.tolist() == torch.where(replayed, own, -counted).tolist()
    assert queued.rollouts.start.isnan().tolist() == replayed.tolist()
    assert queued.rollouts.ages.tolist() == torch.where(replayed, 5, 2).tolist()


REFUSED = {
    "replay_ratio=-1 must be a number": ["gvpo.replay_ratio=-1"],
    "replay_max_age=half must be at least 1": ["gvpo.replay_max_age=half"],
    "replay_after_crash='hope' is unknown: use one of rollback, keep": ["gvpo.replay_after_crash=hope"],
    "demonstrations_per_group=5 does not fit into groups of 4 responses": ["gvpo.demonstrations_per_group=5"],
    "does not go with actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent": [
        "gvpo.demonstrations_per_group=1",
        f"{AGENT}.default_agent_loop=tool_agent",
    ],
    "does not go with reward.reward_model.enable=True: answers must be rewarded as they come": [
        "gvpo.demonstrations_per_group=1",
        "reward.reward_model.enable=True",
    ],
    "gvpo.offline is no setting": ["+gvpo.offline=x.parquet"],
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_cannot_be_is_refused_before_ray_starts(message):
    with pytest.raises(InputError, match=re.escape(message)):
        check(config(*REFUSED[message]))


def test_demonstrations_have_an_agent_of_their_own():
    given = config("gvpo.demonstrations_per_group=1")
    check(given)
    prepare(given)
    agent = given.actor_rollout_ref.rollout.agent
    (entry,) = OmegaConf.load(agent.agent_loop_config_path)
    assert (entry.name, entry._target_) == (agent.default_agent_loop, "gvpo.verl.agents.DemonstratingAgent")


@hypothesis.settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_each_mini_batch_takes_its_share_of_replayed_groups(fresh, replayed, size, epochs, shuffle):
    plain = replace(settings(Path()), mini_batch=size, epochs=epochs, shuffle=shuffle)
    prompts = {f"{REPLAYED}{i:03d}": [100 + i] for i in range(replayed)} | {
        f"p{i}": [i] for i in range(fresh)
    }
    batches = list(Updates(plain).mini_batches(prompts, 1))
    parts = -(-fresh // size)
    assert len(batches) == parts * epochs
    for epoch in range(epochs):
        mine = batches[epoch * parts : (epoch + 1) * parts]
        assert sorted(row for batch in mine for row in batch) == sorted(
            r for rows in prompts.values() for r in rows
        )
        shares = [sum(row >= 100 for row in batch) for batch in mine]
        assert max(shares) - min(shares) <= 1
    without = list(Updates(plain).mini_batches({n: r for n, r in prompts.items() if r[0] < 100}, 1))
    assert [[row for row in batch if row < 100] for batch in batches] == without
