"""A neural policy whose responses have one to four symbols and an end, all of them listed.

Eight prompts want a first symbol each, 0 … 2; one that begins with it has the reward 1, whatever follows. So
the reward says nothing about length: what training adds or takes is a bias of the loss. Runs are stacked
as in `exact.py`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.sequences import NeuralPolicies

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
_NO_END_FIRST = torch.zeros(len(_PREFIXES), SYMBOLS + 1)
_NO_END_FIRST[0, _END] = -torch.inf


class LengthPolicies(NeuralPolicies):
    """For this task: the features of a prefix are its last symbol and its length."""

    prompts, width, symbols, values_of = PROMPTS, WIDTH, SYMBOLS + 1, (SYMBOLS + 1, LONGEST)
    prefixes = torch.tensor([[p[-1] if p else SYMBOLS, len(p)] for p in _PREFIXES])
    tokens, prefix_of_token = _TOKEN, _PREFIX_OF_TOKEN

    def logits(self) -> Float[Tensor, "runs prompts prefixes symbols"]:
        return super().logits() + _NO_END_FIRST

    def table(self) -> Float[Tensor, "runs prompts responses tokens"]:
        return torch.where(MASK, super().table(), 0.0)
