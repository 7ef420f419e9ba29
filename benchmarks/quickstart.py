"""The whole quickstart, in a fresh process."""

from __future__ import annotations

import io
import tempfile
import time
from unittest import mock

from rich.console import Console

from benchmarks.measure import Row, in_fresh_process

ABOUT = (
    "`gvpo quickstart` from its import to its end, one thread: seconds on the wall (whatever else the "
    "machine does) and of CPU, and what it learnt."
)


def once(seed: int, small: bool) -> Row:
    started, cpu = time.time(), time.process_time()
    import gvpo.quickstart
    import gvpo.sums

    console, warm_up = Console(file=io.StringIO()), 2 if small else gvpo.sums.WARMUP_STEPS
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(gvpo.sums, "WARMUP_STEPS", warm_up),
    ):
        summary = gvpo.quickstart.quickstart(
            "addition", seed, f"{folder}/run", steps=1 if small else 100, console=console, started=started
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
