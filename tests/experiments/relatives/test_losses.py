"""Every relative's formula: an identity with GVPO, or what tells it from GVPO, in float64."""

import math

import pytest
import torch
from torch import Tensor

from experiments.losses import GVPO
from experiments.opponents import DPO
from experiments.relatives.losses import (
    AGRO,
    DRO,
    QRPO,
    REBEL,
    TBRM,
    AStarPO,
    FlowRL,
    MirrorDescent,
    Pairs,
    SharedGVPO,
    SmoothedGVPO,
    TrajectoryBalance,
    Values,
)
from experiments.responses import Responses

BETA = 0.3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(k: int, groups: int = 4, tokens: int = 3, seed: int = 0, moved: float = 0.4) -> Responses:
    rows = k * groups
    policy = random(rows, tokens, seed=seed) - 2
    return Responses(
        policy=policy.clone().requires_grad_(),
        rollout=policy + moved * random(rows, tokens, seed=seed + 1),
        reference=random(rows, tokens, seed=seed + 2) - 2,
        behaviour=random(rows, seed=seed + 3),
        rewards=random(rows, seed=seed + 4),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        k=k,
        prompts=torch.arange(groups),
        reference_rewards=random(groups, 64, seed=seed + 5),
    )


def gradient(loss, responses: Responses) -> Tensor:
    return torch.autograd.grad(loss(responses), responses.policy)[0]


# --- Identities ---


@pytest.mark.parametrize("k", [2, 3, 5])
def test_all_pairs_are_gvpo(k: int) -> None:
    r = make(k)
    torch.testing.assert_close(Pairs(beta=BETA)(r), GVPO(beta=BETA)(r))
    torch.testing.assert_close(gradient(Pairs(beta=BETA), r), gradient(GVPO(beta=BETA), r))


def test_rebel_from_the_reference_is_gvpo_over_pairs() -> None:
    r = make(2)
    r.rollout = r.reference
    torch.testing.assert_close(BETA**2 / 4 * REBEL(beta=BETA)(r), GVPO(beta=BETA)(r))


@pytest.mark.parametrize("eta", [0.5, 1 / BETA, 20.0])
def test_rebel_s_first_update_is_gvpo_s_with_any_eta_if_the_kl_is_in_its_reward(eta: float) -> None:
    r = make(2, moved=0)
    rebel = gradient(REBEL(beta=BETA, eta=eta), r)
    torch.testing.assert_close(BETA / (4 * eta) * rebel, gradient(GVPO(beta=BETA), r))


@pytest.mark.parametrize("k", [2, 3, 8])
def test_trajectory_balance_with_the_group_s_log_z_is_gvpo(k: int) -> None:
    r = make(k)
    scale = BETA**2 * k / (2 * (k - 1))
    torch.testing.assert_close(scale * TrajectoryBalance(beta=BETA)(r), GVPO(beta=BETA)(r))
    torch.testing.assert_close(
        scale * gradient(TrajectoryBalance(beta=BETA), r), gradient(GVPO(beta=BETA), r)
    )


@pytest.mark.parametrize("k", [2, 5])
def test_agro_from_a_fixed_sampler_is_gvpo(k: int) -> None:
    r = make(k)
    torch.testing.assert_close(gradient(AGRO(beta=BETA, on_policy=False), r), gradient(GVPO(beta=BETA), r))


def test_agro_on_policy_is_the_gradient_of_the_variance_under_the_policy_itself() -> None:
    # A group in which each response stands as often as it is likely is the expectation.
    counts, rewards, reference = torch.tensor([3, 2, 4, 1]), random(4, seed=1), random(4, seed=2)
    logits = (counts / counts.sum()).double().log().requires_grad_()
    rows = torch.arange(4).repeat_interleave(counts)

    logp = logits.log_softmax(0)
    regularised = rewards - BETA * (logp - reference)
    p = logp.exp()
    variance = (p * regularised.square()).sum() - (p * regularised).sum().square()
    (expected,) = torch.autograd.grad(variance / 2, logits, retain_graph=True)
    group = of(logp, reference, rewards, rows)
    on, off = (AGRO(beta=BETA, on_policy=flag)(group) for flag in (True, False))
    unbiased = off * (len(rows) - 1) / len(rows)  # the group is everything there is, not a sample
    (got,) = torch.autograd.grad(on - off + unbiased, logits, retain_graph=True)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(torch.autograd.grad(unbiased, logits)[0], expected, atol=0.01)


