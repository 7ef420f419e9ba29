"""Replay, demonstrations and logged completions in `GVPOTrainer`: every update is the formula's."""

import copy
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from gvpo.offpolicy import ReplayView
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


def run(data=None, rewards=digit_reward, cls=Recorded, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = cls(
            tiny_model(), rewards, config(**changes), train_dataset=data, processing_class=tokenizer()
        )
    if trainer.off_policy.buffer is not None and cls is Recorded:
        sample = trainer.off_policy.buffer.sample

        def remembered(*args, **kwargs):
            trainer.drawn = sample(*args, **kwargs)
            trainer.replayed.append([g.metadata.get("demonstrations") for g in trainer.drawn])
            return trainer.drawn

        trainer.off_policy.buffer.sample = remembered
    return trainer


ROUTES = {
    "replay": {"replay_ratio": 0.7},
    "replay, several updates": {"replay_ratio": 1.0, "steps_per_generation": 8, "replay_sampling": "recent"},
    "replay, initial": {"replay_ratio": 0.5, "reference": "initial", "num_iterations": 2},
    "replay, rescored under the initial": {
        "replay_ratio": 0.5,
        "reference": "initial",
        "replay_reference": "current",
    },
    "replay, re-anchored": {"replay_ratio": 0.5, "replay_reference": "current"},
    "demonstrations": {"demonstrations_per_group": 2, "demonstration_slots": [0, 2]},
    "demonstrations, several updates": {"demonstrations_per_group": 1, "steps_per_generation": 8},
    "demonstrations and replay": {
        "demonstrations_per_group": 1,
        "replay_ratio": 1.0,
        "reference": "initial",
        "demonstration_reward": 2.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("route", list(ROUTES))
def test_each_update_is_the_formula_s(route):
    trainer = run(demonstrated(), max_steps=5, micro_batch_tokens=50, **ROUTES[route])
    trainer.train()
    assert len(trainer.errors) == 10
    assert max(trainer.errors) < 1e-5, trainer.errors
    if "replay_ratio" in ROUTES[route]:
        assert sum(map(len, trainer.replayed)) >= 8
    if "demonstrations_per_group" in ROUTES[route] and "replay_ratio" in ROUTES[route]:
        assert [3] in [demos for drawn in trainer.replayed for demos in drawn]


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
        {"replay_ratio": 0.5, "reference": "initial", "demonstrations_per_group": 1},
        {
            "offline": path,
            "reference": "initial",
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
        },
        # Groups of 4 cut by the ranks, demonstrations among them.
        {
            "demonstrations_per_group": 2,
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 1,
            "num_iterations": 2,
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
        assert [len(e) for e in errors] == [8] * 4
        assert max(map(max, errors)) < 1e-5, errors
