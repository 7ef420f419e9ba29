"""What k, flipped rewards, lengths and schedules do, where it can be said exactly."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from experiments import choices, lengths
from experiments.comparison import Scale
from experiments.exact import Problem, train
from experiments.losses import GVPO
from experiments.relatives.losses import MirrorDescent
from experiments.responses import Responses
from experiments.sequences import pretrained
from gvpo.objective import gvpo_weights
from tests.experiments.relatives.test_losses import gradient, make, of

BETA = 0.3
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
RIGHT = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def optimum(beta: float, rewards: Tensor = RIGHT) -> Tensor:
    return (REFERENCE + rewards / beta).log_softmax(0)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_rewards_flipped_by_chance_raise_beta_and_do_nothing_else(rate: float) -> None:
    """At π* of β/(1 − 2 rate) the gradient, a mean over all ways of flipping, is 0."""

    def expected(logp: Tensor) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for flips in itertools.product((False, True), repeat=4):
            flipped = torch.tensor(flips)
            likely = rate ** sum(flips) * (1 - rate) ** (4 - sum(flips))
            rewards = torch.where(flipped, 1 - RIGHT, RIGHT)
            total += likely * gvpo_weights(
                logp, REFERENCE, rewards, torch.zeros(4, dtype=torch.long), beta=BETA
            )
        return total

    assert expected(optimum(BETA / (1 - 2 * rate))).abs().max() < 1e-15
    assert expected(optimum(BETA)).abs().max() > 1e-3


@pytest.mark.parametrize("k", [2, 4])
def test_a_mean_of_rewards_with_one_s_own_in_it_raises_beta_on_policy(k: int) -> None:
    """Over all k-tuples of responses: Kimi's c = mean R rests at β k/(k − 1) on-policy, GVPO at β."""

    def expected(loss, logp: Tensor) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for drawn in itertools.product(range(4), repeat=k):
            rows = torch.tensor(drawn)
            logits = logp.clone().requires_grad_()
            group = of(logits.log_softmax(0), REFERENCE, RIGHT, rows)
            total += logp[rows].sum().exp() * torch.autograd.grad(loss(group), logits)[0]
        return total

    assert expected(MirrorDescent(beta=BETA), optimum(BETA * k / (k - 1))).abs().max() < 1e-14
    assert expected(MirrorDescent(beta=BETA), optimum(BETA)).abs().max() > 1e-3
    assert expected(GVPO(beta=BETA), optimum(BETA)).abs().max() < 1e-14


def test_flips_are_seen_by_the_loss_and_not_by_what_is_measured() -> None:
    policies = lengths.LengthPolicies([1, 1])
    seen: list[Responses] = []

    def loss(responses: Responses) -> Tensor:
        seen.append(responses)
        return responses.policy.sum() * 0

    flips = torch.zeros(2, *lengths.REWARDS.shape)
    flips[1] = 1
    problem = Problem(
        lengths.REWARDS.expand(2, -1, -1), policies.table().detach(), [1, 1], torch.zeros(2), 0.3,
        flips=flips, mask=lengths.MASK,
    )  # fmt: skip
    found = train(policies, problem, lambda table: table.sum(-1), loss, steps=1, groups=4, k=3)[1]
    truth, flipped = seen[0].rewards.chunk(2)
    assert torch.equal(flipped, 1 - truth)
    assert found[0]["reward"] == pytest.approx(found[1]["reward"])
    length = seen[0].mask.sum(1)
    assert set(length.tolist()) <= {2, 3, 4}
    assert (seen[0].policy[~seen[0].mask] == 0).all()


def test_responses_of_any_length_are_a_distribution_and_reward_does_not_tell_their_length() -> None:
    table = lengths.LengthPolicies([4, 5]).table()
    torch.testing.assert_close(table.sum(-1).exp().sum(-1), torch.ones(2, lengths.PROMPTS))
    for length in range(1, lengths.LONGEST + 1):
        rewards = lengths.REWARDS[:, length == lengths.LENGTHS]
        assert len(rewards[0]) == lengths.SYMBOLS**length
        torch.testing.assert_close(rewards.mean(1), torch.full((lengths.PROMPTS,), 1 / 3))


def test_a_schedule_begins_at_the_first_beta_and_stays_at_the_last() -> None:
    r = make(3)
    scheduled = choices.Scheduled(1.0, 0.1, updates=4)
    for beta in (1.0, 10**-0.25, 10**-0.5, 10**-0.75, 0.1, 0.1):
        torch.testing.assert_close(scheduled(r), GVPO(beta=beta)(r))
    constant = choices.Scheduled(None, 0.1, updates=4)
    torch.testing.assert_close(constant(r), GVPO(beta=0.1)(r))


def test_per_token_is_gvpo_for_responses_of_one_token() -> None:
    r = make(3, tokens=1)
    torch.testing.assert_close(gradient(choices.PerToken(beta=BETA), r), gradient(GVPO(beta=BETA), r))


@pytest.mark.parametrize("part", choices.PARTS)
def test_every_arm_of_a_part_has_as_many_settings(part: str) -> None:
    assert len({len(arm.grid) for arm in choices.arms(part, Scale.of(2, quick=False))}) == 1


@pytest.mark.parametrize("job", ["k: smoothed", "noise: gvpo", "schedule: whole", "length: per_token"])
def test_a_job_runs_and_repeats_itself(job: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_steps", lambda scale: 2)
    start = functools.partial(pretrained, skew=0.5, noise=0.5, steps=2)
    monkeypatch.setattr(choices, "pretrain", lambda seeds: (start(seeds), start([s + 9 for s in seeds])))
    scale = Scale.of(2, quick=True)
    records = choices.run_job(job, scale, tmp_path)
    assert all(r.metrics["kl_reference"] > 0 for r in records)
    assert records == choices.run_job(job, scale, tmp_path)
