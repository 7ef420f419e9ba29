"""Which rows an update takes: whole prompts to a mini-batch, and as few rows of no weight as will do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Prompt = TypeVar("Prompt")


def split_prompts(
    prompts: Sequence[Prompt], size: int, epochs: int = 1, shuffle_seed: int | None = None
) -> Iterator[list[Prompt]]:
    """Mini-batches of `size` prompts for each epoch; the last of an epoch holds what remains.

    Args:
        prompts: the prompts of a rollout, each once.
        size: prompts in a mini-batch.
        epochs: passes over the prompts.
        shuffle_seed: if given, each epoch has an order of its own, which the seed fixes.
    """
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    for _ in range(epochs):
        order = list(prompts)
        if generator is not None:
            order = [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
        for start in range(0, len(order), size):
            yield order[start : start + size]


def rows_short(rows: int, multiple: int) -> int:
    """How many rows more make `rows` a multiple of `multiple`."""
    return -rows % multiple


def choose_rows(
    weights: Float[Tensor, "rows"], lengths: Sequence[int], multiple: int, *, padding: int = 0
) -> list[int]:
    """The rows of an update: all of weight other than 0, filled up to a multiple by the shortest others.

    Rows of weight 0 add nothing to the gradient (docs/theory.md, fact 4): leaving them out is exact, and so
    is taking them as filling.

    Args:
        weights: (rows,).
        lengths: tokens of each row.
        multiple: the number of rows must be a multiple of this, and is at least this.
        padding: how many of the rows, the last ones, are taken only when no others are left.

    Returns:
        Row numbers, ascending.
    """
    used = weights.nonzero()[:, 0].tolist()
    idle = (weights == 0).nonzero()[:, 0].tolist()
    short = rows_short(len(used), multiple) if used else multiple
    filling = sorted(idle, key=lambda i: (i >= len(weights) - padding, lengths[i]))[:short]
    if len(filling) < short:
        raise ValueError(f"an update needs {short} rows of weight 0 to fill it up and has {len(filling)}.")
    return sorted(used + filling)
