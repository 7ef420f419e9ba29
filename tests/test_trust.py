"""Which tokens are beyond trust, at its bounds; what a step does with them is in `test_step.py`."""

import math

import torch

from gvpo.trust import beyond_trust


def test_a_token_at_the_bound_is_within_and_only_moves_along_the_weight_count():
    bounds = torch.tensor([math.log1p(0.2), math.log1p(-0.2)], dtype=torch.float64)
    outwards = bounds.sign() * 1e-12
    rollout = torch.zeros(3, 2, dtype=torch.float64)
    weights = torch.tensor([1.0, -1.0, 0.0])
    at = beyond_trust(weights, bounds.expand(3, 2), rollout, 0.2)
    assert not at.any()
    over = beyond_trust(weights, (bounds + outwards).expand(3, 2), rollout, 0.2)
    assert over.tolist() == [[True, False], [False, True], [False, False]]
    unknown = beyond_trust(weights, bounds.expand(3, 2) * 9, torch.full_like(rollout, torch.nan), 0.2)
    assert not unknown.any()
