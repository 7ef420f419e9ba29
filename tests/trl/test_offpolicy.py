"""Replay, demonstrations and logged completions in `GVPOTrainer`: every update is the formula's."""

import copy
import json
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from gvpo.data import load_prompts
from gvpo.data.logs import Logs
from gvpo.data.writer import write_logs
from gvpo.errors import InputError
from gvpo.replay import Group, ReplayBuffer, ReplayView
from gvpo.replay.tokens import fingerprint
from gvpo.step import GVPOStep
from gvpo.trl import GVPOTrainer
from tests.gloo import run_ranks
from tests.models import gradients, literal_logps, relative_error, tiny_model
from tests.test_objective import literal_loss
from tests.trl.common import config, dataset, digit_reward, distance, parameters, tokenizer


def demonstrated(n=64):
    """Prompts with none, one or two demonstrations."""
    prompts = dataset(n)["prompt"]
    answers = [[] if i % 4 == 0 else [p[::-1], p[:1] * 3][: 1 + i % 2] for i, p in enumerate(prompts)]
    return Dataset.from_dict({"prompt": prompts, "demonstrations": answers})


def logged_rows(n=64, scored=False):
    """Logged groups of two to four completions."""
    rows = []
    for i, prompt in enumerate(dataset(n)["prompt"]):
        answers = [prompt[:1], prompt[::-1], "7" * (1 + i % 5), prompt + "a"][: 2 + i % 3]
        row = {
            "prompt": prompt,
            "completions": answers,
            "rewards": [(j * 7 + i) % 5 / 4 for j in range(len(answers))],
        }
        if scored:
            row |= {
                "reference": "logger",
                "reference_logps": [-3.0 * len(a) - j for j, a in enumerate(answers)],
            }
        rows.append(row)
    return rows


def write(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "logged.parquet")
    return str(folder / "logged.parquet")


class SeenStep(GVPOStep):
    def __call__(self, batch):
        self.seen = batch
        return super().__call__(batch)


class Recorded(GVPOTrainer):
    """Remembers the policy of every step, and compares each update with literal autograd of the formula."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.errors, self.replayed, self.twins = [], [], {}
        self._gvpo_step.__class__ = SeenStep

    def twin(self):
        model = copy.deepcopy(tiny_model()).double()
        model.load_state_dict(self.accelerator.unwrap_model(self.model).state_dict())
        return model

    def training_step(self, *args, **kwargs):
        self.twins.setdefault(self.state.global_step, self.twin())
        return super().training_step(*args, **kwargs)

    def reference_of(self, batch, policy_steps):
        """S' literally: under the policy of the step that each row was sampled at, or the initial one."""
        logps = torch.zeros(len(batch), dtype=torch.float64)
        with torch.no_grad():
            for step in set(policy_steps):
                rows = torch.tensor([s == step for s in policy_steps])
                logps[rows] = literal_logps(self.twins[step], part_of(batch, rows))
        return logps

    def _update(self, model):
        window = list(self._window)
        out = super()._update(model)
        self.batch = self._gvpo_step.seen
        steps = [
            0 if self.args.reference == "initial" else s.policy_step
            for s in window
            for _ in range(len(s.batch))
        ]
        for group in self.drawn:
            step = 0 if self.args.reference == "initial" else group.policy_step
            now = self.args.replay_reference == "current" and self.args.reference == "rollout"
            steps += [self.state.global_step if now else step] * len(group)
        reference = self.batch.reference_logps if self.stored_logs else self.reference_of(self.batch, steps)
        self.compare(reference, out.item())
        return out

    stored_logs = False
    drawn = ()

    def compare(self, reference, loss):
        rows = {name: getattr(self.batch, name) for name in ("input_ids", "lengths", "completion_mask")}
        rows |= {"rewards": self.batch.rewards.double(), "group_ids": self.batch.group_ids}
        rows |= {"valid": self.batch.valid, "reference": reference}
        everyone = [rows]
        if self.accelerator.num_processes > 1:
            everyone = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(everyone, rows)
        twin = self.twin()
        policy = torch.cat([literal_logps(twin, Rows(r)) for r in everyone])
        joined = [
            torch.cat([r[name] for r in everyone]) for name in ("reference", "rewards", "group_ids", "valid")
        ]
        expected = literal_loss(policy, *joined[:3], self.args.beta, joined[3])
        expected.backward()
        got = gradients(self.accelerator.unwrap_model(self.model))
        self.errors += [relative_error(got, gradients(twin)), abs(loss / expected.item() - 1)]


