"""A neural autoregressive policy whose responses can all be listed: three digits below six for a wanted sum.

Sixteen prompts ask for the sums 0 … 15 of three symbols 0 … 5; a reward of 1 is for the sum asked for, and it
falls by a third for each unit beside it. Most prompts have many good answers among the 216 responses, and the
parameters are shared among prompts and prefixes, as in a language model. Runs are stacked as in `exact.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.exact import StackedAdam

if TYPE_CHECKING:
    from jaxtyping import Float

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


class SequencePolicies:
    """A multilayer perceptron from prompt and prefix to the next symbol, one for each seed given."""

    def __init__(self, seeds: Sequence[int]) -> None:
        initial = [self._initial(seed) for seed in seeds]
        self.parameters = [torch.stack(ps).requires_grad_() for ps in zip(*initial, strict=True)]

    @staticmethod
    def _initial(seed: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=g) * scale

        return [
            normal(PROMPTS, 1, WIDTH, scale=0.7),
            normal(SYMBOLS + 1, WIDTH, scale=0.7),
            normal(SYMBOLS + 1, WIDTH, scale=0.7),
            normal(WIDTH, WIDTH, scale=1 / math.sqrt(WIDTH)),
            torch.zeros(1, WIDTH),
            normal(WIDTH, SYMBOLS, scale=1 / math.sqrt(WIDTH)),
            torch.zeros(1, SYMBOLS),
        ]

    def copies(self, rows: Sequence[int]) -> SequencePolicies:
        """New policies that start as the given ones of these."""
        new = SequencePolicies.__new__(SequencePolicies)
        new.parameters = [p.detach()[list(rows)].clone().requires_grad_() for p in self.parameters]
        return new

    def _logits(self) -> Float[Tensor, "runs prompts prefixes symbols"]:
        prompt, first, second, hidden, hidden_bias, head, head_bias = self.parameters
        x = prompt + (first[:, _PREFIXES[:, 0]] + second[:, _PREFIXES[:, 1]])[:, None]
        x = torch.relu(x).flatten(1, 2)
        x = torch.relu(torch.baddbmm(hidden_bias, x, hidden))
        return torch.baddbmm(head_bias, x, head).view(len(x), PROMPTS, len(_PREFIXES), SYMBOLS)

    def table(self) -> Float[Tensor, "runs prompts responses tokens"]:
        return self._logits().log_softmax(-1)[:, :, _PREFIX_OF_TOKEN, RESPONSES]

    def values(self) -> Float[Tensor, "runs prompts"]:
        return self._logits()[:, :, 0].logsumexp(-1)


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
