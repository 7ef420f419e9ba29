"""Which version a stale group is measured against, and how old everything is; without Ray."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

with warnings.catch_warnings():  # of engines that are not installed
    warnings.simplefilter("ignore")
    from gvpo.verl.references import staleness
    from gvpo.verl.versions import KeepingWorker, Versions


class Workers:
    """A worker group whose weights are a number."""

    def __init__(self):
        self.weights, self.copies = 0, {}

    def save_model_to_cpu(self, name):
        self.copies[name] = self.weights

    def restore_model_from_cpu(self, name):
        self.weights = self.copies[name]

    def clear_cpu_model(self, name):
        del self.copies[name]


def after(steps, **how):
    """Versions after so many steps, each of which adds 1 to the weights."""
    versions = Versions(**{"older": 2, "period": 1, "needed": True} | how)
    versions.workers = workers = Workers()
    for step in range(steps + 1):
        workers.weights = step
        versions.keep(step)
    return versions, workers


@given(st.integers(0, 30), st.integers(0, 4), st.integers(1, 5), st.integers(0, 30))
def test_a_group_is_measured_against_the_reference_of_its_time_or_the_oldest_kept(steps, older, period, back):
    versions, workers = after(steps, older=older, period=period)
    references = [version for version in range(steps + 1) if version % period == 0][-older - 1 :]
    assert versions.kept == references
    assert workers.copies == {str(version): version for version in references}
    sampled = max(0, steps - back)
    wanted = sampled - sampled % period
    found = versions.of(sampled, steps)
    assert found == (wanted if wanted in references else references[0])


def test_where_nothing_is_kept_the_present_policy_serves():
    versions, workers = after(5, needed=False)
    assert (versions.kept, workers.copies, versions.of(2, 5)) == ([], {}, 5)
    assert list(versions.each({5}, 5)) == [5]


def test_a_version_that_was_resumed_at_is_kept_although_it_is_between_references():
    versions = Versions(older=2, period=4, needed=True)
    versions.workers = Workers()
    for step in (6, 7, 8):
        versions.keep(step)
    assert versions.kept == [6, 8]
    assert [versions.of(version, 8) for version in (5, 6, 7, 8)] == [6, 6, 6, 8]
    versions.period, versions.kept = 3, [0, 4]  # a checkpoint, and another period since
    assert versions.of(7, 7) == 4


@pytest.mark.parametrize("present", [3, None])
def test_workers_have_each_version_in_turn_and_then_their_own_again(present):
    versions, workers = after(3)
    if present is None:
        workers.weights = 3.5  # the policy has moved since
    seen = [(version, workers.weights) for version in versions.each({3, 1}, present)]
    assert seen == [(1, 1), (3, 3)]
    assert workers.weights == (present or 3.5)
    assert workers.copies.keys() == {"1", "2", "3"}


class Kept(KeepingWorker):
    """A rank of such a worker with a model on the CPU, without verl's engine."""

    def __init__(self, module, rank=0):
        self.config = SimpleNamespace(actor=SimpleNamespace(strategy="plain"))
        self.actor = SimpleNamespace(engine=SimpleNamespace(module=module))
        self.rank_, self._strategy_handlers = rank, (self.save, self.restore)

    rank, world_size = property(lambda self: self.rank_), 2

    @staticmethod
    def save(module):  # as verl does it: of a tensor in host memory `.cpu()` is the tensor itself
        return {name: (p.detach().cpu(), None) for name, p in module.named_parameters()}, "spec"

    @staticmethod
    def restore(module, state):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(state[0][name][0])


def test_a_copy_of_what_is_in_host_memory_is_a_copy(tmp_path):
    """verl's own moves with the policy there: docs/upstream/verl-async.md."""
    worker = Kept(nn.Linear(2, 2))
    first = worker.actor.engine.module.weight.detach().clone()
    worker.save_model_to_cpu("3")
    with torch.no_grad():
        worker.actor.engine.module.weight += 1
    assert torch.equal(worker.save(worker.actor.engine.module)[0]["weight"][0], first + 1)
    worker.restore_model_from_cpu("3")
    assert torch.equal(worker.actor.engine.module.weight, first)

    worker.write_versions(str(tmp_path / "references"))
    resumed = Kept(nn.Linear(2, 2))
    assert resumed.read_versions(str(tmp_path / "references")) == [3]
    resumed.restore_model_from_cpu("3")
    assert torch.equal(resumed.actor.engine.module.weight, first)
    # Another number of workers has other shards: the policy as loaded serves.
    assert Kept(nn.Linear(2, 2), rank=1).read_versions(str(tmp_path / "references")) == []


def test_ages_and_shares():
    spans = {"fresh": [(3, 3), (3, 3)], "mixed": [(2, 2), (3, 3)], "spanning": [(1, 2), (2, 2)]}
    ages = {"fresh": 0, "mixed": 2, "spanning": 4}
    found = staleness(spans, ages, {"fresh": 0, "mixed": 2, "spanning": 2})
    assert found == {
        "staleness/age_mean": 2,
        "staleness/age_max": 4,
        "staleness/mixed_groups": pytest.approx(2 / 3),
        "staleness/spanning_rows": pytest.approx(1 / 6),
        "staleness/reference_age": pytest.approx(4 / 3),
    }
    assert "staleness/reference_age" not in staleness(spans, ages, {})
    assert staleness({}, {}, {}) == {}


def test_bad_updates_in_a_row_are_counted_through_resuming(tmp_path, monkeypatch):
    with warnings.catch_warnings():  # of engines that are not installed
        warnings.simplefilter("ignore")
        from gvpo.verl.trainer import GVPOSync, PPOTrainer
    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(PPOTrainer, "_load_checkpoint", lambda self: None)

    def trainer(bad):
        made = object.__new__(GVPOSync)
        where = {"resume_from_path": None, "resume_mode": "auto", "default_local_dir": str(tmp_path)}
        made.config = SimpleNamespace(trainer=SimpleNamespace(**where))
        made.updates, made.global_steps = SimpleNamespace(bad_in_a_row=bad), 3
        made.settings = SimpleNamespace(reference="rollout")
        made.versions, made.actor_rollout_wg = Versions(0, 1, False), None
        return made

    trainer(2)._save_checkpoint()
    resumed = trainer(0)
    resumed._load_checkpoint()
    assert resumed.updates.bad_in_a_row == 2
