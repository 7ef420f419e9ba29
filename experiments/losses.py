"""GVPO as the laboratory runs it, and the two ways of fine-tuning on rewarded responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from experiments.responses import Responses
from gvpo.objective import gvpo_loss, gvpo_weights
from gvpo.trust import beyond_trust

if TYPE_CHECKING:
    from jaxtyping import Float

Loss = Callable[[Responses], Tensor]


class GVPO:
    """`gvpo.gvpo_loss`.

    Args:
        beta: β.
        reference: "given" (of the responses), "rollout" (the policy when they came in) or "current" (the
            policy before each single update: the reference that moves, against fact 7 of docs/theory.md).
    """

    def __init__(self, *, beta: float, reference: str = "given") -> None:
        self.beta, self.reference = beta, reference

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        tokens = {
            "given": responses.reference,
            "rollout": responses.rollout,
            "current": responses.policy.detach(),
        }[self.reference]
        return gvpo_loss(
            responses.policy.sum(1), tokens.sum(1), responses.rewards, responses.group_ids, beta=self.beta
        ).loss


class TrustedGVPO:
    """GVPO without the gradient of tokens beyond trust (`gvpo.trust`), as in `GVPOStep(trust=…)`.

    Args:
        beta: β.
        trust: the largest ratio's distance from 1, as GRPO's ε.
        reference: as for `GVPO`.
    """

    def __init__(self, *, beta: float, trust: float, reference: str = "given") -> None:
        self.beta, self.trust, self.reference = beta, trust, reference

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        tokens = responses.reference if self.reference == "given" else responses.rollout
        weights = gvpo_weights(
            responses.policy.sum(1), tokens.sum(1), responses.rewards, responses.group_ids, beta=self.beta
        )
        far = beyond_trust(weights, responses.policy.detach(), responses.rollout, self.trust)
        return -(weights[:, None] * ~far * responses.policy).sum()


class RejectionSampling:
    """Maximum likelihood of the responses whose reward is the highest possible one, `best`."""

    def __init__(self, *, best: float = 1.0) -> None:
        self.best = best

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        chosen = (responses.rewards >= self.best - 1e-6).to(responses.policy.dtype)
        return -(chosen * responses.policy.sum(1)).sum() / chosen.sum().clamp(min=1)


class RewardWeighted:
    """Maximum likelihood, weighted by softmax(R/β) within each group."""

    def __init__(self, *, beta: float) -> None:
        self.beta = beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        weights = (responses.grouped_rewards / self.beta).softmax(1)
        return -(weights * responses.policy.sum(1).view_as(weights)).sum(1).mean()
