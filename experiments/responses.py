"""What every loss of the laboratory is given: responses of whole groups and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass
class Responses:
    """Groups of k responses each, one after the other; log-probabilities in nats.

    Attributes:
        policy: of each token under the policy, with gradient; 0 where `mask` is False.
        rollout: under the policy as it was when the responses came in, TRL's `old_per_token_logps`.
        reference: under the reference π_θ'.
        behaviour: of each response under the distribution that it was really drawn from. Only the arms
            that are said to know μ may look at it.
        rewards: R.
        mask: False behind the end of a response.
        k: responses of a group.
        prompts: which prompt a group answers, a number from 0.
        reference_rewards: R of n responses that the reference gave to a group's prompt before training.
        values: log-sum-exp of the policy's logits before a group's first token, with gradient; only for
            losses with `wants_values`.
        behaviour_tokens: as `behaviour`, of each token, where that is known.
    """

    policy: Float[Tensor, "rows tokens"]
    rollout: Float[Tensor, "rows tokens"]
    reference: Float[Tensor, "rows tokens"]
    behaviour: Float[Tensor, "rows"]
    rewards: Float[Tensor, "rows"]
    mask: Bool[Tensor, "rows tokens"]
    k: int
    prompts: Int[Tensor, "groups"] | None = None
    reference_rewards: Float[Tensor, "groups n"] | None = None
    values: Float[Tensor, "groups"] | None = None
    behaviour_tokens: Float[Tensor, "rows tokens"] | None = None

    @property
    def group_ids(self) -> Int[Tensor, "rows"]:
        return torch.arange(len(self.rewards)) // self.k

    @property
    def grouped_rewards(self) -> Float[Tensor, "groups k"]:
        return self.rewards.view(-1, self.k)
