"""What chance in an environment does to the optimum (docs/guide/agents.md): two turns, and a coin between."""

import pytest
import torch

from gvpo import gvpo_weights

BETA = 0.4


def expected_gradient(coin: torch.Tensor, sampler: str) -> tuple[float, float]:
    """‖E ∇L‖ and E L at the policy of the largest E[R] − β KL, over all pairs of episodes a sampler may give.

    `coin`: the odds of two observations after each first action.
    """
    random = torch.Generator().manual_seed(0)
    reference = [
        torch.randn(*shape, generator=random).double().log_softmax(-1) for shape in ((2,), (2, 2, 2))
    ]
    rewards = torch.randn(2, 2, 2, generator=random).double()  # of the episode: action, observation, action
    values = BETA * (reference[1] + rewards / BETA).logsumexp(-1)
    first = (reference[0] + (coin * values).sum(-1) / BETA).log_softmax(-1).requires_grad_()
    second = (reference[1] + rewards / BETA).log_softmax(-1).requires_grad_()

    def episodes(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return (one.log_softmax(-1)[:, None, None] + two.log_softmax(-1)).flatten()  # S of each

    own = episodes(first, second)
    sampled_from = own if sampler == "policy" else episodes(torch.zeros(2), torch.zeros(2, 2, 2))
    odds = sampled_from.detach().exp().double() * coin[:, :, None].expand(2, 2, 2).flatten()
    i, j = torch.cartesian_prod(torch.arange(8), torch.arange(8)).T
    both, groups = torch.stack([i, j], 1).flatten(), torch.arange(64).repeat_interleave(2)
    against = episodes(*reference)
    weights = gvpo_weights(own.detach()[both], against[both], rewards.flatten()[both], groups, beta=BETA)
    likely = (odds[i] * odds[j]).repeat_interleave(2)
    (-64 * (likely * weights * own[both]).sum()).backward()
    difference = BETA * (own.detach() - against) - rewards.flatten()
    loss = ((odds * difference**2).sum() - (odds * difference).sum() ** 2) / 2
    return torch.cat([first.grad, second.grad.flatten()]).norm().item(), loss.item()


@pytest.mark.parametrize("sampler", ["policy", "uniform"])
def test_without_chance_the_optimum_is_reached_from_any_sampler(sampler: str) -> None:
    gradient, loss = expected_gradient(torch.eye(2, dtype=torch.float64), sampler)
    assert gradient < 1e-12
    assert loss < 1e-12


def test_with_chance_it_stays_the_optimum_of_fresh_episodes_and_not_of_old_ones() -> None:
    coin = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    gradient, loss = expected_gradient(coin, "policy")
    assert gradient < 1e-12  # on average: a group's luck is noise
    assert loss > 0.01
    assert expected_gradient(coin, "uniform")[0] > 0.01
