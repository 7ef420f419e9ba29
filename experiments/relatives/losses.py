"""GVPO's relatives: losses that regress log-ratios on rewards, as their papers write them.

With ℓ = log π − log π_ref of a response, all pull R − βℓ towards a number c of its prompt, for at the optimum
π* ∝ π_ref exp(R/β) it *is* one, c = β log Z(x). They differ in c, and in which reference and samples they
mean. The group's own mean of R − βℓ (GVPO, pairs, VarGrad) is right from any samples. Any other c is a mere
baseline on-policy, and off-policy a bias unless it is β log Z exactly. docs/relatives.md has them beside each
other, `tests/experiments/relatives` an identity or a counterexample of each.

A loss takes `Responses` and returns a scalar, as those of `experiments.losses` do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.responses import Responses
from gvpo.objective import gvpo_loss

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def log_ratio(responses: Responses) -> Float[Tensor, "groups k"]:
    """ℓ = log π − log π_ref of each response, in nats."""
    return (responses.policy - responses.reference).sum(1).view(-1, responses.k)


def log_mean_exp(rewards: Float[Tensor, "groups n"], beta: float) -> Float[Tensor, "groups 1"]:
    """β log mean exp(R/β): β log Z, were `rewards` those of all that the reference answers."""
    return beta * ((rewards / beta).logsumexp(1, keepdim=True) - math.log(rewards.shape[1]))


def squared(residual: Tensor) -> Float[Tensor, ""]:
    return residual.square().mean() / 2


class Pairs:
    """Every pair of a group: ¼ mean over i ≠ j of [β(ℓ_i − ℓ_j) − (R_i − R_j)]². It is GVPO."""

    def __init__(self, *, beta: float) -> None:
        self.beta = beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        residual = self.beta * log_ratio(responses) - responses.grouped_rewards
        difference = residual[:, :, None] - residual[:, None, :]
        return difference.square().sum() / (4 * len(residual) * responses.k * (responses.k - 1))


class REBEL:
    """Gao et al. 2024, arXiv 2404.16767: [(ℓ_1 − ℓ_2) − η(r_1 − r_2)]² with ℓ against the rollout policy.

    Each response is in one pair. As in the authors' code, the KL to the reference is in the reward, at the
    rollout policy: r = R − β(log π_rollout − log π_ref).

    Args:
        beta: β; `eta` is 1/β unless given.
    """

    def __init__(self, *, beta: float, eta: float | None = None) -> None:
        self.beta, self.eta = beta, eta or 1 / beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        cost = self.beta * (responses.rollout - responses.reference).sum(1)
        moved = (responses.policy - responses.rollout).sum(1)
        first, second = (moved - self.eta * (responses.rewards - cost)).view(-1, 2).unbind(1)
        return (first - second).square().mean()


class TrajectoryBalance:
    """TBA (Bartoldson et al. 2025, arXiv 2503.18929): (log Ẑ + ℓ − R/β)², Ẑ by the group's mean."""

    def __init__(self, *, beta: float) -> None:
        self.beta = beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        residual = log_ratio(responses) - responses.grouped_rewards / self.beta
        return (residual - residual.detach().mean(1, keepdim=True)).square().mean()


class MirrorDescent:
    """Kimi k1.5's online policy mirror descent (arXiv 2501.12599): ½(R − c − βℓ)².

    Args:
        beta: β, there τ.
        normaliser: "mean", c = mean R, as they trained; or "log-mean-exp", c = β log mean exp(R/β) of the
            group, which estimates β log Z if the group was drawn from the reference.
    """

    def __init__(self, *, beta: float, normaliser: str = "mean") -> None:
        self.beta, self.normaliser = beta, normaliser

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        rewards = responses.grouped_rewards
        mean = rewards.mean(1, keepdim=True)
        c = mean if self.normaliser == "mean" else log_mean_exp(rewards, self.beta)
        return squared(rewards - c - self.beta * log_ratio(responses))


class AStarPO:
    """A*-PO (Brantley et al. 2025, arXiv 2505.20686): (βℓ − (R − V̂*))².

    V̂* = β₁ log mean exp(R/β₁) over `n` responses of the reference, once before training. With β₁ = β this is
    the terminal Q-regression of Soft Policy Optimization, too (Cohen et al. 2025, arXiv 2503.05453).
    """

    def __init__(self, *, beta: float, n: int = 8, beta1: float | None = None) -> None:
        self.beta, self.n, self.beta1 = beta, n, beta1 or beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.reference_rewards is not None
        value = log_mean_exp(responses.reference_rewards[:, : self.n], self.beta1)
        return squared(responses.grouped_rewards - value - self.beta * log_ratio(responses)) * 2


class AGRO:
    """AGRO (Tang et al. 2025, arXiv 2503.19612): ½ Var(R − βℓ) over the distribution that responses are from.

    Args:
        beta: β.
        on_policy: that distribution is π itself and moves with it, which adds ½(r − r̄)² ∇log π to the
            gradient. Without, it is some μ, and the loss is GVPO's.
    """

    def __init__(self, *, beta: float, on_policy: bool) -> None:
        self.beta, self.on_policy = beta, on_policy

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        regularised = responses.grouped_rewards - self.beta * log_ratio(responses)
        away = regularised - regularised.detach().mean(1, keepdim=True)
        loss = away.square().sum() / (2 * len(away) * (responses.k - 1))
        if self.on_policy:
            score = responses.policy.sum(1).view_as(away)
            loss = loss + (away.detach().square() / 2 * (score - score.detach())).mean()
        return loss


