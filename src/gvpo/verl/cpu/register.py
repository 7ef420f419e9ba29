"""What importing verl does in a process that is to run on CPUs: see `gvpo.verl.cpu`."""

from __future__ import annotations

from typing import Any

import verl.utils.distributed
import verl.utils.fsdp_utils
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

import gvpo.verl.cpu.platform  # noqa: F401 - registers the platform

_initialize = verl.utils.distributed.initialize_global_process_group_ray


def _initialize_with_gloo(timeout_second: int | None = None, backend: str | None = None) -> Any:
    # verl would ask for "cpu:gloo,cpu:gloo", one for the host and one for the device, which torch refuses.
    return _initialize(timeout_second=timeout_second, backend="cpu:gloo")


class _UnpinnedOffload(CPUOffloadPolicy):
    """verl asks for pinned memory for the reference model, of which there is none without an accelerator."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(pin_memory=False)


def _replica() -> Any:
    from gvpo.verl.cpu.rollout import HFReplica

    return HFReplica


verl.utils.distributed.initialize_global_process_group_ray = _initialize_with_gloo
verl.utils.fsdp_utils.CPUOffloadPolicy = _UnpinnedOffload
_ROLLOUT_REGISTRY["hf", "async"] = "gvpo.verl.cpu.rollout.HFServerAdapter"
RolloutReplicaRegistry.register("hf", _replica)