class Rows:
    def __init__(self, values):
        vars(self).update(values)


def part_of(batch, rows):
    return Rows({n: getattr(batch, n)[rows] for n in ("input_ids", "lengths", "completion_mask")})


def run(data=None, rewards=digit_reward, cls=Recorded, processing_class=None, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = cls(
            tiny_model(),
            rewards,
            config(**changes),
            train_dataset=data,
            processing_class=processing_class or tokenizer(),
        )
    if cls is Recorded:
        remember_draws(trainer)
    return trainer


def remember_draws(trainer):
    if trainer.replay is None:
        return
    buffer = trainer.replay.buffer
    sample = buffer.sample

    def remembered(*args, **kwargs):
        trainer.drawn = sample(*args, **kwargs)
        trainer.replayed.append([g.metadata.get("demonstrations") for g in trainer.drawn])
        return trainer.drawn

    buffer.sample = remembered


@pytest.mark.slow
@pytest.mark.parametrize("scored", [False, True])
def test_offline_updates_are_the_formula_s(scored, tmp_path):
    path = write(tmp_path, logged_rows(scored=scored))
    settings = {"reference": "rollout" if scored else "initial", "max_steps": 4}
    ends = []
    for shape in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16}):
        trainer = run(rewards=None, offline=path, micro_batch_tokens=50, **settings, **shape)
        trainer.stored_logs = scored
        trainer.train()
        assert max(trainer.errors) < 1e-5, trainer.errors
        ends.append(parameters(trainer))
        shown = {logp for item in trainer._buffered_inputs for logp in item.batch.reference_logps.tolist()}
        assert (shown <= {-3.0 * n - j for n in range(12) for j in range(4)}) is scored
    assert distance(*ends) < 1e-5


def spread(rank, world, path):
    errors = []
    for changes in (
        {"replay_ratio": 0.7},
        {
            "offline": path,
            "reference": "initial",
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
        },
    ):
        offline = "offline" in changes
        settings = {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "output_dir": f"{path}-{len(errors)}",
            **changes,
        }
        trainer = run(None if offline else demonstrated(), None if offline else digit_reward, **settings)
        trainer.train()
        errors.append(trainer.errors)
    with ReplayView(f"{path}-0/replay") as view:
        assert len(view.stores) == world
    return errors


@pytest.mark.slow
def test_two_processes_make_the_update_of_the_union(tmp_path):
    path = write(tmp_path, logged_rows())
    for errors in run_ranks(spread, 2, path):
        assert [len(e) for e in errors] == [8] * 2
        assert max(map(max, errors)) < 1e-5, errors


@pytest.mark.slow
def test_resuming_is_as_if_never_stopped(tmp_path):
    """Replayed groups and their order come back, mid-generation, and after the run went on beyond."""
    settings = {
        "cls": GVPOTrainer,
        "data": demonstrated(),
        "replay_ratio": 0.7,
        "replay_capacity": 30,
        "steps_per_generation": 8,
        "demonstrations_per_group": 1,
        "max_steps": 7,
        "output_dir": str(tmp_path),
        "save_strategy": "steps",
        "save_steps": 3,
    }
    straight = run(**settings)
    straight.train()
    straight.replay.buffer.close()  # as the end of the process would
    assert straight.state.log_history[-2]["replay/size"] == 30
    for step, home in ((6, tmp_path), (3, tmp_path / "elsewhere")):
        again = run(**{**settings, "output_dir": str(home)})
        assert len(again.replay.buffer) == (30 if home == tmp_path else 0)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert distance(parameters(again), parameters(straight)) == 0
        for name in ("replay/size", "replay/age_mean", "replay/size_age_mean", "loss"):
            assert again.state.log_history[-2][name] == straight.state.log_history[-2][name]
        again.replay.buffer.close()
    # A run of its own begins with nothing of the last one.
    fresh = run(**{**settings, "max_steps": 1, "save_strategy": "no"})
    fresh.train()
    assert fresh.state.log_history[0]["replay/groups"] == 0
    fresh.replay.buffer.close()