def test_mirror_descent_is_the_gradient_that_kimi_print() -> None:
    r = make(4)
    ratio = (r.policy - r.reference).sum(1)
    centred = (r.grouped_rewards - r.grouped_rewards.mean(1, keepdim=True)).flatten()
    (printed,) = torch.autograd.grad((r.policy.sum(1) * centred - BETA / 2 * ratio**2).mean(), r.policy)
    torch.testing.assert_close(gradient(MirrorDescent(beta=BETA), r), -BETA * printed)


def test_mirror_descent_lacks_the_mean_of_the_log_ratios() -> None:
    r = make(4)
    mean = BETA * (r.policy - r.reference).sum(1).view(-1, 4).mean(1).repeat_interleave(4)
    difference = 3 / 4 * gradient(GVPO(beta=BETA), r) - gradient(MirrorDescent(beta=BETA), r)
    torch.testing.assert_close(difference[:, 0], -BETA * mean / 16)


def test_a_star_po_is_soft_policy_optimisation_s_terminal_q_regression() -> None:
    r = make(3)
    advantages = BETA * (r.policy - r.reference)  # of each token
    first = BETA * (r.reference_rewards[:, :8] / BETA).exp().mean(1).log()
    terminal = first.repeat_interleave(3) + advantages.sum(1)
    torch.testing.assert_close(AStarPO(beta=BETA, n=8)(r), (terminal - r.rewards).square().mean())


def test_tbrm_is_the_sum_of_the_soft_bellman_residuals_along_a_response() -> None:
    horizon, symbols, rows = 3, 4, 6
    logits, reference = (
        random(rows, horizon, symbols, seed=1),
        random(rows, horizon, symbols, seed=2).log_softmax(-1),
    )
    actions = torch.randint(symbols, (rows, horizon, 1), generator=torch.Generator().manual_seed(3))
    rewards = random(rows, seed=4)
    taken, allowed = (x.gather(2, actions)[..., 0] for x in (logits, reference))
    following = torch.cat([logits.logsumexp(-1)[:, 1:], torch.zeros(rows, 1)], 1)  # V of the next state
    residuals = taken - allowed - following
    residuals[:, -1] -= rewards / BETA
    r = make(2, groups=3)
    r.policy, r.reference, r.rewards = logits.log_softmax(-1).gather(2, actions)[..., 0], allowed, rewards
    r.k, r.values = 1, logits[:, 0].logsumexp(-1)
    torch.testing.assert_close(TBRM(beta=BETA)(r), residuals.sum(1).square().mean())


def test_flowrl_is_its_authors_code() -> None:
    r = make(4)
    r.mask[1, 2] = r.mask[6, 1:] = False
    for t in (r.policy, r.rollout, r.reference):
        t.data *= r.mask
    count = r.mask.sum(1)
    group = r.grouped_rewards
    advantage = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)).flatten()
    weight = (r.policy - r.rollout).sum(1).detach().exp().clamp(max=10)
    known = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)
    delta = known.repeat_interleave(4) + r.policy.sum(1) / count - 15 * advantage - r.reference.sum(1) / count
    loss = FlowRL(coefficient=15)
    loss.values._table = known
    torch.testing.assert_close(loss(r), (weight * delta.square()).mean())


