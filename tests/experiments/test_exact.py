"""Policies that can be enumerated: stacked runs are the runs alone, and measures are what they say."""

import math

import pytest
import torch

from experiments import optimum, sequences
from experiments.exact import Dice, Problem, StackedAdam, draw, make_log, measure, pick, train
from experiments.frontier import Frontier
from experiments.losses import GVPO


def problem_of(seeds: list[int], rates: list[float]) -> Problem:
    drawn = [optimum.make_problem(seed) for seed in seeds]
    return Problem(
        torch.stack([d["rewards"] for d in drawn])[:, None],
        torch.stack([d["reference"] for d in drawn])[:, None, :, None],
        seeds,
        torch.tensor(rates, dtype=torch.float64),
        beta=0.2,
    )


def trained(seeds: list[int], rates: list[float], steps: int = 30) -> list[dict[str, float]]:
    problem = problem_of(seeds, rates)
    policies = optimum.Tables(problem.reference[:, 0, :, 0])
    found = train(
        policies, problem, lambda table: table.sum(-1), GVPO(beta=0.2), steps=steps, groups=16, k=8, clip=1.0
    )
    return found[steps]


def test_a_run_is_the_same_alone_and_beside_others() -> None:
    (alone,) = trained([3], [0.1])
    beside = trained([5, 3, 3], [0.03, 0.1, 0.03])
    assert beside[1] == pytest.approx(alone, rel=1e-9)
    assert beside[2] != pytest.approx(alone, rel=1e-3)


def test_stacked_adam_is_adam_run_by_run() -> None:
    g = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 5, generator=g), torch.randn(2, 5, generator=g)
    stacked = start.clone().requires_grad_()
    optimizer = StackedAdam([stacked], torch.tensor([0.1, 0.01]), clip=1.0)
    for _ in range(20):
        loss = (stacked - target).pow(2).sum()
        optimizer.step(torch.autograd.grad(loss, [stacked]))
    for run, rate in enumerate((0.1, 0.01)):
        p = start[run].clone().requires_grad_()
        adam = torch.optim.Adam([p], lr=rate)
        for _ in range(20):
            adam.zero_grad()
            (p - target[run]).pow(2).sum().backward()
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            adam.step()
        torch.testing.assert_close(stacked[run], p)


def test_draws_have_the_sampler_s_frequencies_and_never_what_it_excludes() -> None:
    sampler = torch.tensor([[[0.5, 0.0, 0.2, 0.3]], [[0.1, 0.9, 0.0, 0.0]]], dtype=torch.float64).log()
    prompts = torch.zeros(2, 500, dtype=torch.long)
    drawn = draw(sampler, prompts, Dice([1, 2]).throw(500, 8))
    for run in range(2):
        frequency = drawn[run].flatten().bincount(minlength=4) / drawn[run].numel()
        torch.testing.assert_close(frequency.double(), sampler[run, 0].exp(), atol=0.03, rtol=0)
        assert (frequency[sampler[run, 0].isinf()] == 0).all()


def test_a_log_is_gone_through_once_an_epoch() -> None:
    policies = sequences.SequencePolicies([1])
    table = policies.table().detach()
    problem = Problem(sequences.REWARDS[None], table, [1], torch.tensor([0.0]), 0.3)
    log = make_log(table.sum(-1), [1], 12, 4)
    seen: list[torch.Tensor] = []

    def loss(responses):
        seen.append(responses.reference.sum(1).view(-1, 4).sum(1))
        return responses.policy.sum()

    train(policies, problem, log, loss, steps=6, groups=4, k=4)
    of_log = pick(table.sum(-1), log.prompts, log.responses).view(-1, 4).sum(1)
    for epoch in (seen[:3], seen[3:]):
        torch.testing.assert_close(torch.cat(epoch).sort().values, of_log.sort().values)
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))


def test_the_sequence_policy_is_a_distribution_that_factors_over_its_tokens() -> None:
    table = sequences.SequencePolicies([4, 5]).table()
    torch.testing.assert_close(table.sum(-1).exp().sum(-1), torch.ones(2, sequences.PROMPTS))
    first = table[..., 0].exp().view(2, sequences.PROMPTS, 6, 36)
    torch.testing.assert_close(first.std(-1), torch.zeros_like(first[..., 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(first[..., 0].sum(-1), torch.ones(2, sequences.PROMPTS))
    right = sequences.RESPONSES.sum(1)[None] == torch.arange(16)[:, None]
    assert torch.equal(sequences.REWARDS == 1, right)


def test_measures_are_zero_at_the_optimum_and_the_frontier_runs_through_it() -> None:
    reference = sequences.pretrained([6], skew=-0.5, noise=0.5, steps=50).table().detach()
    problem = Problem(sequences.REWARDS[None], reference, [6], torch.tensor([0.1]), 0.3)

    class Optimum:
        parameters: list = []  # noqa: RUF012

        def table(self):
            return problem.optimum[..., None]

    (found,) = measure(Optimum(), problem)
    assert abs(found["kl_optimum"]) < 1e-12
    assert abs(found["kl_from_optimum"]) < 1e-12
    assert found["kl_reference"] > 0.1
    p = problem.optimum.exp()
    assert found["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    frontier = Frontier(reference[0].sum(-1))
    assert frontier.reward_at(found["kl_reference"]) == pytest.approx(found["reward"], abs=1e-4)
    assert frontier.reward_at(1e9) == pytest.approx(float(frontier.reward[-1]))
    assert math.isfinite(frontier.reward_at(0.0))


@pytest.mark.slow
def test_gvpo_comes_to_the_optimum_from_samplers_that_cover_it() -> None:
    """The published page's central claim, at a reduced size; the whole table is `gvpo lab optimum`."""
    names = ("on-policy", "T=1.5", "quantised", "perturbed", "reference", "uniform")
    problem = problem_of([1] * len(names), [0.2] * len(names))
    drawn = optimum.make_problem(1)

    def sampler(table: torch.Tensor) -> torch.Tensor:
        rows = [optimum.sampler_logps(n, table[i, 0, :, 0], drawn) for i, n in enumerate(names)]
        return torch.stack(rows)[:, None]

    policies = optimum.Tables(problem.reference[:, 0, :, 0])
    found = train(policies, problem, sampler, GVPO(beta=0.2), steps=1500, groups=16, k=8)[1500]
    assert max(run["kl_optimum"] for run in found) < 1e-3
    assert found[1]["kl_optimum"] < 1e-6
    assert found[5]["kl_optimum"] < 1e-6
