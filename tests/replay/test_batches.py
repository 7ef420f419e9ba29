"""Rows of a step as groups and back: token for token, whatever their prompts and masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.batch import GroupBatch
from gvpo.replay import Group, ReplayBuffer
from gvpo.replay.batches import batch_of, groups_of, rows_of

CPU = torch.device("cpu")
K = 3


@st.composite
def rows(draw):
    """Rows of groups: a shared prompt or own ones, masks with zeros anywhere, rows that take no part."""
    tokens = st.integers(1, 9)
    ids, masks = [], []
    for _ in range(draw(st.integers(1, 3))):
        shared = draw(st.lists(tokens, min_size=1, max_size=4))
        own = draw(st.booleans())
        for _ in range(K):
            prompt = draw(st.lists(tokens, min_size=1, max_size=4)) if own else shared
            mask = draw(st.lists(st.booleans(), min_size=1, max_size=6))
            masks.append([False] * len(prompt) + mask)
            ids.append([*prompt, *draw(st.lists(tokens, min_size=len(mask), max_size=len(mask)))])
    valid = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return ids, masks, valid


def batch(ids, masks, valid):
    width = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    chosen = torch.tensor([[*mask, *[False] * (width - len(mask))] for mask in masks])
    n = len(ids)
    return GroupBatch(
        padded,
        torch.tensor([len(row) for row in ids]),
        chosen,
        torch.arange(n).double() / 7,
        torch.arange(n) // K,
        torch.tensor(valid),
        -torch.arange(n).double(),
    )


def content(of, row):
    length = int(of.lengths[row])
    tokens, mask = of.input_ids[row, :length].tolist(), of.completion_mask[row, :length].tolist()
    assert not of.completion_mask[row, length:].any()
    return tokens, mask, of.rewards[row].item(), of.reference_logps[row].item()


@settings(max_examples=200, deadline=None)
@given(rows(), st.booleans())
def test_rows_come_back_token_for_token(tmp_path_factory, drawn, stored):
    before = batch(*drawn)
    groups = groups_of(before, K, reference="initial", policy_step=3, components={"r": [0.5] * len(before)})
    if stored:
        with ReplayBuffer(tmp_path_factory.mktemp("replay"), memory=0) as buffer:
            buffer.append(groups)
            groups = buffer.read(range(len(groups)))
    kept = [g for g in range(len(before) // K) if sum(drawn[2][K * g : K * g + K]) > 1]
    assert len(groups) == len(kept)
    after = batch_of(groups, kept, CPU)
    assert after.group_ids.tolist() == [g for g in kept for _ in range(K)]
    for place, row in enumerate(K * g + i for g in kept for i in range(K)):
        assert bool(after.valid[place]) is drawn[2][row]
        if drawn[2][row]:
            assert content(after, place) == content(before, row)
    one = rows_of(groups, [1] * len(groups), CPU)
    assert [content(one, i) for i in range(len(one))] == [content(after, K * i + 1) for i in range(len(one))]


def test_a_prompt_that_all_rows_share_is_kept_once():
    shared = batch([[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]], [[0, 0, 1], [0, 0, 0, 1], [0, 0, 1]], [True] * 3)
    (group,) = groups_of(shared, K, reference="initial", policy_step=0, components={})
    assert (group.prompt_ids.tolist(), group.own_prompts) == ([1, 2], None)
    assert [c.tolist() for c in group.completions] == [[3], [4, 5], [6]]
    assert group.counted.tolist() == [True, False, True, True]
    own = batch([[1, 2, 3], [1, 7, 4, 5], [1, 2, 6]], [[0, 0, 1], [0, 0, 0, 1], [0, 0, 1]], [True] * 3)
    (group,) = groups_of(own, K, reference="initial", policy_step=0, components={})
    assert [p.tolist() for p in group.own_prompts] == [[1, 2], [1, 7, 4], [1, 2]]
    assert group.counted is None


@pytest.mark.parametrize("parts", [[False] * 3, [True, False, False]])
def test_a_group_truncated_throughout_is_left_out(parts):
    """TRL masks all tokens of a truncated completion away: the row is its prompt."""
    rows = batch([[1, 2]] * 3 + [[1, 2, 3]] * 3, [[0, 0]] * 3 + [[0, 0, 1]] * 3, [*parts, True, True, False])
    (group,) = groups_of(rows, K, reference="initial", policy_step=0, components={"r": np.arange(6)})
    assert group.components["r"].tolist() == [3, 4, 5]


def test_a_slot_that_a_group_does_not_have_takes_no_part():
    groups = [Group.of([1], [[2 + i] for i in range(size)], range(size)) for size in (2, 4, 3)]
    places = [(group, slot) for group in groups for slot in range(4)]
    rows = rows_of(*zip(*places, strict=True), CPU)
    assert rows.valid.tolist() == [slot < len(group) for group, slot in places]
    there = [i for i, (group, slot) in enumerate(places) if slot < len(group)]
    assert rows.rewards[there].tolist() == [places[i][1] for i in there]
    assert rows.input_ids[there, 1].tolist() == [2 + places[i][1] for i in there]


def test_groups_that_cannot_be_kept_are_left_out():
    """Numbers that are not finite, whose step is skipped; and no answer to a prompt of one token."""
    good = GroupBatch.from_tokens(
        [[5, 6]] * 4, [[7], [8], [9], [7]], [0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], reference_logps=-torch.ones(4)
    )
    settings = {"reference": "initial", "policy_step": 0, "components": {}}
    assert len(groups_of(good, 2, **settings)) == 2
    good.reference_logps[0] = torch.nan
    assert len(groups_of(good, 2, **settings)) == 1
    good.rewards[2] = torch.inf
    assert len(groups_of(good, 2, **settings)) == 0
    bare = GroupBatch.from_tokens(
        [[5]] * 4, [[], [8], [9], [7, 8]], [0.0, 1.0] * 2, [0, 0, 1, 1], reference_logps=-torch.ones(4)
    )
    assert len(groups_of(bare, 2, **settings)) == 1