def test_one_mean_for_a_prompt_is_one_group_and_none_shared_is_gvpo() -> None:
    r = make(3)
    torch.testing.assert_close(gradient(SharedGVPO(beta=BETA), r), gradient(GVPO(beta=BETA), r))
    r.prompts = torch.tensor([0, 7, 0, 0])
    rows = torch.arange(12).view(4, 3)
    joined = rows[[0, 2, 3]].flatten()
    parts = [joined, rows[1]]
    shared = gradient(SharedGVPO(beta=BETA), r)
    for part in parts:
        residual = (BETA * (r.policy - r.reference).sum(1) - r.rewards)[part]
        expected = BETA * (residual - residual.mean()) / (len(part) - 1) / 4
        torch.testing.assert_close(shared[part, 0], expected)


def test_smoothing_of_strength_nothing_is_gvpo_and_of_infinity_the_running_mean() -> None:
    r = make(3)
    torch.testing.assert_close(
        gradient(SmoothedGVPO(beta=BETA, rate=0.1, strength=0), r), gradient(GVPO(beta=BETA), r)
    )
    smoothed = SmoothedGVPO(beta=BETA, rate=0.1, strength=1e12)
    smoothed.values._table = torch.full((4,), 0.7, dtype=torch.float64)
    residual = r.rewards - BETA * (r.policy - r.reference).sum(1) - 0.7
    torch.testing.assert_close(gradient(smoothed, r)[:, 0], -BETA * residual / 12)


def test_values_follow_the_mean_of_each_prompt() -> None:
    values = Values(0.25)
    prompts = torch.tensor([2, 0, 2])
    seen = torch.tensor([[1.0, 3.0], [5.0, 5.0], [6.0, 6.0]], dtype=torch.float64)
    assert values(prompts, seen)[:, 0].tolist() == [4, 5, 4]  # the first sight sets them
    assert values(prompts, seen + 4)[:, 0].tolist() == [4, 5, 4]
    assert values(prompts, seen)[:, 0].tolist() == [5, 6, 5]


# --- At the optimum: who is at rest where, and from which samples ---

REFERENCE = torch.full((5,), 0.2, dtype=torch.float64).log()  # uniform: its answers are all five, once each
REWARDS = torch.tensor([0.0, 0.2, 0.5, 0.6, 1.0], dtype=torch.float64)
LOG_Z = (REFERENCE + REWARDS / BETA).logsumexp(0)
OPTIMUM = REFERENCE + REWARDS / BETA - LOG_Z
ALL, SKEWED = torch.arange(5), torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 0])


def of(logp: Tensor, reference: Tensor, rewards: Tensor, rows: Tensor) -> Responses:
    """One group: the given responses."""
    return Responses(
        policy=logp[rows][:, None],
        rollout=reference[rows][:, None],
        reference=reference[rows][:, None],
        behaviour=torch.zeros(len(rows)),
        rewards=rewards[rows],
        mask=torch.ones(len(rows), 1, dtype=torch.bool),
        k=len(rows),
        prompts=torch.zeros(1, dtype=torch.long),
        reference_rewards=rewards[None],
        values=LOG_Z[None],
    )


def at(loss, logp: Tensor, rows: Tensor) -> Tensor:
    """The gradient with respect to free logits, at log-probabilities `logp`."""
    logits = logp.clone().requires_grad_()
    return torch.autograd.grad(loss(of(logits.log_softmax(0), REFERENCE, REWARDS, rows)), logits)[0]


def resting(loss, rows: Tensor) -> bool:
    return bool(at(loss, OPTIMUM, rows).abs().max() < 1e-14)


