"""The quickstart's lesson with another process that generates ahead and without: time, and what it learns."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from benchmarks.measure import Row, in_fresh_process

ABOUT = (
    "`gvpo quickstart` (addition, 30 steps of 32 groups of 8) with `generate_ahead` of 0, 1 and 2, one "
    "thread for each process, seeds 0 to 2, in turns: seconds on the wall of a step (mean of the last 25), "
    "what of it is generation, or waiting for it, the first step (of the other process's start), CPU seconds "
    "of both processes, and greedy accuracy on 1,000 held-out problems. `load`: the machine's other work."
)


def once(ahead: int, seed: int, small: bool) -> Row:
    import gvpo.quickstart
    import gvpo.sums

    os.environ["OMP_NUM_THREADS"] = "1"
    config: Any = functools.partial(gvpo.quickstart.GVPOConfig, generate_ahead=ahead)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(gvpo.sums, "WARMUP_STEPS", 2 if small else gvpo.sums.WARMUP_STEPS),
        mock.patch.object(gvpo.quickstart, "GVPOConfig", lambda **own: config(**{**own, "logging_steps": 1})),
    ):
        load, before = os.getloadavg()[0], _cpu()
        summary = gvpo.quickstart.quickstart(
            "addition", seed, f"{folder}/run", steps=6 if small else 30, console=Console(file=io.StringIO())
        )
        cpu = _cpu() - before
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "step_time" in entry]
    last = steps[5:]
    return {
        "generate_ahead": ahead,
        "seed": seed,
        "s a step": sum(entry["step_time"] for entry in last) / len(last),
        "of it generation": sum(entry["profiling/generation"] for entry in last) / len(last),
        "first step": steps[0]["step_time"],
        "CPU s": round(cpu, 1),
        "load": round(load, 1),
        "accuracy before": summary["accuracy_before"],
        "accuracy after": summary["accuracy_after"],
    }


def _cpu() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def run(small: bool) -> list[Row]:
    if small:
        return [once(1, 0, True)]
    return [in_fresh_process(once, ahead, seed, False) for seed in (0, 1, 2) for ahead in (0, 1, 2)]
