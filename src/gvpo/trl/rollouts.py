"""Slices of a generation that wait for their optimizer step, and their place in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gvpo.batch import GroupBatch
from gvpo.images import Images
from gvpo.run import replaced

_FIELDS = [field.name for field in fields(GroupBatch) if field.name != "images"]  # tensors of a row each


@dataclass
class Slice:
    """The rows that one call of `training_step` brings.

    Attributes:
        batch: the rows.
        policy_step: the optimizer step whose policy sampled them.
        reference_step: the one whose policy they are measured against; 0: the initial one.
    """

    batch: GroupBatch
    policy_step: int
    reference_step: int = 0


def split(batch: GroupBatch, count: int) -> list[GroupBatch]:
    """`count` slices of equal size, in order."""
    size = len(batch) // count
    return [select(batch, slice(start, start + size)) for start in range(0, size * count, size)]


def select(batch: GroupBatch, rows: Any) -> GroupBatch:
    """The batch of some rows: a slice, a mask or indices."""
    given = {name: value for name in _FIELDS if (value := getattr(batch, name)) is not None}
    images = None if batch.images is None else batch.images.select(rows)
    return GroupBatch(**{name: value[rows] for name, value in given.items()}, images=images)


def window_batch(slices: list[Slice], *, on_policy: bool) -> GroupBatch:
    """The batch of an optimizer step.

    A slice that is used twice in one step makes groups of its own each time. On an `on_policy` step (the
    policy is still the one that sampled, and the reference) stored reference log-probs are not looked at.
    """
    parts: list[GroupBatch] = []
    seen: dict[int, int] = {}
    for item in slices:
        uses = seen[id(item)] = seen.get(id(item), -1) + 1
        part = replace(item.batch, group_ids=item.batch.group_ids * len(slices) + uses)
        parts.append(replace(part, reference_logps=None, rollout_logps=None) if on_policy else part)
    return GroupBatch.concatenate(parts)


def used_within(room: int, count: int, iterations: int) -> int:
    """How many of `count` slices, used in order `iterations` times over, are used up in `room` calls."""
    return max(0, min(count, room - (iterations - 1) * count))


def save_rollouts(path: Path, slices: list[Slice], state: dict[str, Any]) -> None:
    """Write slices and a JSON state; the file appears whole or not at all."""
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, item in enumerate(slices)
        for name in _FIELDS
        if (value := getattr(item.batch, name)) is not None
    }
    state = {**state, "steps": [[item.policy_step, item.reference_step] for item in slices]}
    for i, images in enumerate(item.batch.images for item in slices):
        if images is not None:
            tensors |= {f"{i}.images.{name}": value for name, value in images.tensors().items()}
            state["images"] = [images.token, images.types]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside:
        save_file(tensors, aside, metadata={"state": json.dumps(state)})


def load_rollouts(path: Path, device: torch.device) -> tuple[list[Slice], dict[str, Any]]:
    """What `save_rollouts` wrote."""
    with safe_open(path, framework="pt", device="cpu") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    slices = []
    for i, steps in enumerate(state.get("steps", ())):
        own: dict[str, Any] = _under(f"{i}.", tensors)
        images = _under("images.", own)
        values = {name: own[name] for name in _FIELDS if name in own}
        held = Images.from_tensors(images, *state["images"]) if images else None
        slices.append(Slice(GroupBatch(**values, images=held), *steps))
    return slices, state


def _under(mark: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(mark): value for name, value in values.items() if name.startswith(mark)}
