"""Plans: every row once, within the budget, no worse than any other contiguous cut."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.packing import START_COST, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def cost(plan, lengths):
    return sum(len(rows) * max(lengths[r] for r in rows) + START_COST for rows in plan)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 2000))
def test_every_row_once_within_the_budget(lengths, budget):
    rows = list(range(0, len(lengths), 2))
    plan = plan_micro_batches(lengths, rows, budget)
    assert sorted(row for micro in plan for row in micro) == rows
    for micro in plan:
        assert len(micro) == 1 or len(micro) * max(lengths[r] for r in micro) <= budget
    widths = [max(lengths[r] for r in micro) for micro in plan]
    assert widths == sorted(widths, reverse=True)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(300, 1500))
def test_no_contiguous_cut_is_cheaper(lengths, budget):
    ordered = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    n = len(ordered)
    best = float("inf")
    for cuts in (c for size in range(n) for c in combinations(range(1, n), size)):
        bounds = [0, *cuts, n]
        plan = [ordered[a:b] for a, b in pairwise(bounds)]
        if all(len(m) * lengths[m[0]] <= budget for m in plan):
            best = min(best, cost(plan, lengths))
    assert cost(plan_micro_batches(lengths, ordered, budget), lengths) == best


def test_no_rows_need_no_micro_batch():
    assert plan_micro_batches([3, 4], [], 10) == []


def test_a_budget_below_one_token_is_an_error():
    with pytest.raises(ValueError, match="token_budget must be at least 1 token"):
        plan_micro_batches([3], [0], 0)
