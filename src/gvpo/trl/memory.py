"""Generation in as many rows at once as memory allows."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from gvpo.step import is_out_of_memory

Sample = Callable[..., tuple[list[list[int]], list[list[float]] | None]]


class Portions:
    """Calls a sampler for all prompts at once, and for fewer at a time once memory ran out.

    What was sampled before the error is kept; each portion is sampled from the policy as it is, so portions
    change which responses are drawn, not their distribution.

    Attributes:
        most: prompts at a time; creeps back by 1 % with each generation.
    """

    def __init__(self) -> None:
        self.most = math.inf

    def __call__(self, sample: Sample, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self.most *= 1.01
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
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"Out of memory in generation: goes on with {int(self.most)} responses at a time.",
                stacklevel=3,
            )
        return ids, logps or None
