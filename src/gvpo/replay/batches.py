"""Groups as the rows of a step, and rows of a step as groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gvpo.batch import GroupBatch
from gvpo.replay.group import Group


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

    Args:
        components: rewards by reward function, one a row.
        demonstrations: rows that are demonstrations, for the metadata.
    """
    ids, lengths = batch.input_ids.cpu().numpy(), batch.lengths.tolist()
    chosen = batch.completion_mask.cpu().numpy()
    starts = [int(row[:n].argmax()) if row[:n].any() else n for row, n in zip(chosen, lengths, strict=True)]
    rewards = batch.rewards.double().tolist()
    valid = [True] * len(batch) if batch.valid is None else batch.valid.tolist()
    assert batch.reference_logps is not None
    logps = batch.reference_logps.double().tolist()
    groups = []
    for first in range(0, len(batch), k):
        rows = range(first, first + k)
        counted = [chosen[i, starts[i] : lengths[i]] for i in rows]
        given = [i - first for i in demonstrations if i in rows]
        groups.append(
            Group.of(
                ids[first, : min(starts[i] for i in rows)],
                [ids[i, starts[i] : lengths[i]] for i in rows],
                rewards[first : first + k],
                reference=reference,
                reference_logps=logps[first : first + k],
                counted=None if all(c.all() for c in counted) else counted,
                valid=None if all(valid[first : first + k]) else valid[first : first + k],
                policy_step=policy_step,
                components={name: values[first : first + k] for name, values in components.items()},
                metadata={"demonstrations": given} if given else None,
            )
        )
    return groups


def batch_of(
    groups: Sequence[Group], group_ids: Sequence[int], device: torch.device, *, stored: bool = True
) -> GroupBatch:
    """The rows of groups; without reference log-probs if some group has none, or they are not wanted."""
    rows = [(g, i) for g in groups for i in range(len(g))]
    batch = GroupBatch.from_tokens(
        [g.prompt_ids.tolist() for g, _ in rows],
        [c.tolist() for g in groups for c in g.completions],
        [0.0 if g.valid is not None and not g.valid[i] else float(g.rewards[i]) for g, i in rows],
        torch.tensor(
            [number for g, number in zip(groups, group_ids, strict=True) for _ in range(len(g))],
            dtype=torch.long,
        ),
        device=device,
    )
    for row, (group, i) in enumerate(rows):
        if group.counted is not None:
            start, length = len(group.prompt_ids), int(group.lengths[i])
            first = int(group.lengths[:i].sum())
            batch.completion_mask[row, start : start + length] = torch.from_numpy(
                group.counted[first : first + length].copy()
            ).to(device)
    batch.valid = torch.tensor([g.valid is None or bool(g.valid[i]) for g, i in rows], dtype=torch.bool).to(
        device
    )
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
    first = np.cumsum([0, *(len(group) for group in different)])
    place = {id(group): int(start) for group, start in zip(different, first, strict=False)}
    exists = [slot < len(group) for group, slot in zip(groups, slots, strict=True)]
    index = torch.tensor(
        [
            place[id(group)] + (slot if there else 0)
            for group, slot, there in zip(groups, slots, exists, strict=True)
        ],
        device=device,
    )
    values: Any = {name: None if value is None else value[index] for name, value in vars(whole).items()}
    batch = GroupBatch(**values)
    batch.valid = torch.tensor(exists, device=device) & (True if batch.valid is None else batch.valid)
    return batch
