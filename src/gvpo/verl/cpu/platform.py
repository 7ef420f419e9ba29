"""The CPU as one of verl's platforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _no_bytes(*_: Any, **__: Any) -> int:
    return 0


def _memory(*_: Any, **__: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


class _Device(ModuleType):
    """`torch.cpu`, with what verl asks of `torch.cuda` besides."""

    _EXTRA: ClassVar[dict[str, Callable[..., Any]]] = {
        **dict.fromkeys(
            ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), _no_bytes
        ),
        **dict.fromkeys(
            ("empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_device", "manual_seed_all"),
            _nothing,
        ),
        "manual_seed": torch.manual_seed,
        "mem_get_info": _memory,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "current_device": lambda: "cpu",
        "get_device_name": lambda *_: "CPU",
    }

    def __getattr__(self, name: str) -> Any:
        return self._EXTRA[name] if name in self._EXTRA else getattr(torch.cpu, name)


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """Every worker has the CPU to itself, as far as verl can tell; Ray counts pretended GPUs."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _Device("gvpo.verl.cpu.device")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"  # goes to `Tensor.to` and to FSDP

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