@pytest.mark.parametrize("rows", [ALL, SKEWED], ids=["reference", "skewed"])
@pytest.mark.parametrize(
    "loss",
    [
        GVPO(beta=BETA),
        REBEL(beta=BETA),
        TrajectoryBalance(beta=BETA),
        AStarPO(beta=BETA, n=5),
        AGRO(beta=BETA, on_policy=True),
        DRO(beta=BETA, rate=0.5),
        TBRM(beta=BETA),
        SmoothedGVPO(beta=BETA, rate=0.5, strength=3.0),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_the_optimum_is_at_rest_from_any_samples(loss, rows: Tensor) -> None:
    if isinstance(loss, REBEL):
        rows = rows[: len(rows) // 2 * 2]
    assert resting(loss, rows)


def test_a_log_mean_exp_over_the_group_is_right_from_the_reference_s_samples_alone() -> None:
    loss = MirrorDescent(beta=BETA, normaliser="log-mean-exp")
    assert resting(loss, ALL)
    assert not resting(loss, SKEWED)


def test_a_mean_of_rewards_moves_the_resting_place_off_policy() -> None:
    assert not resting(MirrorDescent(beta=BETA), ALL)
    assert not resting(MirrorDescent(beta=BETA), SKEWED)


def test_on_policy_any_number_of_the_prompt_is_as_good_and_off_policy_it_is_not() -> None:
    policy = random(5, seed=5).log_softmax(0)

    def expected(value: float, sampler: Tensor) -> Tensor:
        logits = policy.clone().requires_grad_()
        ratio = logits.log_softmax(0) - REFERENCE
        loss = (sampler.exp() * (REWARDS - value - BETA * ratio).square()).sum() / 2
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(expected(0.0, policy), expected(7.0, policy))
    assert not torch.allclose(expected(0.0, REFERENCE), expected(7.0, REFERENCE), atol=0.1)


def test_qrpo_aims_at_the_optimum_of_the_quantiles_and_ignores_the_rewards_scale() -> None:
    logp = random(5, seed=6).log_softmax(0)
    r, scaled = (of(logp, REFERENCE, REWARDS * s, ALL) for s in (1.0, 10.0))
    torch.testing.assert_close(QRPO(beta=BETA)(r), QRPO(beta=BETA)(scaled))
    assert not resting(QRPO(beta=BETA), ALL)


@pytest.mark.parametrize(("share", "off"), [(None, 0.02), (0.1, 0.9)])
def test_qrpo_s_normaliser_is_right_without_ties_and_not_for_rewards_of_0_or_1(
    share: float | None, off: float
) -> None:
    """Off by less than 0.02 nats for 512 distinct rewards; by 0.9 at least if one in ten is right."""
    n = 512
    rewards = torch.arange(n).double() if share is None else (torch.arange(n) < share * n).double()
    quantile = (rewards[None] <= rewards[:, None]).double().mean(1)
    true = (quantile / BETA).logsumexp(0) - math.log(n)
    claimed = math.log(BETA) + 1 / BETA + math.log1p(-math.exp(-1 / BETA))
    assert abs(true - claimed) < off if share is None else abs(true - claimed) > off


def test_flowrl_ignores_the_rewards_scale_and_asks_more_of_long_responses() -> None:
    r = make(2, groups=1)
    r.rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    before = gradient(FlowRL(coefficient=2), r)
    r.rewards = torch.tensor([10.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(gradient(FlowRL(coefficient=2), r), before, rtol=1e-5, atol=1e-5)
    # At rest ℓ = |y| (c R̂ − log Z): with three tokens three times as far as with one.
    standard = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    r.rollout = r.policy.detach()
    for length in (1, 3):
        mask = (torch.arange(3) < length).double()
        r.mask = mask.bool().expand(2, -1)
        r.reference = torch.zeros(2, 3, dtype=torch.float64)
        r.policy = (standard[:, None] * 2 * mask).requires_grad_()  # 2 a token, `length` tokens
        assert gradient(FlowRL(coefficient=2), r).abs().max() < 1e-5


def test_dpo_sees_which_is_better_not_by_how_much_and_is_never_at_rest() -> None:
    r = make(2)
    r.rewards = torch.tensor([1.0, 0.0] * 4, dtype=torch.float64)
    clear = gradient(DPO(beta=BETA), r)
    r.rewards = r.rewards / 100
    torch.testing.assert_close(gradient(DPO(beta=BETA), r), clear)
    assert not resting(DPO(beta=BETA), ALL)
    far = torch.tensor([-50.0, -50, -50, -50, 0], dtype=torch.float64)
    assert at(DPO(beta=BETA), far, ALL)[4] < 0  # the best still rises
