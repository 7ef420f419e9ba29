"""Plans: every row once, within the budget, no worse than any other contiguous cut."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.batch import Beginnings
from gvpo.model.shared_prompts import start_cost
from gvpo.packing import START_COST, padded_cost, plan_blocks, plan_micro_batches
from tests.models import tiny_model

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


def test_fewer_micro_batches_where_starting_one_costs_much():
    lengths = [100, 90, 60, 50, 20, 10]
    counts = [len(plan_micro_batches(lengths, range(6), 300, cost)) for cost in (1, 64, 10_000)]
    assert counts == [6, 3, 2]
    for kind, cost in ((True, 9e9 / 32**2), (False, START_COST)):
        model = SimpleNamespace(
            config=tiny_model().config, parameters=lambda kind=kind: iter([SimpleNamespace(is_cuda=kind)])
        )
        assert start_cost(model) == cost


def test_no_rows_need_no_micro_batch():
    assert plan_micro_batches([3, 4], [], 10) == []


def test_a_budget_below_one_token_is_an_error():
    with pytest.raises(ValueError, match="token_budget must be at least 1 token"):
        plan_micro_batches([3], [0], 0)


# Rows of up to five beginnings (or none), each with its own tokens (or none).
ROWS = st.lists(
    st.tuples(st.sampled_from([None, 0, 1, 2, 3, 4]), st.integers(0, 60)), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.lists(st.integers(1, 90), min_size=5, max_size=5), st.integers(1, 600), st.floats(1, 3))
def test_blocks_hold_every_row_once_after_its_beginning_within_the_budget(rows, lengths, budget, weight):
    of_row, own = zip(*rows, strict=True)
    starts = [0 if b is None else lengths[b] for b in of_row]
    ends = [start + n for start, n in zip(starts, own, strict=True)]
    beginnings = Beginnings(starts, ends, list(of_row), [], lengths)
    blocks, _ = plan_blocks(beginnings, range(len(rows)), budget, weight)
    placed = sorted(row for block in blocks for micro in block.micro_batches for row in micro)
    assert placed == [row for row, n in enumerate(own) if n]
    read = [b for block in blocks for b in block.beginnings]
    assert len(read) == len(set(read))
    for block in blocks:
        held = len(block.beginnings) * max((lengths[b] for b in block.beginnings), default=0) * weight
        for micro in block.micro_batches:
            assert {of_row[row] for row in micro} <= {*block.beginnings, None}
            of = [of_row[row] for row in micro]
            assert len([b for b, after in pairwise([*of, -1]) if b != after]) == len(set(of))  # adjacent
            alone = len(micro) == 1 or (len(block.beginnings) == 1 and held > budget)
            assert alone or int(held) + len(micro) * max(own[row] for row in micro) <= budget + 1


def test_sharing_costs_less_where_prompts_are_long_and_more_where_they_are_not():
    for length, cheaper in ((100, True), (2, False)):
        rows = 32
        beginnings = Beginnings(
            [length] * rows, [length + 20] * rows, [r // 8 for r in range(rows)], [], [length] * 4
        )
        whole = [length + 20] * rows
        cost = plan_blocks(beginnings, range(rows), 2000)[1]
        assert (cost < padded_cost(whole, plan_micro_batches(whole, range(rows), 2000))) is cheaper
