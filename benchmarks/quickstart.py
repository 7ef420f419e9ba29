"""The whole quickstart, in a fresh process."""

from __future__ import annotations

import io
import tempfile
import time

from rich.console import Console

from benchmarks.measure import Row, in_fresh_process

ABOUT = (
    "`gvpo quickstart` from its import to its end, one thread: seconds on the wall (whatever else the machine "
    "does) and of CPU, and what it learnt."
)


def once(seed: int, small: bool) -> Row:
    started, cpu = time.time(), time.process_time()
    import gvpo.quickstart

    steps = 100
    if small:
        gvpo.quickstart.WARMUP_STEPS, steps = 2, 1
    with tempfile.TemporaryDirectory() as folder:
        summary = gvpo.quickstart.quickstart(
            "addition",
            seed,
            f"{folder}/run",
            steps=steps,
            console=Console(file=io.StringIO()),
            started=started,
        )
    kept = (
        "accuracy_before",
        "accuracy_after",
        "seconds_total",
        "seconds_generation",
        "seconds_update",
        "parameters",
    )
    return {"seed": seed, "CPU s": time.process_time() - cpu, **{name: summary[name] for name in kept}}


def run(small: bool) -> list[Row]:
    return [once(0, True)] if small else [in_fresh_process(once, seed, False) for seed in (0, 1, 2)]
