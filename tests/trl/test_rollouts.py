"""Slices of a generation on their way to optimizer steps."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gvpo.batch import GroupBatch
from gvpo.trl.rollouts import Slice, load_rollouts, save_rollouts, split, used_within, window_batch
from tests.models import random_batch


@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 4))
def test_slices_that_are_used_up(room: int, count: int, iterations: int) -> None:
    calls = list(range(count)) * iterations
    later = set(calls[room:])
    assert used_within(room, count, iterations) == count - len(later)


def test_slices_survive_a_file(tmp_path: Path) -> None:
    batch = random_batch(groups=4, reference=True)
    batch.valid = torch.arange(len(batch)) % 3 > 0
    slices = [Slice(part, step) for step, part in enumerate(split(batch, 2))]
    save_rollouts(tmp_path / "slices", slices, {"why": "a test"})
    loaded, state = load_rollouts(tmp_path / "slices", torch.device("cpu"))
    assert state["why"] == "a test"
    assert [item.policy_step for item in loaded] == [0, 1]
    for item, kept in zip(slices, loaded, strict=True):
        for field in fields(GroupBatch):
            before, after = getattr(item.batch, field.name), getattr(kept.batch, field.name)
            assert before is after is None or before.equal(after)


def test_slices_of_another_version_are_none(tmp_path: Path) -> None:
    slices = [Slice(part, step) for step, part in enumerate(split(random_batch(groups=4), 2))]
    save_rollouts(tmp_path / "slices", slices, {})
    with safe_open(tmp_path / "slices", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    earlier = {"state": json.dumps({"policy_steps": [0, 1], "parts": {}})}
    save_file(tensors, tmp_path / "slices", metadata=earlier)
    assert load_rollouts(tmp_path / "slices", torch.device("cpu"))[0] == []


def test_a_slice_used_twice_makes_groups_of_its_own() -> None:
    batch = random_batch(groups=2, k=4)
    item = Slice(batch, 0)
    window = window_batch([item, item], on_policy=True)
    assert len(window) == 16
    assert sorted(window.group_ids.bincount().tolist()) == [4, 4, 4, 4]
