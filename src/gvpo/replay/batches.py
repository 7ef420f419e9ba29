"""Groups as the rows of a step, and rows of a step as groups: token for token, masks included."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from gvpo.batch import GroupBatch
from gvpo.replay.group import Group, worth_keeping


def groups_of(
    batch: GroupBatch,
    k: int,
    *,
    reference: str,
    policy_step: int,
    components: Mapping[str, Sequence[float]],
    demonstrations: Collection[int] = (),
) -> list[Group]:
    """The groups of a batch that has reference log-probs, all under `reference`, and rows group after group.

    Left out are groups of which fewer than two responses take part, for they teach nothing; with a reward or
    log-probability that is not finite, whose step is skipped; and with a row of a single token (a prompt of
    one that nothing was answered to), which has no place for a completion.

    `components` are rewards by reward function, one a row; the rows of `demonstrations` go into the metadata.
    """
    ids, lengths = batch.input_ids.cpu().numpy(), batch.lengths.tolist()
    chosen = batch.completion_mask.cpu().numpy()
    rewards = batch.rewards.double().tolist()
    valid = [True] * len(batch) if batch.valid is None else batch.valid.tolist()
    assert batch.reference_logps is not None
    logps = batch.reference_logps.double().tolist()
    groups = []
    for first in range(0, len(batch), k):
        rows = slice(first, first + k)
        bare = any(part and n < 2 for n, part in zip(lengths[rows], valid[rows], strict=True))
        if bare or not worth_keeping(rewards[rows], valid[rows], logps[rows]):
            continue
        whole = [row[:n] for row, n in zip(ids[rows], lengths[rows], strict=True)]
        masks = [row[:n] for row, n in zip(chosen[rows], lengths[rows], strict=True)]
        starts = _starts(whole, masks, valid[rows])
        given = [i - first for i in demonstrations if first <= i < first + k]
        groups.append(
            Group.of(
                [row[:start] for row, start in zip(whole, starts, strict=True)],
                [row[start:] for row, start in zip(whole, starts, strict=True)],
                rewards[rows],
                reference=reference,
                reference_logps=logps[rows],
                counted=[mask[start:] for mask, start in zip(masks, starts, strict=True)],
                valid=valid[rows],
                policy_step=policy_step,
                components={name: values[rows] for name, values in components.items()},
                metadata={"demonstrations": given} if given else None,
            )
        )
    return groups


def _starts(rows: Sequence[np.ndarray], masks: Sequence[np.ndarray], valid: Sequence[bool]) -> list[int]:
    """Where the completion of each row begins: all at one place, if all rows are the same up to it.

    A row's prompt is what comes before the first token that counts, be it of the prompt or of an environment.
    Rows that take part keep a token for their completion.
    """
    firsts = [int(mask.argmax()) for mask in masks if mask.any()]
    shared = min(firsts, default=min(map(len, rows)) - 1)
    longest = [len(row) - (1 if takes_part else 0) for row, takes_part in zip(rows, valid, strict=True)]
    if min(longest) >= shared and all(np.array_equal(row[:shared], rows[0][:shared]) for row in rows):
        return [shared] * len(rows)
    return [
        int(mask.argmax()) if mask.any() else min(shared, most)
        for mask, most in zip(masks, longest, strict=True)
    ]


def batch_of(
    groups: Sequence[Group], group_ids: Sequence[int], device: torch.device, *, stored: bool = True
) -> GroupBatch:
    """The rows of groups; without reference log-probs if some group has none, or they are not wanted."""
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.long)
    valid = np.concatenate([np.zeros(0, dtype=bool), *(group.takes_part for group in groups)])
    rewards = np.concatenate([np.zeros(0), *(group.rewards for group in groups)])
    batch = GroupBatch.from_tokens(
        [prompt.tolist() for group in groups for prompt in group.prompts],
        [completion.tolist() for group in groups for completion in group.completions],
        np.where(valid, rewards, 0.0).tolist(),
        torch.tensor(group_ids, dtype=torch.long).repeat_interleave(sizes),
        device=device,
    )
    masks = [np.zeros(0, dtype=bool), *(mask for group in groups for mask in group.masks)]
    counted = torch.from_numpy(np.concatenate(masks)).to(device)
    batch.completion_mask = batch.completion_mask.masked_scatter(batch.completion_mask, counted)
    batch.valid = torch.from_numpy(valid).to(device)
    if stored and groups and all(g.reference_logps is not None for g in groups):
        logps = np.concatenate([g.reference_logps for g in groups if g.reference_logps is not None])
        batch.reference_logps = torch.from_numpy(logps).to(device, batch.rewards.dtype)
    return batch


def rows_of(
    groups: Sequence[Group], slots: Sequence[int], device: torch.device, *, stored: bool = True
) -> GroupBatch:
    """One row of each of `groups`, which may come again: the response in its slot.

    Where a group is smaller and has no such slot, the row takes no part.
    """
    different = list({id(group): group for group in groups}.values())
    whole = batch_of(different, [0] * len(different), device, stored=stored)
    first = np.cumsum([0, *(len(group) for group in different)]).tolist()
    place = {id(group): start for group, start in zip(different, first, strict=False)}
    places = torch.tensor([(place[id(group)], len(group)) for group in groups], dtype=torch.long)
    (start, size), slot = places.view(-1, 2).T, torch.tensor(slots, dtype=torch.long)
    index = (start + torch.where(slot < size, slot, 0)).to(device)
    columns = {name: column[index] for name, column in vars(whole).items() if column is not None}
    return replace(whole, **columns | {"valid": columns["valid"] & (slot < size).to(device)})
