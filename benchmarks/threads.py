"""What a thread more costs on a machine that has no core for it."""

from __future__ import annotations

import subprocess
import sys
import time

import torch

from benchmarks.measure import Row
from benchmarks.workloads import Workload
from gvpo.machine import usable_cores

ABOUT = (
    "Forward and backward of 8 rows of 64 tokens (4 layers, d 256, V 32k), 1 thread and as many as there are "
    "cores, with and without other processes that keep every core busy. What else runs there counts too."
)


def measure(neighbours: int, threads: int, times: int, hidden: int) -> Row:
    model = Workload(hidden=hidden).model()
    ids = torch.randint(3, 32_000, (8, 64))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model(input_ids=ids, labels=ids).loss.backward()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(times):
            model(input_ids=ids, labels=ids).loss.backward()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.kill()
            other.wait()
    return {"busy neighbours": neighbours, "threads": threads, "CPU s": cpu, "s": wall}


def run(small: bool) -> list[Row]:
    cores = max(2, usable_cores())
    times, hidden = (1, 16) if small else (5, 256)
    return [measure(n, threads, times, hidden) for n in (0, cores) for threads in (1, cores)]
