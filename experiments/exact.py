"""Policies over so few responses that all can be listed, many runs of them trained side by side.

A *run* is one seed, one learning rate, one sampler; runs are stacked along the first dimension of every
tensor and share nothing but the time. What a run draws comes from its seed alone, so that a seed gives the
same numbers whatever else runs beside it, and every algorithm meets the same dice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from experiments.losses import Loss
from experiments.responses import Responses

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Table = Tensor  # (runs, prompts, responses, tokens): log-probabilities of all responses, in nats


class Policies(Protocol):
    """As many policies as there are runs."""

    parameters: list[Tensor]

    def table(self) -> Float[Tensor, "runs prompts responses tokens"]: ...

    def values(self) -> Float[Tensor, "runs prompts"]:
        """Log-sum-exp of the logits before the first token."""
        ...


class StackedAdam:
    """Adam (Kingma & Ba) with a learning rate, and a gradient clipped to norm `clip`, for each run."""

    def __init__(
        self, parameters: list[Tensor], rates: Float[Tensor, "runs"], clip: float = math.inf
    ) -> None:
        self.parameters, self.rates, self.clip = parameters, rates, clip
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], scale: float = 1.0) -> None:
        """One update; `scale` multiplies the learning rates (a schedule)."""
        self.count += 1
        bias1, bias2 = 1 - 0.9**self.count, 1 - 0.999**self.count
        norm = sum(g.flatten(1).pow(2).sum(1) for g in gradients)
        assert isinstance(norm, Tensor)
        shrink = (self.clip / (norm.sqrt() + 1e-12)).clamp(max=1)
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            shape = (-1, *[1] * (p.dim() - 1))
            g = g * shrink.view(shape)
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            p.sub_((self.rates * (scale / bias1)).view(shape) * m / ((v / bias2).sqrt() + 1e-8))


@dataclass
class Problem:
    """What the runs are trained on.

    Attributes:
        rewards: R of every response.
        reference: the table of π_θ', without gradient.
        seeds: of each run.
        rates: the learning rate of each run.
        beta: of the optimum π* that runs are measured against.
        reference_rewards: R of n responses of the reference to each prompt, drawn before training.
        flips: how likely it is that a reward R is seen as 1 − R; what is measured is R.
        mask: False behind the end of a response; all tokens count if there is none.
    """

    rewards: Float[Tensor, "runs prompts responses"]
    reference: Float[Tensor, "runs prompts responses tokens"]
    seeds: list[int]
    rates: Float[Tensor, "runs"]
    beta: float
    reference_rewards: Float[Tensor, "runs prompts n"] | None = None
    flips: Float[Tensor, "runs prompts responses"] | None = None
    mask: Bool[Tensor, "responses tokens"] | None = None

    @property
    def optimum(self) -> Float[Tensor, "runs prompts responses"]:
        """log π*, with π* ∝ π_θ' exp(R/β)."""
        return (self.reference.double().sum(-1) + self.rewards.double() / self.beta).log_softmax(-1)


class Dice:
    """Uniform numbers for each run, those of one seed alike."""

    def __init__(self, seeds: Sequence[int]) -> None:
        names = sorted(set(seeds))
        self._generators = [torch.Generator().manual_seed(name) for name in names]
        self._run = torch.tensor([names.index(seed) for seed in seeds])

    def throw(self, *shape: int) -> Float[Tensor, "runs *shape"]:
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators])[self._run]


def draw(
    sampler: Float[Tensor, "runs prompts responses"],
    prompts: Int[Tensor, "runs groups"],
    uniform: Float[Tensor, "runs groups k"],
) -> Int[Tensor, "runs groups k"]:
    """Responses to `prompts`, of the distribution with log-probabilities `sampler`."""
    cumulative = sampler.double().exp().cumsum(-1)[torch.arange(len(prompts))[:, None], prompts]
    found = torch.searchsorted(cumulative, uniform.double() * cumulative[..., -1:], right=True)
    return found.clamp(max=cumulative.shape[-1] - 1)


def pick(
    table: Float[Tensor, "runs prompts responses *tokens"],
    prompts: Int[Tensor, "runs groups"],
    responses: Int[Tensor, "runs groups k"],
) -> Float[Tensor, "rows *tokens"]:
    """Entries of a table, flattened run by run, group by group."""
    runs, n_prompts, n_responses = table.shape[:3]
    index = (torch.arange(runs)[:, None, None] * n_prompts + prompts[:, :, None]) * n_responses + responses
    return table.flatten(0, 2)[index.flatten()]


@dataclass(frozen=True)
class Log:
    """Responses that were drawn once, with the sampler's log-probabilities."""

    prompts: Int[Tensor, "runs groups"]
    responses: Int[Tensor, "runs groups k"]
    sampler: Float[Tensor, "runs prompts responses"]


def make_log(
    sampler: Float[Tensor, "runs prompts responses"], seeds: Sequence[int], groups: int, k: int
) -> Log:
    """`groups` groups of k responses for each run."""
    dice = Dice([seed + 7919 for seed in seeds])
    prompts = (dice.throw(groups) * sampler.shape[1]).long()
    return Log(prompts, draw(sampler, prompts, dice.throw(groups, k)), sampler)


Sampler = Callable[[Table], Tensor]  # from the policies' table to (runs, prompts, responses), in nats


