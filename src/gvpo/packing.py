"""Micro-batches under a token budget: which rows go together, and which prompts are read before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo.batch import Beginnings

# What one more micro-batch costs on a CPU, in tokens of work: breaks ties towards fewer, larger ones.
START_COST = 64


@dataclass
class Block:
    """A part of a step: beginnings that are read first, and micro-batches of rows that go on after them."""

    beginnings: list[int]
    micro_batches: list[list[int]]


def plan_micro_batches(
    lengths: Sequence[int], rows: Sequence[int], token_budget: int, start_cost: float = START_COST
) -> list[list[int]]:
    """Split `rows` into micro-batches with the fewest padded tokens, longest rows first.

    A micro-batch of n rows is as wide as its longest, so it costs n · width tokens; n · width stays within
    `token_budget`, except that a single row longer than the budget gets a micro-batch of its own. Rows are
    sorted by length and cut by dynamic programming.

    Args:
        lengths: tokens of every row of the batch.
        rows: the rows to place (indices into `lengths`).
        token_budget: padded tokens per micro-batch, at least 1.
        start_cost: what starting one more micro-batch costs, in tokens of work.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1 token, got {token_budget}.")
    # The index breaks ties, so that the plan depends on nothing but the lengths.
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    n = len(ordered)
    best = np.full(n + 1, np.inf)  # best[j]: least cost of the first j rows
    best[0] = 0
    cut = np.zeros(n + 1, dtype=np.int64)  # the micro-batch that ends before j starts at cut[j]
    counts = np.arange(1, n + 1)
    for start, row in enumerate(ordered):
        width = max(lengths[row], 1)
        most = min(n - start, max(1, token_budget // width))
        cost = best[start] + counts[:most] * width + start_cost
        ends = slice(start + 1, start + 1 + most)
        cut[ends] = np.where(cost < best[ends], start, cut[ends])
        best[ends] = np.minimum(best[ends], cost)
    plan = []
    cuts, end = cut.tolist(), n
    while end:
        plan.append(ordered[cuts[end] : end])
        end = cuts[end]
    return plan[::-1]


def plan_blocks(
    beginnings: Beginnings,
    rows: Sequence[int],
    token_budget: int,
    weight: float = 1.0,
    prompt_cost: float = 0.0,
    limit: float = float("inf"),
    start_cost: float = START_COST,
) -> tuple[list[Block], float]:
    """Blocks in which `rows` share their beginnings, and what they cost in tokens of work.

    A block's beginnings stay in memory while its micro-batches run: together they stay within `token_budget`
    (except that one row always fits). Of some ways to divide it between them, the cheapest is taken.

    Args:
        beginnings: of the batch.
        rows: the rows to place; those without a chosen token are left out.
        token_budget: padded tokens in memory at once.
        weight: memory that a token of a beginning takes, in tokens.
        prompt_cost: what attending to one more beginning costs a micro-batch, in tokens of work.
        start_cost: as in `plan_micro_batches`.
        limit: no plan is sought, and the cost is infinite, where none can cost less.
    """
    own, of_row = beginnings.own, beginnings.of_row
    rows = [row for row in rows if own[row]]
    used = sorted({b for row in rows if (b := of_row[row]) is not None})
    best: tuple[list[Block], float] = ([], float("inf"))
    least = sum(own[row] for row in rows) + sum(beginnings.lengths[b] + prompt_cost for b in used)
    if least >= limit:
        return best
    for share in (0.25, 0.5, 0.75):
        blocks, cost = [], 0.0
        most = max(1, int(share * token_budget / weight))
        parts = plan_micro_batches(beginnings.lengths, used, most, start_cost)
        for index, part in enumerate(parts or [[]]):
            members = {*part, None} if index == 0 else set(part)
            read = len(part) * max((beginnings.lengths[b] for b in part), default=0)
            room = max(1, token_budget - int(read * weight))
            own_rows = [row for row in rows if of_row[row] in members]
            plan = plan_micro_batches(own, own_rows, room, start_cost)
            # Rows of one beginning go next to each other.
            plan = [sorted(micro, key=lambda row: (of_row[row] is None, of_row[row], row)) for micro in plan]
            pairs = sum(len({of_row[row] for row in micro}) for micro in plan)
            cost += read + start_cost + padded_cost(own, plan, start_cost) + prompt_cost * pairs
            blocks.append(Block(part, plan))
        if cost < best[1]:
            best = blocks, cost
        if len(blocks) == 1:  # a larger share would be the same
            break
    return best


def padded_cost(
    lengths: Sequence[int], plan: Sequence[Sequence[int]], start_cost: float = START_COST
) -> float:
    """What micro-batches cost in tokens of work."""
    return sum(len(micro) * max(lengths[row] for row in micro) + start_cost for micro in plan)
