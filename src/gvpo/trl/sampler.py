"""The order of prompts, the same whether an epoch was reached by training or by resuming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """TRL's sampler, whose order is drawn anew for each epoch from seed + epoch.

    TRL draws each epoch's order from where the last epoch left its generator, so that a run resumed in a
    later epoch would see the first epoch's order again.

    Args:
        sampler: TRL's `RepeatSampler`.
        seed: of the orders.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders before each epoch."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
