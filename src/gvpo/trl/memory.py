"""What memory allowed when it ran out last: tokens of a micro-batch, responses of a generation at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from gvpo.machine import memory, processes_here
from gvpo.step import is_out_of_memory
from gvpo.trl.checkpoint import Stateful
from gvpo.trl.metrics import Share

Sample = Callable[..., tuple[list[list[int]], list[list[float]] | None]]


class Ceiling(Stateful):
    """A limit that falls when memory runs out and rises by 1 % with each use.

    It rises since one odd batch should not slow down the rest of a run.

    Attributes:
        most: the limit; infinite until memory ran out.
    """

    def __init__(self) -> None:
        self.most = math.inf

    def rise(self) -> None:
        self.most *= 1.01

    def state_dict(self, folder: Path) -> dict[str, Any]:
        return {"most": self.most}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        self.most = state.get("most", math.inf)


class Portions(Ceiling):
    """Calls a sampler for all prompts at once, and for at most `most` at a time once memory ran out.

    What was sampled before the error is kept; each portion is sampled from the policy as it is, so portions
    change which responses are drawn, not their distribution.
    """

    def __call__(self, sample: Sample, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self.rise()
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        while len(ids) < len(prompt_ids):
            rows = prompt_ids[len(ids) : len(ids) + max(1, int(min(self.most, len(prompt_ids))))]
            try:
                some_ids, some_logps = sample(rows, *args, **kwargs)
                ids += some_ids
                logps += some_logps or []
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(rows) == 1:
                    raise
            # Out of the except block, so that the traceback no longer holds the failed pass's tensors.
            self.most = len(rows) / 2
            clear_device_cache(garbage_collection=True)
            warnings.warn(
                f"Out of memory in generation: goes on with {int(self.most)} responses at a time.",
                stacklevel=3,
            )
        return ids, logps or None


def memory_shares(device: torch.device) -> dict[str, Share]:
    """Memory at its peak so far: of the fullest device; on a CPU of all processes against their machines'."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
        return {
            "memory/peak_gib": Share(peak / 2**30, largest=True),
            "memory/peak_fraction": Share(peak / total, largest=True),
        }
    peak, total = memory()
    return {
        "memory/peak_gib": Share(peak / 2**30),
        "memory/peak_fraction": Share(peak, total / processes_here()),
    }
