"""The table of relatives: equal tuning, and every arm trains on the problems that it is put on."""

import pytest
import torch

from experiments import offline, optimum, sequences
from experiments.comparison import Scale
from experiments.exact import Problem, from_reference
from experiments.relatives import beside, jobs

QUICK = Scale.of(2, quick=True)


@pytest.mark.parametrize("problem", beside.PROBLEMS)
def test_every_arm_has_as_many_settings(problem: str) -> None:
    arms = beside.arms(problem, Scale.of(2, quick=False))
    assert {len(arm.grid) for arm in arms} == {4}
    assert [arm.name for arm in arms] == [arm.name for arm in beside.arms(problem, QUICK)]
    assert sum(job.startswith(problem) for job in jobs(QUICK)) == len(arms)


@pytest.mark.parametrize("arm", beside.arms("optimum", QUICK), ids=lambda arm: arm.name)
def test_every_arm_moves_and_a_run_is_the_same_alone_and_beside_others(arm) -> None:
    both = optimum.run_arm(arm, QUICK, ("on-policy", "uniform"), updates=3, reference_n=64)
    alone = optimum.run_arm(arm, QUICK, ("uniform",), updates=3, reference_n=64)
    assert [r.metrics["kl_optimum"] for r in both if r.condition == "uniform"] == pytest.approx(
        [r.metrics["kl_optimum"] for r in alone], rel=1e-9
    )
    assert all(0 < r.metrics["kl_reference"] < 1 for r in both)


@pytest.mark.slow
def test_a_job_runs_on_logs(tmp_path) -> None:
    (name,) = (job for job in jobs(QUICK) if job == "offline: tbrm")
    records = beside.run_job(name, QUICK, tmp_path)
    assert {r.condition for r in records} == {f"offline: {log}" for log in offline.LOGS}
    assert all(0 < r.metrics["kl_optimum"] < 3 for r in records)


def test_the_value_of_the_first_logits_is_a_shift_that_the_policy_does_not_see() -> None:
    policies = sequences.SequencePolicies([1])
    table, values = policies.table().detach(), policies.values().detach()
    with torch.no_grad():
        policies.parameters[-1] += 2.5  # the logits' bias
    torch.testing.assert_close(policies.table().detach(), table)
    torch.testing.assert_close(policies.values().detach(), values + 2.5)


def test_the_reference_s_answers_have_its_frequencies() -> None:
    drawn = optimum.make_problem(3)
    problem = Problem(
        drawn["rewards"][None, None], drawn["reference"][None, None, :, None], [3], torch.tensor([0.1]), 0.2
    )
    rewards = from_reference(problem, 20_000)
    assert rewards.shape == (1, 1, 20_000)
    expected = (drawn["reference"].exp() * drawn["rewards"]).sum()
    assert float(rewards.mean()) == pytest.approx(float(expected), abs=0.01)
