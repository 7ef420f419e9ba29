"""What an update was made of, in a file: for checks by other means, and for study of what went wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gvpo.verl.rollouts import Rollouts

if TYPE_CHECKING:
    from jaxtyping import Float

_TOKENS = ("input_ids", "responses", "response_mask")


def write_record(
    path: Path,
    rollouts: Rollouts,
    tokens: Mapping[str, list[Tensor]],
    policy: Float[Tensor, "rows"],
    *,
    weights: Float[Tensor, "rows"] | None = None,
    **facts: Any,
) -> None:
    """Write the rows of an update; the file appears whole or not at all.

    Args:
        path: a .safetensors file.
        rollouts: the rows.
        tokens: their input_ids, responses and response_mask, without padding.
        policy: S of each row, in nats.
        weights: w of each row, where it came to that.
        facts: what JSON holds.
    """
    columns = {name: torch.cat(tokens[name]).cpu() for name in _TOKENS}
    columns |= {f"{name}.lengths": torch.tensor([len(row) for row in tokens[name]]) for name in _TOKENS}
    columns |= {
        "rewards": rollouts.rewards,
        "reference_logps": rollouts.reference,
        "policy_logps": policy,
        **({} if weights is None else {"weights": weights}),
    }
    facts |= {"prompts": rollouts.prompts, "sessions": rollouts.sessions}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    save_file(columns, aside, metadata={"facts": json.dumps(facts)})
    os.replace(aside, path)


def read_record(path: str | Path) -> dict[str, Any]:
    """What `write_record` wrote: tokens as lists of rows, numbers as tensors, and the facts."""
    with safe_open(path, framework="pt") as file:
        record: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["facts"])
    for name in _TOKENS:
        record[name] = list(record[name].split(record.pop(f"{name}.lengths").tolist()))
    facts["sessions"] = [tuple(session) for session in facts["sessions"]]
    return record | facts
