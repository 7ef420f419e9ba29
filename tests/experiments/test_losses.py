"""The laboratory's losses: the identity with RLOO, opponents that are TRL's, and what they should be."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from experiments.losses import GVPO, RejectionSampling, RewardWeighted, TrustedGVPO
from experiments.opponents import DPO, GRPO, RLOO
from experiments.responses import Responses
from gvpo import gvpo_loss

K, GROUPS, TOKENS = 4, 6, 3


def make(seed: int = 0, moved: float = 0.3) -> Responses:
    g = torch.Generator().manual_seed(seed)

    def logps() -> torch.Tensor:
        return -3 * torch.rand(K * GROUPS, TOKENS, generator=g, dtype=torch.float64)

    policy = logps()
    return Responses(
        policy=policy.clone().requires_grad_(),
        rollout=policy + moved * torch.randn(policy.shape, generator=g, dtype=torch.float64),
        reference=logps(),
        behaviour=logps().sum(1),
        rewards=torch.rand(K * GROUPS, generator=g, dtype=torch.float64),
        mask=torch.ones(K * GROUPS, TOKENS, dtype=torch.bool),
        k=K,
    )


def gradient(loss, responses: Responses) -> torch.Tensor:
    return torch.autograd.grad(loss(responses), responses.policy)[0]


@pytest.mark.parametrize("seed", range(3))
def test_gvpo_over_beta_is_rloo_with_the_current_kl_in_the_reward_and_no_ratio(seed: int) -> None:
    responses, beta = make(seed), 0.3
    torch.testing.assert_close(
        gradient(GVPO(beta=beta), responses) / beta,
        gradient(RLOO(kl=beta), responses),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_loss_is_unbiased_at_every_k_and_would_not_be_with_one_over_k(k: int) -> None:
    """Over all k-tuples of five responses, each with its probability."""
    g = torch.Generator().manual_seed(k)
    reference = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    policy = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    rewards = torch.rand(5, generator=g, dtype=torch.float64)
    sampler = torch.rand(5, generator=g, dtype=torch.float64)
    sampler /= sampler.sum()
    expected = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(5), repeat=k):
        index = torch.tensor(drawn)
        group = torch.zeros(k, dtype=torch.long)
        loss = gvpo_loss(policy[index], reference[index], rewards[index], group, beta=0.2).loss
        expected += sampler[index].prod() * loss
    residual = 0.2 * (policy - reference) - rewards
    variance = (sampler * residual**2).sum() - (sampler * residual).sum() ** 2
    torch.testing.assert_close(expected, variance / 2, rtol=1e-12, atol=0)
    assert abs(expected * (k - 1) / k - variance / 2) > 0.2 * variance / 2


def test_grpo_is_the_clipped_ratio_with_k3() -> None:
    r = make()
    ratio = (r.policy - r.rollout).exp()
    group = r.rewards.view(-1, K)
    advantage = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    delta = r.reference - r.policy
    k3 = delta.exp() - delta - 1
    torch.testing.assert_close(GRPO(kl=0.3)(r), (-surrogate + 0.3 * k3).mean())
    torch.testing.assert_close(GRPO(kl=0.3, corrected=True)(r), (-surrogate + 0.3 * ratio * k3).mean())
    weight = (r.rollout.sum(1) - r.behaviour).exp().clamp(max=2)[:, None]
    torch.testing.assert_close(GRPO(kl=0.3, cap=2)(r), (-surrogate * weight + 0.3 * k3).mean())
    r.behaviour_tokens = r.policy.detach().roll(1, 0)
    by_token = (r.rollout - r.behaviour_tokens).exp().clamp(max=2)
    torch.testing.assert_close(GRPO(cap=2, by_token=True)(r), (-surrogate * by_token).mean())
    plain = (group - group.mean(1, keepdim=True)).view(-1, 1)
    dr_grpo = -torch.minimum(ratio * plain, ratio.clamp(0.8, 1.2) * plain).mean()
    torch.testing.assert_close(GRPO(standardise=False, loss_type="dr_grpo")(r), dr_grpo)
    sequence = (r.policy - r.rollout).mean(1, keepdim=True).exp()
    gspo = -torch.minimum(sequence * advantage, sequence.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(GRPO(level="sequence")(r), gspo)


def test_dpo_takes_the_best_against_the_worst_and_skips_ties() -> None:
    r = make()
    r.rewards.view(-1, K)[0] = 0.5
    expected = []
    for group in range(1, GROUPS):
        rows = slice(group * K, (group + 1) * K)
        implicit = (r.policy.sum(1) - r.reference.sum(1))[rows]
        best, worst = r.rewards[rows].argmax(), r.rewards[rows].argmin()
        expected.append(-logsigmoid(0.5 * (implicit[best] - implicit[worst])))
    torch.testing.assert_close(DPO(beta=0.5)(r), torch.stack(expected).sum() / GROUPS)
    r.rewards.fill_(1.0)
    assert gradient(DPO(beta=0.5), r).eq(0).all()


def test_rejection_sampling_and_reward_weighting() -> None:
    r = make()
    r.rewards = (r.rewards > 0.5).double()
    chosen = r.rewards == 1
    torch.testing.assert_close(RejectionSampling()(r), -r.policy.sum(1)[chosen].mean())
    weights = (r.rewards.view(-1, K) / 0.3).softmax(1)
    expected = -(weights * r.policy.sum(1).view(-1, K)).sum() / GROUPS
    torch.testing.assert_close(RewardWeighted(beta=0.3)(r), expected)


def test_the_trust_mask_leaves_out_what_has_moved_far_and_nothing_else() -> None:
    r = make(moved=0.5)
    full, trusted = gradient(GVPO(beta=0.3), r), gradient(TrustedGVPO(beta=0.3, trust=0.2), r)
    ratio = (r.policy - r.rollout).exp()
    far = ((full < 0) & (ratio > 1.2)) | ((full > 0) & (ratio < 0.8))
    assert 0 < far.sum() < far.numel() / 2
    torch.testing.assert_close(trusted, full.masked_fill(far, 0.0))


def test_the_optimum_is_a_fixed_point_with_and_without_the_mask() -> None:
    r = make()
    optimum = r.reference.clone()
    optimum[:, 0] += r.rewards / 0.3 - math.log(2)
    r.policy = optimum.requires_grad_()
    for loss in (GVPO(beta=0.3), TrustedGVPO(beta=0.3, trust=0.2)):
        assert gradient(loss, r).abs().max() < 1e-15
