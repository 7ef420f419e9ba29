"""Micro-batches under a token budget: which rows go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# What starting one more micro-batch costs, in tokens of work: breaks ties towards fewer, larger ones.
START_COST = 64


def plan_micro_batches(lengths: Sequence[int], rows: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split `rows` into micro-batches with the fewest padded tokens, longest rows first.

    A micro-batch of n rows is as wide as its longest, so it costs n · width tokens; n · width stays within
    `token_budget`, except that a single row longer than the budget gets a micro-batch of its own. Rows are
    sorted by length and cut by dynamic programming.

    Args:
        lengths: tokens of every row of the batch.
        rows: the rows to place (indices into `lengths`).
        token_budget: padded tokens per micro-batch, at least 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1 token, got {token_budget}.")
    # The index breaks ties, so that the plan depends on nothing but the lengths.
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    n = len(ordered)
    best = torch.full((n + 1,), torch.inf, dtype=torch.float64)  # best[j]: least cost of the first j rows
    best[0] = 0
    cut = torch.zeros(n + 1, dtype=torch.long)  # the micro-batch that ends before j starts at cut[j]
    counts = torch.arange(1, n + 1, dtype=torch.float64)
    for start, row in enumerate(ordered):
        width = max(lengths[row], 1)
        most = min(n - start, max(1, token_budget // width))
        cost = best[start] + counts[:most] * width + START_COST
        ends = slice(start + 1, start + 1 + most)
        cut[ends].masked_fill_(cost < best[ends], start)
        best[ends] = torch.minimum(best[ends], cost)
    plan = []
    cuts, end = cut.tolist(), n
    while end:
        plan.append(ordered[cuts[end] : end])
        end = cuts[end]
    return plan[::-1]
