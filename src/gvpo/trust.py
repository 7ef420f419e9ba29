"""A trust mask for rollouts that are used again and again: which tokens have moved far enough already.

Not part of the published algorithm; docs/evidence.md ("Reuse") shows what it gives.
"""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor


def beyond_trust(
    weights: Float[Tensor, "batch"],
    policy_logps: Float[Tensor, "batch length"],
    rollout_logps: Float[Tensor, "batch length"],
    trust: float,
) -> Bool[Tensor, "batch length"]:
    """Tokens that have already moved by more than `trust` in the direction of their row's weight.

    A token whose weight is positive is beyond trust where it has become more than 1 + `trust` times as
    likely as at rollout, one whose weight is negative where less than 1 − `trust` times. Rows of weight 0
    have none, so that a batch of zero residuals stays a fixed point when their gradient is left out.

    Args:
        weights: w, one a row.
        policy_logps: log p of each token under the policy as it is, in nats.
        rollout_logps: the same under the policy that sampled; NaN (not known) is never beyond trust.
        trust: the ratio's largest distance from 1, between 0 and 1.
    """
    moved, weights = policy_logps - rollout_logps, weights[:, None]
    return ((weights > 0) & (moved > math.log1p(trust))) | ((weights < 0) & (moved < math.log1p(-trust)))
