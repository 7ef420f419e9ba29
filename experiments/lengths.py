"""A neural policy whose responses have one to four symbols and an end, all of them listed.

Eight prompts want a first symbol each, 0 … 2; one that begins with it has the reward 1, whatever follows. So
the reward says nothing about length: what training adds or takes is a bias of the loss. Runs are stacked
as in `exact.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

SYMBOLS, LONGEST, PROMPTS, WIDTH = 3, 4, 8, 24
_END = SYMBOLS
_PREFIXES = [p for n in range(LONGEST) for p in itertools.product(range(SYMBOLS), repeat=n)]
_TEXTS = [t for n in range(1, LONGEST + 1) for t in itertools.product(range(SYMBOLS), repeat=n)]
LENGTHS = torch.tensor([len(text) for text in _TEXTS])
REWARDS = torch.tensor([[float(text[0] == x % SYMBOLS) for text in _TEXTS] for x in range(PROMPTS)])

# The tokens of each response: its symbols, and the end where it is not the longest, which ends by itself.
_TOKENS = [[*text, _END][:LONGEST] for text in _TEXTS]
MASK = torch.tensor([[t < len(tokens) for t in range(LONGEST)] for tokens in _TOKENS])
_PREFIX_OF_TOKEN = torch.tensor(
    [[_PREFIXES.index(text[:t]) if t <= len(text) else 0 for t in range(LONGEST)] for text in _TEXTS]
)
_TOKEN = torch.tensor([[tokens[t] if t < len(tokens) else 0 for t in range(LONGEST)] for tokens in _TOKENS])
_LAST = torch.tensor([p[-1] if p else SYMBOLS for p in _PREFIXES])
_LENGTH = torch.tensor([len(p) for p in _PREFIXES])
_NO_END_FIRST = torch.zeros(len(_PREFIXES), SYMBOLS + 1)
_NO_END_FIRST[0, _END] = -torch.inf


class LengthPolicies:
    """A multilayer perceptron from prompt, last symbol and length to the next symbol, one for each seed."""

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
            normal(LONGEST, WIDTH, scale=0.7),
            normal(WIDTH, WIDTH, scale=1 / math.sqrt(WIDTH)),
            torch.zeros(1, WIDTH),
            normal(WIDTH, SYMBOLS + 1, scale=1 / math.sqrt(WIDTH)),
            torch.zeros(1, SYMBOLS + 1),
        ]

    def _logits(self) -> Float[Tensor, "runs prompts prefixes symbols"]:
        prompt, last, length, hidden, hidden_bias, head, head_bias = self.parameters
        x = torch.relu(prompt + (last[:, _LAST] + length[:, _LENGTH])[:, None]).flatten(1, 2)
        x = torch.relu(torch.baddbmm(hidden_bias, x, hidden))
        logits = torch.baddbmm(head_bias, x, head).view(len(x), PROMPTS, len(_PREFIXES), SYMBOLS + 1)
        return logits + _NO_END_FIRST

    def table(self) -> Float[Tensor, "runs prompts responses tokens"]:
        logps = self._logits().log_softmax(-1)[:, :, _PREFIX_OF_TOKEN, _TOKEN]
        return torch.where(MASK, logps, 0.0)

    def values(self) -> Float[Tensor, "runs prompts"]:
        return self._logits()[:, :, 0].logsumexp(-1)
