"""How everything here is measured, shown and written down."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gvpo.step import GVPOStep

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
# CPU seconds of this process. Jobs run on one thread, where that is the time an idle machine would take.
clock = time.process_time


def timed(job: Callable[[], Any], times: int = 1) -> Callable[[], float]:
    """A job that returns its own seconds, the mean of `times` runs."""

    def run() -> float:
        started = clock()
        for _ in range(times):
            job()
        return (clock() - started) / times

    return run


class Laps:
    """Seconds of the parts of a job, one after the other."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = clock()

    def __call__(self, *_: Any) -> None:
        now = clock()
        self.seconds.append(now - self._last)
        self._last = now


def laps_of(step: GVPOStep) -> Laps:
    """Laps that end with the backward pass of each of the step's micro-batches."""
    laps, backend, backward = Laps(), step.backend, type(step.backend).backward

    def lap(loss: Tensor, *, last: bool) -> None:
        backward(backend, loss, last=last)
        laps()

    backend.backward = lap  # type: ignore[method-assign]
    return laps


def minima(
    jobs: Mapping[str, Callable[[], float | list[float]]],
    repeats: int,
    *,
    seldom: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """The least seconds of each job out of `repeats` rounds, after a round that does not count.

    A job returns its seconds, or those of its parts, of which the sum of the minima counts: on a shared
    machine a long job is never undisturbed as a whole. Jobs take turns and each round starts with another
    one. `seldom` gives slow jobs a number of rounds of their own, 0 for the first round only.
    """
    seen: dict[str, list[list[float]]] = {name: [] for name in jobs}
    names = list(jobs)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            rounds = (seldom or {}).get(name, repeats)
            if repeat > rounds:
                continue
            gc.collect()
            seconds = jobs[name]()
            if repeat or rounds == 0:
                seen[name].append(seconds if isinstance(seconds, list) else [seconds])
    return {name: sum(map(min, zip(*laps, strict=True))) for name, laps in seen.items()}


def resident_mib() -> float:
    """Memory of this process that is in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_of(job: Callable[[], Any]) -> float:
    """MiB by which `job` raises this process's memory at its peak, at least a page. Linux only."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident_mib()
    job()
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    return max(peak - before, os.sysconf("SC_PAGE_SIZE") / 2**20)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a new process of one thread, so that no allocator remembers anything."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(function, args)


@functools.cache
def machine() -> dict[str, Any]:
    """The class of this machine."""
    gpu: dict[str, Any] = {"gpu": None}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties()
        gpu = {"gpu": device.name, "gpu_memory_gib": round(device.total_memory / 2**30), "driver": _driver()}
        gpu["cuda"] = torch.version.cuda
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "architecture": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **gpu,
    }


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    names = "torch transformers trl accelerate peft triton vllm liger-kernel cut-cross-entropy"
    for name in names.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(console: Console, title: str, rows: list[Row]) -> None:
    """One table, a line for each row."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in columns))
    console.print(table)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def record(path: Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON with date, machine class and versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {"date": today, "machine": machine(), "versions": versions()}
    path.write_text(json.dumps({**result, **about}, indent=1) + "\n")


def write(folder: Path, name: str, about: str, rows: list[Row]) -> None:
    """`folder/name.json`: a benchmark's rows."""
    record(folder / f"{name}.json", {"benchmark": name, "about": about, "rows": rows})
