"""The rows of a rollout as the driver sees them, GVPO's weights for them, and which an update takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gvpo.objective import GVPOLoss, gvpo_loss


@dataclass(frozen=True)
class Rollouts:
    """Rows of a rollout, a few numbers each.

    A *session* is one response to a prompt. It is mostly one row; an agent that rewrites its context leaves
    several, whose log-probabilities add up to the session's.

    Attributes:
        sessions: prompt and session of each row.
        reference: S', sequence log-probabilities under the reference, in nats.
        start: S when the step began, before its first update, in nats; NaN where that is not known.
        rewards: R of each row, NaN where it has none; a session's is that of its last row.
        valid: False for padding rows and rows without a token that counts.
        ages: updates made since the oldest response of the row's group was begun.
    """

    sessions: list[tuple[str, str]]
    reference: Float[Tensor, "rows"]
    start: Float[Tensor, "rows"]
    rewards: Float[Tensor, "rows"]
    valid: Bool[Tensor, "rows"]
    ages: Int[Tensor, "rows"]

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row."""
        return [prompt for prompt, _ in self.sessions]

    def take(self, rows: Sequence[int]) -> Rollouts:
        """These rows, in this order."""
        at = torch.as_tensor(rows, dtype=torch.long)
        taken: dict[str, Any] = {
            name: column[at] if isinstance(column, Tensor) else [column[i] for i in rows]
            for name, column in vars(self).items()
        }
        return Rollouts(**taken)


def row_sums(values: Tensor, mask: Tensor) -> Float[Tensor, "rows"]:
    """Sums of jagged `values` over the tokens where jagged `mask` is not 0, in float64."""
    lengths = mask.offsets().diff()  # type: ignore[attr-defined]
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    # A token that does not count may hold anything.
    counted = torch.where(mask.values() != 0, values.values().double(), 0.0)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, row, counted)


def weigh(
    rollouts: Rollouts, policy: Float[Tensor, "rows"], beta: float
) -> tuple[Float[Tensor, "rows"], GVPOLoss]:
    """GVPO's weight of each row of a mini-batch under the current policy, and the loss with its diagnostics.

    Groups are whole, rows in any order; `policy` is S in nats. A session without a reward is no member of its
    group.

    Raises:
        NonFiniteError: a log-probability or reward that counts is not a finite number.
    """
    numbers: dict[tuple[str, str], int] = {}
    session = torch.tensor([numbers.setdefault(name, len(numbers)) for name in rollouts.sessions])
    prompt_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(rollouts.prompts))}
    group_ids = torch.tensor([prompt_of[prompt] for prompt, _ in numbers])

    def per_session(rows: Tensor) -> Tensor:
        kept = torch.where(rollouts.valid, rows, 0.0)
        return torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, session, kept)

    rewards = torch.zeros(len(numbers), dtype=torch.float64)
    rewards[session] = rollouts.rewards  # rows of a session share their reward
    mask = torch.zeros(len(numbers), dtype=torch.bool)
    mask[session[rollouts.valid]] = True
    mask &= ~rewards.isnan()
    result = gvpo_loss(
        per_session(policy), per_session(rollouts.reference), rewards, group_ids, beta=beta, mask=mask
    )
    # ∂S_session/∂S_row = 1: a session's weight is that of each of its rows.
    return torch.where(rollouts.valid, result.weights[session], 0.0), result


def rows_short(rows: int, multiple: int) -> int:
    """How many rows more make `rows` a multiple of `multiple`."""
    return -rows % multiple


def choose_rows(
    weights: Float[Tensor, "rows"], lengths: Sequence[int], multiple: int, *, padding: int = 0
) -> list[int]:
    """The rows of an update: all of weight other than 0, filled up to a multiple by the shortest others.

    Rows of weight 0 add nothing to the gradient (docs/theory.md, fact 4): leaving them out is exact, and so
    is taking them as filling.

    `lengths` are in tokens. The last `padding` rows are taken only when no others are left. Row numbers come
    ascending; there are at least `multiple` of them, and a multiple of it.
    """
    used = weights.nonzero()[:, 0].tolist()
    idle = (weights == 0).nonzero()[:, 0].tolist()
    short = rows_short(len(used), multiple) if used else multiple
    filling = sorted(idle, key=lambda i: (i >= len(weights) - padding, lengths[i]))[:short]
    if len(filling) < short:
        raise ValueError(f"an update needs {short} rows of weight 0 to fill it up and has {len(filling)}.")
    return sorted(used + filling)
