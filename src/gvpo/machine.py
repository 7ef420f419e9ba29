"""What this process may use of its machine: cores, threads and memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")  # a container's limits; version 2


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity's, no more than a container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_GROUP / "cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


def processes_here() -> int:
    """Processes of this run on this machine, as torchrun and accelerate tell them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def memory() -> tuple[int, int]:
    """Bytes that this process has taken at its peak, and that the machine (or container) has in all."""
    import psutil

    limit = _read(_GROUP / "memory.max")
    total = min(psutil.virtual_memory().total, int(limit) if limit.isdigit() else 2**63)
    status = _read(Path("/proc/self/status"))
    if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
        return 1024 * int(peak[1]), total
    return psutil.Process().memory_info().rss, total  # no peak outside Linux


def choose_threads(
    wanted: int | None = None, *, run: Path | None = None, most: int | None = None, beside: int = 0
) -> str:
    """Choose torch's threads for work on a CPU, as entrances do before it starts; one line that says why.

    As many as there are free cores for each process: with one more all wait, busily, for the one that has no
    core. What the user has set stays; so does what a run that goes on began with, as bits may depend on it.

    Args:
        wanted: by the user.
        run: the directory of a run that may go on; `threads` in its `config.yaml` is how it began.
        most: that the work is known to gain from.
        beside: further processes of this run, which work at the same time.
    """
    import torch

    before, usable, share = torch.get_num_threads(), usable_cores(), processes_here() + beside
    set_by = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)]
    earlier = re.search(r"^threads: (\d+)$", _read(run / "config.yaml"), re.MULTILINE) if run else None
    if wanted is not None:
        threads, why = wanted, "as you say"
    elif set_by:
        threads, why = before, f"as {set_by[0]} says"
    elif earlier is not None:
        threads, why = int(earlier[1]), "as this run began with"
    else:
        cores = os.cpu_count() or 1
        busy = min(cores, round(os.getloadavg()[0])) if hasattr(os, "getloadavg") else 0
        free = max(1, min(before, min(usable, cores - busy) // share))
        threads = min(free, most or free)
        why = f"{usable} cores" + f" for {share} processes" * (share > 1)
        why += f", {busy} of the machine's {cores} were busy in the last minute" * (busy > 0)
        why += "; more would not help here" * (threads < free)
        why += "; OMP_NUM_THREADS sets another number"
    torch.set_num_threads(threads)
    return f"Threads: {threads} ({why})."


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