@pytest.mark.filterwarnings("ignore:Step . makes no update")
def test_truncated_groups_are_not_kept_for_replay():
    settings = {"replay_ratio": 1.0, "mask_truncated_completions": True, "max_completion_length": 1}
    trainer = run(dataset(), cls=GVPOTrainer, max_steps=3, **settings)
    trainer.train()
    buffer = trainer.replay.buffer
    assert len(buffer) < 24
    assert all(g.valid is None or g.valid.sum() > 1 for g in buffer.read(range(len(buffer))))


def test_groups_from_elsewhere_enter_by_the_replay_directory(tmp_path):
    """Say, of another model: scored under the initial policy, as a whole group."""
    folder = tmp_path / "foreign" / "rank-00000"
    foreign = [Group.of([5, 6], [[7, 8], [9], [10, 2], [11]], [1.0, 0.0, 0.5, 0.0], policy_step=10**6)] * 8
    with ReplayBuffer(folder, tokenizer=fingerprint(tokenizer())) as buffer:
        buffer.append(foreign)
    settings = {
        "data": dataset(),
        "replay_ratio": 1.0,
        "replay_directory": str(folder.parent),
        "max_steps": 2,
    }
    unscored = run(**settings)
    with pytest.raises(
        InputError, match="without reference log-probabilities: use replay_reference='current'"
    ):
        unscored.train()
    unscored.replay.buffer.close()
    trainer = run(**settings, replay_reference="current", reference="initial")
    trainer.train()
    assert len(trainer.replayed[0]) == 8
    assert trainer.state.log_history[0]["gvpo/groups"] == 16
    assert max(trainer.errors[:2]) < 1e-5
    trainer.replay.buffer.close()


def test_no_generation_for_demonstrations_only(monkeypatch):
    """Groups of given answers with given rewards: nothing is sampled but one row, which is thrown away."""
    answers = [["1", "22", "333", "4444"]] * 64
    data = Dataset.from_dict({"prompt": dataset()["prompt"], "demonstrations": answers})
    rows = []
    original = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda *a, **k: rows.append(len(k["input_ids"])) or original(*a, **k)
    )
    trainer = run(data, demonstrations_per_group=4, max_steps=2)
    trainer.train()
    assert rows == [1, 1]
    assert max(trainer.errors) < 1e-5
    assert trainer.state.log_history[0]["demonstrations/rows"] == 32


