"""A checkpoint engine of verl without NCCL: weights go from trainer to rollout through Ray's object store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

Weights = dict[str, torch.Tensor]


class _Mailbox:
    """Holds the newest version until the next."""

    def __init__(self) -> None:
        self.changed = asyncio.Condition()
        self.version: int | None = None
        self.weights: Weights = {}

    async def put(self, version: int | None, weights: Weights) -> None:
        async with self.changed:
            self.version, self.weights = version, weights
            self.changed.notify_all()

    async def get(self, version: int | None) -> Weights:
        async with self.changed:
            await self.changed.wait_for(lambda: self.version == version)
            return self.weights


@CheckpointEngineRegistry.register("ray")
class RayCheckpointEngine(CheckpointEngine):
    """verl's `checkpoint_engine.backend=ray`: one copy of the model, from the first worker."""

    _mailbox: Any = None  # of the driver

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.mailbox: Any = None

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        cls._mailbox = cls._mailbox or ray.remote(num_cpus=0)(_Mailbox).remote()
        return {"mailbox": [cls._mailbox] * actor_wg_world_size}, {
            "mailbox": [cls._mailbox] * rollout_world_size
        }

    def init_process_group(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def finalize(self) -> None:
        pass

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> None:
        # Every rank has to walk through: each tensor is put together from all of them.
        whole = {name: tensor.detach().float().cpu().clone() for name, tensor in weights}
        if self.is_master:
            await self.mailbox.put.remote(global_steps, whole)

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        for item in (await self.mailbox.get.remote(global_steps)).items():
            yield item