def train(
    policies: Policies,
    problem: Problem,
    source: Sampler | Log,
    loss: Loss,
    *,
    steps: int,
    groups: int,
    k: int,
    clip: float = math.inf,
    constant: bool = False,
    measure_at: Sequence[int] = (),
) -> dict[int, list[dict[str, float]]]:
    """Train all runs with one loss, one update a step.

    Args:
        policies: start, and are left trained.
        problem: as above.
        source: what to sample from before each update; or a log, gone through in a new order each epoch.
        loss: of all rows together, a mean over groups.
        steps, groups, k: updates; groups of k responses in each.
        clip: largest norm of a run's gradient.
        constant: keep the learning rate; else it falls linearly to 0.
        measure_at: steps after which to measure; the last one always is.

    Returns:
        For each of these steps the `measure` of every run.
    """
    runs = len(problem.seeds)
    dice, optimizer = Dice(problem.seeds), StackedAdam(policies.parameters, problem.rates, clip)
    rows_of = _epochs(source, dice, groups) if isinstance(source, Log) else None
    history = {}
    for step in range(steps):
        table = policies.table()
        if isinstance(source, Log):
            assert rows_of is not None
            rows = next(rows_of)
            prompts = source.prompts.gather(1, rows)
            responses = source.responses.gather(1, rows[:, :, None].expand(-1, -1, k))
            sampler = source.sampler
        else:
            sampler = source(table.detach())
            prompts = (dice.throw(groups) * table.shape[1]).long()
            responses = draw(sampler, prompts, dice.throw(groups, k))
        batch = _batch(problem, table, sampler, prompts, responses, dice)
        if isinstance(source, Log):
            # A log was there before training: the policy that first met it was the reference.
            batch.rollout = batch.reference
        if getattr(loss, "wants_values", False):
            batch.values = policies.values().gather(1, prompts).flatten()
        # The mean over all runs' rows, times runs: each run's own mean.
        gradients = torch.autograd.grad(loss(batch) * runs, policies.parameters)
        optimizer.step(gradients, 1.0 if constant else 1 - step / steps)
        if step + 1 in measure_at or step + 1 == steps:
            history[step + 1] = measure(policies, problem)
    return history


def _batch(
    problem: Problem,
    table: Table,
    sampler: Float[Tensor, "runs prompts responses"],
    prompts: Int[Tensor, "runs groups"],
    responses: Int[Tensor, "runs groups k"],
    dice: Dice,
) -> Responses:
    """What a loss is given of responses that were drawn."""
    policy, reference = (pick(t, prompts, responses) for t in (table, problem.reference))
    rewards = pick(problem.rewards, prompts, responses).to(policy.dtype)
    if problem.flips is not None:
        flipped = dice.throw(*responses.shape[1:]).flatten() < pick(problem.flips, prompts, responses)
        rewards = torch.where(flipped, 1 - rewards, rewards)
    others = problem.reference_rewards
    runs, n_prompts = table.shape[:2]
    return Responses(
        policy=policy,
        rollout=policy.detach(),
        reference=reference,
        behaviour=pick(sampler, prompts, responses).to(policy.dtype),
        rewards=rewards,
        mask=torch.ones_like(policy, dtype=torch.bool)
        if problem.mask is None
        else problem.mask[responses.flatten()],
        k=responses.shape[2],
        prompts=(torch.arange(runs)[:, None] * n_prompts + prompts).flatten(),
        reference_rewards=None
        if others is None
        else others.to(policy.dtype)[torch.arange(runs)[:, None], prompts].flatten(0, 1),
    )


def from_reference(problem: Problem, n: int) -> Float[Tensor, "runs prompts n"]:
    """R of n responses of the reference to each prompt, drawn apart from what training draws."""
    dice = Dice([seed + 104_729 for seed in problem.seeds])
    runs, n_prompts = problem.rewards.shape[:2]
    every = torch.arange(n_prompts).expand(runs, -1)
    drawn = draw(problem.reference.sum(-1), every, dice.throw(n_prompts, n))
    return pick(problem.rewards, every, drawn).view(runs, n_prompts, n)


def _epochs(log: Log, dice: Dice, groups: int) -> Iterator[Int[Tensor, "runs groups"]]:
    """Which groups of the log each step takes: an order for each run and epoch."""
    while True:
        order = dice.throw(log.prompts.shape[1]).argsort(1)
        yield from (rows for rows in order.split(groups, dim=1) if rows.shape[1] == groups)


@torch.no_grad()
def measure(policies: Policies, problem: Problem) -> list[dict[str, float]]:
    """Exact expectations of each run, in float64, means over the prompts.

    `kl_optimum` is KL(π‖π*), `kl_from_optimum` KL(π*‖π), `kl_reference` KL(π‖π_θ'), all in nats; `reward` is
    E[R]; `entropy` is that of a response.
    """
    logp = policies.table().double().sum(-1).log_softmax(-1)
    reference, optimum = problem.reference.double().sum(-1), problem.optimum
    p = logp.exp()

    def expect(weights: Tensor, values: Tensor) -> Tensor:
        return torch.where(weights > 0, weights * values, 0.0).sum(-1).mean(-1)

    columns = {
        "kl_optimum": expect(p, logp - optimum),
        "kl_from_optimum": expect(optimum.exp(), optimum - logp),
        "kl_reference": expect(p, logp - reference),
        "reward": expect(p, problem.rewards.double()),
        "entropy": -expect(p, logp),
    }
    return [{name: v[run].item() for name, v in columns.items()} for run in range(len(p))]
