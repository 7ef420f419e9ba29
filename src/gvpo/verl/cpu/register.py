"""What importing verl does in a process that is to run on CPUs (see `gvpo.verl.cpu`).

The CPU becomes one of verl's platforms and Hugging Face's `generate` one of its rollouts; what verl asks of
accelerators alone is put right.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from types import ModuleType
from typing import Any

import psutil
import torch
import verl.utils.distributed
import verl.utils.fsdp_utils
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry


def _always(value: Any) -> Any:
    """A function or method that returns `value`, whatever it is given."""
    return lambda *_, **__: value


def _memory(*_: Any, **__: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


_device = ModuleType("gvpo.verl.cpu.device")  # `torch.cpu`, with what verl asks of `torch.cuda` besides
_nothing = ("empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_device", "manual_seed_all")
_zero = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
vars(_device).update(
    vars(torch.cpu)
    | dict.fromkeys(_nothing, _always(None))
    | dict.fromkeys(_zero, _always(0))
    | {
        "manual_seed": torch.manual_seed,
        "mem_get_info": _memory,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "current_device": _always("cpu"),
        "get_device_name": _always("CPU"),
    }
)


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """Every worker has the CPU to itself, as far as verl can tell; Ray counts pretended GPUs."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _device
    is_available = _always(True)
    device_count = _always(1)
    current_device = _always("cpu")  # goes to `Tensor.to` and to FSDP
    set_device = synchronize = set_allocator_settings = empty_cache = _always(None)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    get_device_capability = _always((None, None))
    communication_backend_name = _always("gloo")
    visible_devices_envvar = _always("CUDA_VISIBLE_DEVICES")
    ray_resource_name = _always("GPU")
    ray_noset_envvars = _always(["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"])
    is_ipc_supported = _always(False)
    nvtx_range = _always(contextlib.nullcontext())
    profiler_start = profiler_stop = cudart = _always(None)


_initialize = verl.utils.distributed.initialize_global_process_group_ray
# verl would ask for "cpu:gloo,cpu:gloo", one for the host and one for the device, which torch refuses.
verl.utils.distributed.initialize_global_process_group_ray = lambda timeout_second=None, backend=None: (
    _initialize(timeout_second, "cpu:gloo")
)
# And for pinned memory for the reference model, of which there is none without an accelerator.
verl.utils.fsdp_utils.CPUOffloadPolicy = lambda **_: CPUOffloadPolicy(pin_memory=False)
_ROLLOUT_REGISTRY["hf", "async"] = "gvpo.verl.cpu.rollout.HFServerAdapter"
RolloutReplicaRegistry.register("hf", lambda: import_module("gvpo.verl.cpu.rollout").HFReplica)
