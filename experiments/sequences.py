"""A neural autoregressive policy whose responses can all be listed: three digits below six for a wanted sum.

Sixteen prompts ask for the sums 0 … 15 of three symbols 0 … 5; a reward of 1 is for the sum asked for, and it
falls by a third for each unit beside it. Most prompts have many good answers among the 216 responses, and the
parameters are shared among prompts and prefixes, as in a language model. Runs are stacked as in `exact.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from experiments.comparison import Arm, Record, Scale
from experiments.exact import Problem, StackedAdam, from_reference, train

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SYMBOLS, LENGTH, PROMPTS, WIDTH = 6, 3, 16, 32
RESPONSES = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * LENGTH)
REWARDS = (1 - (RESPONSES.sum(1)[None] - torch.arange(PROMPTS)[:, None]).abs() / 3).clamp(min=0)

_NONE = SYMBOLS  # stands where no symbol has come yet
_PREFIXES = torch.cat(
    [
        torch.tensor([[_NONE, _NONE]]),
        torch.stack([torch.arange(SYMBOLS), torch.full((SYMBOLS,), _NONE)], 1),
        torch.cartesian_prod(torch.arange(SYMBOLS), torch.arange(SYMBOLS)),
    ]
)
_PREFIX_OF_TOKEN = torch.stack(
    [
        torch.zeros(len(RESPONSES), dtype=torch.long),
        1 + RESPONSES[:, 0],
        1 + SYMBOLS + RESPONSES[:, 0] * SYMBOLS + RESPONSES[:, 1],
    ],
    1,
)


class NeuralPolicies:
    """A multilayer perceptron from prompt and prefix to the next symbol, one for each seed given.

    What a subclass says of its task:

    Attributes:
        prompts, width, symbols: how many there are.
        prefixes: two features of each prefix, numbers from 0.
        values_of: how many values each feature has.
        tokens, prefix_of_token: of all responses; and which prefix each token comes after.
    """

    prompts: int
    width: int
    symbols: int
    values_of: tuple[int, int]
    prefixes: Int[Tensor, "prefixes 2"]
    tokens: Int[Tensor, "responses tokens"]
    prefix_of_token: Int[Tensor, "responses tokens"]

    def __init__(self, seeds: Sequence[int]) -> None:
        initial = [self._initial(seed) for seed in seeds]
        self.parameters = [torch.stack(ps).requires_grad_() for ps in zip(*initial, strict=True)]

    def _initial(self, seed: int) -> list[Tensor]:
        g, width = torch.Generator().manual_seed(seed), self.width

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=g) * scale

        return [
            normal(self.prompts, 1, width, scale=0.7),
            *(normal(n, width, scale=0.7) for n in self.values_of),
            normal(width, width, scale=1 / math.sqrt(width)),
            torch.zeros(1, width),
            normal(width, self.symbols, scale=1 / math.sqrt(width)),
            torch.zeros(1, self.symbols),
        ]

    def copies(self, rows: Sequence[int]) -> Self:
        """New policies that start as the given ones of these."""
        new = type(self).__new__(type(self))
        new.parameters = [p.detach()[list(rows)].clone().requires_grad_() for p in self.parameters]
        return new

    def logits(self) -> Float[Tensor, "runs prompts prefixes symbols"]:
        prompt, first, second, hidden, hidden_bias, head, head_bias = self.parameters
        x = prompt + (first[:, self.prefixes[:, 0]] + second[:, self.prefixes[:, 1]])[:, None]
        x = torch.relu(x).flatten(1, 2)
        x = torch.relu(torch.baddbmm(hidden_bias, x, hidden))
        return torch.baddbmm(head_bias, x, head).view(len(x), self.prompts, -1, self.symbols)

    def table(self) -> Float[Tensor, "runs prompts responses tokens"]:
        return self.logits().log_softmax(-1)[:, :, self.prefix_of_token, self.tokens]

    def values(self) -> Float[Tensor, "runs prompts"]:
        return self.logits()[:, :, 0].logsumexp(-1)


class SequencePolicies(NeuralPolicies):
    """For this task: the features of a prefix are its two symbols."""

    prompts, width, symbols, values_of = PROMPTS, WIDTH, SYMBOLS, (SYMBOLS + 1, SYMBOLS + 1)
    prefixes, tokens, prefix_of_token = _PREFIXES, RESPONSES, _PREFIX_OF_TOKEN


def run_arm(
    arm: Arm,
    scale: Scale,
    references: SequencePolicies,
    condition: str,
    *,
    steps: int,
    groups: int,
    k: int,
    beta: float,
    rewards: Float[Tensor, "prompts responses"] = REWARDS,
    flips: Float[Tensor, "seeds prompts responses"] | None = None,
    sampler: SequencePolicies | None = None,
    reference_n: int = 0,
) -> list[Record]:
    """All settings and seeds of an arm under one condition; samples are the policy's or `sampler`'s.

    `references` are those of all seeds, from which training starts; `reference_n` as in `from_reference`.
    """
    records = []
    for setting, rates in arm.by_loss():
        runs = [(seed, rate) for seed in scale.all_seeds for rate in rates]
        row = [scale.all_seeds.index(seed) for seed, _ in runs]
        seeds, lrs = [seed for seed, _ in runs], torch.tensor([rate for _, rate in runs])
        reference = references.table().detach()[row]
        problem = Problem(rewards.expand(len(runs), -1, -1), reference, seeds, lrs, beta)
        problem.flips = None if flips is None else flips[row]
        if reference_n:
            problem.reference_rewards = from_reference(problem, reference_n)
        fixed = None if sampler is None else sampler.table().detach()[row].sum(-1)

        def source(table: Tensor, fixed: Tensor | None = fixed) -> Tensor:
            return table.sum(-1) if fixed is None else fixed

        policies, loss = references.copies(row), arm.loss(**setting)
        found = train(policies, problem, source, loss, steps=steps, groups=groups, k=k, clip=1.0)
        records += [
            Record(arm.name, condition, {"lr": rate, **setting}, seed, metrics)
            for (seed, rate), metrics in zip(runs, found[steps], strict=True)
        ]
    return records


def pretrained(seeds: Sequence[int], *, skew: float, noise: float, steps: int = 400) -> SequencePolicies:
    """Policies that have seen a teacher: right sums, preferring first symbols by `skew`, and `noise`.

    A share 1 − noise of the teacher's answers is right, more often so with a larger (skew > 0) or smaller
    (skew < 0) first symbol; the others are uniform over all responses.
    """
    policies = SequencePolicies(seeds)
    right = (REWARDS == 1).float() * torch.exp(skew * RESPONSES[:, 0].float())
    teacher = (1 - noise) * right / right.sum(1, keepdim=True) + noise / len(RESPONSES)
    optimizer = StackedAdam(policies.parameters, torch.full((len(seeds),), 5e-3))
    for _ in range(steps):
        loss = -(teacher * policies.table().sum(-1)).sum(-1).mean(-1).sum()
        optimizer.step(torch.autograd.grad(loss, policies.parameters))
    return policies