def test_logged_answers_join_groups_of_fresh_ones(tmp_path):
    """From a log to updates: each is the formula's, with the rating of the logged answer as its reward."""
    Path(tmp_path / "log.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}],
                    "rating": 1 + (i + j) % 5,
                }
            )
            + "\n"
            for i, prompt in enumerate(dataset(16)["prompt"])
            for j, text in enumerate(("7a7", "b")[: 1 + i % 2])
        )
    )
    write_logs([tmp_path / "log.jsonl"], tmp_path / "data", Logs(scale=(1, 5)))
    path = str(tmp_path / "data" / "train.parquet")
    data = load_prompts(path, keep=["logged"], columns={"answer": ""})
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = {"demonstrations_per_group": 1, "demonstration_column": "logged", "max_steps": 2}
    settings |= {"gradient_accumulation_steps": 2, "num_iterations": 2}

    def texts_reward(completions, **others):
        return digit_reward([c[0]["content"] for c in completions], **others)

    trainer = run(data, texts_reward, processing_class=chat, **settings)
    trainer.train()
    assert max(trainer.errors) < 1e-5, trainer.errors
    rated = {
        (row["prompt"][0]["content"] + answer["content"], answer["reward"])
        for row in data
        for answer in row["logged"]
    }
    batch = trainer.batch
    texts = chat.batch_decode([ids[:n] for ids, n in zip(batch.input_ids, batch.lengths, strict=True)], True)
    seen = list(zip(texts, batch.rewards.tolist(), strict=True))[3::4]
    assert len(seen) == 4
    assert set(seen) <= rated
    # What is logged may train without fresh answers, too.
    offline = run(
        rewards=None,
        offline=path,
        reference="initial",
        max_steps=1,
        num_generations=2,
        gradient_accumulation_steps=1,
        processing_class=chat,
    )
    offline.train()
    assert max(offline.errors) < 1e-5


BAD_SETTINGS = {
    "replay_ratio=-1 must be a number of at least 0": {"replay_ratio": -1},
    "replay_capacity=0 must be at least 1": {"replay_ratio": 1, "replay_capacity": 0},
    "replay_reference='new' is unknown": {"replay_reference": "new"},
    "replay_sampling='best' is unknown: use one of uniform": {"replay_sampling": "best"},
    "demonstrations_per_group=5 does not fit": {"demonstrations_per_group": 5},
    r"demonstration_slots=\[7\] must be 1 different slots": {
        "demonstrations_per_group": 1,
        "demonstration_slots": [7],
    },
    "offline trains on logged groups only": {"offline": "x.parquet", "replay_ratio": 1},
    "offline needs remove_unused_columns=False": {"offline": "x.parquet", "remove_unused_columns": True},
}


@pytest.mark.parametrize("message", list(BAD_SETTINGS))
def test_bad_settings_are_refused(message):
    with pytest.raises(InputError, match=message):
        config(**BAD_SETTINGS[message])


def test_bad_data_are_refused_before_training(tmp_path):
    path = write(tmp_path, logged_rows(10))
    short = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    for message, settings in {
        "needs reference='initial'": {"offline": path},
        "groups of up to 4 responses, but num_generations=2: set it to 4": {
            "offline": path,
            "num_generations": 2,
            **short,
        },
        "has 10 groups, fewer than the 16": {
            "offline": path,
            "reference": "initial",
            "per_device_train_batch_size": 16,
        },
        "it has 9 tokens, but max_completion_length is 5": {
            "offline": path,
            "reference": "initial",
            "max_completion_length": 5,
        },
        "is the training data: give no train_dataset": {"offline": path, "data": dataset()},
        "no column 'demonstrations' with demonstrations": {"data": dataset(), "demonstrations_per_group": 1},
        "demonstration 0 has 5 tokens, but max_completion_length is 3": {
            "data": demonstrated(),
            "demonstrations_per_group": 1,
            "max_completion_length": 3,
        },
    }.items():
        with pytest.raises(InputError, match=message):
            run(**{"data": None, "cls": GVPOTrainer, "rewards": digit_reward, **settings})
    unrated = run(
        demonstrated(),
        rewards=lambda completions, **_: [0.5 if len(c) > 8 else None for c in completions],
        demonstrations_per_group=1,
        cls=GVPOTrainer,
    )
    with pytest.raises(InputError, match=r"gave a demonstration no reward .* set demonstration_reward"):
        unrated.train()


def test_a_buffer_of_another_group_size_is_refused(tmp_path):
    settings = {"data": dataset(), "replay_ratio": 1.0, "replay_directory": str(tmp_path), "cls": GVPOTrainer}
    run(**settings).replay.buffer.close()
    with pytest.raises(InputError, match="holds groups of 4 responses, not of 8"):
        run(**settings, num_generations=8)