class QRPO:
    """QRPO (Matrenok et al. 2025, arXiv 2507.08068): (q − β log Z_q − βℓ)².

    q is the share of `n` responses of the reference whose reward is not higher. If q is uniform under the
    reference, as it is where rewards have no ties, Z_q = β(exp(1/β) − 1), and π* is that of q, not of R.
    """

    def __init__(self, *, beta: float, n: int = 64) -> None:
        self.beta, self.n = beta, n

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.reference_rewards is not None
        others = responses.reference_rewards[:, None, : self.n]
        quantile = (others <= responses.grouped_rewards[:, :, None]).to(responses.policy.dtype).mean(2)
        log_z = math.log(self.beta) + 1 / self.beta + math.log1p(-math.exp(-1 / self.beta))
        return squared(quantile - self.beta * log_z - self.beta * log_ratio(responses)) * 2


class Values:
    """A number for each prompt, moved towards the mean of what is seen there: a learned V(x), as a table.

    Args:
        rate: how far, at each sight. (A step of gradient descent on ½(seen − V)².) The first sight sets it.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._table = torch.zeros(0, dtype=torch.float64)

    def __call__(
        self, prompts: Int[Tensor, "groups"], seen: Float[Tensor, "groups k"]
    ) -> Float[Tensor, "groups 1"]:
        """What was known of the prompts before these groups were seen."""
        missing = int(prompts.max()) + 1 - len(self._table)
        if missing > 0:
            self._table = torch.cat([self._table, self._table.new_full((missing,), torch.nan)])
        sums, counts = torch.zeros(2, len(self._table), dtype=torch.float64)
        sums.index_add_(0, prompts, seen.detach().double().mean(1))
        counts.index_add_(0, prompts, torch.ones(len(prompts), dtype=torch.float64))
        mean = sums / counts  # NaN where there is none
        before = torch.where(self._table.isnan(), mean, self._table)
        self._table = torch.where(counts > 0, before + self.rate * (mean - before), self._table)
        return before[prompts][:, None].to(seen.dtype)


class DRO:
    """DRO-V (Richemond et al. 2024, arXiv 2405.19107): ½(R − V(x) − βℓ)², V learned by the same loss."""

    def __init__(self, *, beta: float, rate: float) -> None:
        self.beta, self.values = beta, Values(rate)

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.prompts is not None
        regularised = responses.grouped_rewards - self.beta * log_ratio(responses)
        return squared(regularised - self.values(responses.prompts, regularised))


class FlowRL:
    """FlowRL (Zhu et al. 2025, arXiv 2509.15207): w (log Z(x) + ℓ/|y| − c R̂)², Z learned.

    R̂ is the reward less its group's mean, over its standard deviation; w is π/π_rollout without gradient, at
    most 10 as in the authors' code (1 ± ε in the paper).

    Args:
        coefficient: c; theirs is 15.
        rate: how fast log Z(x) is learned.
    """

    def __init__(self, *, coefficient: float, rate: float = 0.1) -> None:
        self.coefficient, self.values = coefficient, Values(rate)

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.prompts is not None
        rewards = responses.grouped_rewards
        standard = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
        length = responses.mask.sum(1).view_as(rewards)
        residual = self.coefficient * standard - log_ratio(responses) / length
        moved = (responses.policy.detach() - responses.rollout).sum(1).view_as(rewards)
        weight = moved.exp().clamp(max=10)
        return (weight * (residual - self.values(responses.prompts, residual)).square()).mean()


class TBRM:
    """TBRM (Yuan et al. 2025, arXiv 2505.15311): (V(s₁) + ℓ − R/β)², V(s₁) = log-sum-exp of the first logits.

    What the soft Bellman residuals with logits as Q-values and log π_ref in the reward sum to along a
    response. `V` has a gradient: the logits' common shift, which the policy does not see, learns log Z.
    """

    wants_values = True

    def __init__(self, *, beta: float) -> None:
        self.beta = beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.values is not None
        return (
            (responses.values[:, None] + log_ratio(responses) - responses.grouped_rewards / self.beta)
            .square()
            .mean()
        )


class SharedGVPO:
    """GVPO with one mean for all groups of a prompt in the batch, whose rows are then one group.

    A sum over the prompts by the number of groups, so that no prompt's share depends on the others.
    """

    def __init__(self, *, beta: float) -> None:
        self.beta = beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.prompts is not None
        group_ids = responses.prompts.repeat_interleave(responses.k)
        policy, reference = responses.policy.sum(1), responses.reference.sum(1)
        loss = gvpo_loss(policy, reference, responses.rewards, group_ids, beta=self.beta).loss
        return loss * len(responses.prompts.unique()) / len(responses.prompts)


class SmoothedGVPO:
    """GVPO with its mean drawn towards a running one, V(x): the prompt's mean of R − βℓ over earlier steps.

    In place of the mean of the k − 1 others (with which it would be GVPO) stands the average of that, with
    weight k − 1, and V, with weight `strength`.

    Args:
        beta: β.
        rate: how fast V follows.
        strength: as many responses as V counts for; 0 is GVPO.
    """

    def __init__(self, *, beta: float, rate: float, strength: float) -> None:
        self.beta, self.strength, self.values = beta, strength, Values(rate)

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        assert responses.prompts is not None
        ratio = log_ratio(responses)
        regularised = (responses.grouped_rewards - self.beta * ratio).detach()
        others = regularised.sum(1, keepdim=True) - regularised
        known = self.strength * self.values(responses.prompts, regularised)
        baseline = (others + known) / (responses.k - 1 + self.strength)
        return -self.beta * ((regularised - baseline) * ratio).mean()
