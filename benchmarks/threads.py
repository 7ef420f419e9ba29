"""What a thread more costs on a machine that has no core for it."""

from __future__ import annotations

import multiprocessing
import time

import torch

from benchmarks.measure import Row, in_fresh_process
from benchmarks.workloads import Workload
from gvpo.machine import usable_cores

ABOUT = (
    "Forward and backward of 8 rows of 64 tokens (4 layers, d 256, V 32k), 1 thread and as many as there are "
    "cores, with and without other processes that keep every core busy. What else runs there counts too."
)


def work(threads: int, times: int, hidden: int) -> tuple[float, float]:
    """CPU seconds of the process, and seconds on the wall."""
    torch.set_num_threads(threads)
    model = Workload(hidden=hidden).model()
    ids = torch.randint(3, 32_000, (8, 64))
    model(input_ids=ids, labels=ids).loss.backward()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        model(input_ids=ids, labels=ids).loss.backward()
    return time.process_time() - cpu, time.perf_counter() - wall


def _spin() -> None:
    while True:
        pass


def measure(neighbours: int, threads: int, times: int, hidden: int) -> Row:
    others = [
        multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(neighbours)
    ]
    for other in others:
        other.start()
    try:
        cpu, wall = in_fresh_process(work, threads, times, hidden)
    finally:
        for other in others:
            other.kill()
    return {"busy neighbours": neighbours, "threads": threads, "CPU s": cpu, "s": wall}


def run(small: bool) -> list[Row]:
    cores = max(2, usable_cores())
    times, hidden = (1, 16) if small else (2, 256)
    return [measure(n, threads, times, hidden) for n in (0, cores) for threads in (1, cores)]