def test_re_anchoring_is_warned_about():
    with pytest.warns(UserWarning, match="re-anchors: .* accuracy ended between"):
        GVPOTrainer(
            tiny_model(),
            digit_reward,
            config(replay_ratio=1.0, replay_reference="current"),
            train_dataset=dataset(),
            processing_class=tokenizer(),
        )


def test_replayed_groups_that_are_owed_come_later():
    """2.5 for the 8 fresh groups of each step; nothing is there at the first."""
    trainer = run(dataset(), cls=GVPOTrainer, replay_ratio=0.3125, max_steps=5)
    trainer.train()
    assert [entry["replay/groups"] for entry in trainer.state.log_history[:5]] == [0, 3, 2, 3, 2]


def test_logged_rows_are_cut_among_processes_at_any_first_row(tmp_path):
    path = write(tmp_path, logged_rows())
    offline = run(rewards=None, offline=path, reference="initial").offline
    inputs = [row for row in offline.dataset(3) for _ in range(4)]
    whole, _ = offline.batch(inputs, 0, 5, torch.device("cpu"))
    parts = [offline.batch(inputs[a:b], a, 5, torch.device("cpu"))[0] for a, b in ((0, 2), (2, 7), (7, 12))]
    for name in ("lengths", "rewards", "group_ids", "valid"):
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(whole, name))
    assert whole.group_ids.tolist() == [5] * 4 + [6] * 4 + [7] * 4
    assert whole.valid.tolist() == [j < len(offline.groups[i]) for i in range(3) for j in range(4)]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("policy", ["drop_group", "drop_row"])
@pytest.mark.parametrize("given", [None, 2.0])
def test_failed_rewards_cost_what_they_should_beside_demonstrations(policy, given):
    """Where a demonstration has a reward of its own, a failure on it costs nothing but its group, if that."""

    def fails(completions, **_):
        if any(c.startswith(tuple("abcdefgh")) for c in completions):
            raise RuntimeError("no such letter")
        return digit_reward(completions)

    trainer = run(
        demonstrated(),
        fails,
        demonstrations_per_group=2,
        demonstration_reward=given,
        on_reward_error=policy,
        reward_error_tolerance=1.0,
        max_steps=1,
    )
    trainer.train()
    shown = torch.tensor([one is not None for one in trainer._given])
    failed = trainer._failed_rows
    assert (failed & shown).any()
    assert (failed & ~shown).any()
    if policy == "drop_group":
        lost = failed.view(-1, 4).any(1).repeat_interleave(4)
    else:
        lost = failed if given is None else failed & ~shown
    assert trainer.batch.valid.equal(~lost)


def test_ages_go_on_over_the_runs_that_share_a_directory(tmp_path):
    """Steps of a new run count from 0 again; its groups are the youngest all the same."""
    home = {"replay_ratio": 1.0, "replay_directory": str(tmp_path / "shared"), "replay_sampling": "recent"}
    folder = tmp_path / "shared" / "rank-00000"
    old = [
        Group.of(
            [5], [[7, 8], [9]] * 2, [1.0, 0] * 2, reference="a", reference_logps=[-9.0] * 4, policy_step=s
        )
        for s in (10**5 - 1, 10**5)
    ] * 4
    with ReplayBuffer(folder, tokenizer=fingerprint(tokenizer())) as buffer:
        buffer.append(old)
    trainer = run(
        dataset(),
        cls=GVPOTrainer,
        **home,
        replay_max_age=2,
        max_steps=3,
        output_dir=str(tmp_path / "run"),
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert [entry["replay/age_max"] for entry in trainer.state.log_history[:2]] == [1, 2]
    assert trainer.replay.buffer.index(10**5 + 2).ages.tolist() == [2] * 12 + [1] * 8 + [0] * 8
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.replay.buffer.index(10**5 + 2).ages.tolist() == [2] * 12 + [1] * 8 + [0] * 8
    trainer.replay.buffer.close()
