"""The quickstart's lesson with another process that generates ahead and without: time, and what it learns."""

from __future__ import annotations

import io
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from transformers import TrainerCallback

from benchmarks.measure import Row, in_fresh_process

ABOUT = (
    "`gvpo quickstart` (addition, 30 steps of 32 groups of 8) with `generate_ahead` of 0 and 1, one "
    "thread for each process, seed 0, in turns: seconds on the wall of a step (mean of the last 25), "
    "what of it is generation or waiting for it, and the first step, with the other process's start; CPU "
    "seconds of a step and, over the run, of the other process; greedy accuracy on 1,000 held-out problems. "
    "`load`: of the machine, as it began."
)


class Clock(TrainerCallback):
    """CPU seconds of this process in each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.process_time() - self._since)


def once(ahead: int, seed: int, small: bool) -> Row:
    import gvpo.quickstart
    import gvpo.sums

    os.environ["OMP_NUM_THREADS"] = "1"
    made, clock = gvpo.quickstart.GVPOConfig, Clock()

    def config(**own: Any) -> Any:
        return made(**own | {"generate_ahead": ahead, "logging_steps": 1})

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(gvpo.sums, "WARMUP_STEPS", 2 if small else gvpo.sums.WARMUP_STEPS),
        mock.patch.object(gvpo.quickstart, "GVPOConfig", config),
        mock.patch.object(gvpo.quickstart, "RunCallback", _beside(gvpo.quickstart.RunCallback, clock)),
    ):
        load = os.getloadavg()[0]
        summary = gvpo.quickstart.quickstart(
            "addition", seed, f"{folder}/run", steps=6 if small else 30, console=Console(file=io.StringIO())
        )
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "step_time" in entry]
    last, other = steps[5:], resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "generate_ahead": ahead,
        "seed": seed,
        "s a step": sum(entry["step_time"] for entry in last) / len(last),
        "of it generation": sum(entry["profiling/generation"] for entry in last) / len(last),
        "first step": steps[0]["step_time"],
        "CPU s a step": sum(clock.steps[5:]) / len(last),
        "CPU s of the other": round(other.ru_utime + other.ru_stime, 1),
        "load": round(load, 1),
        "accuracy before": summary["accuracy_before"],
        "accuracy after": summary["accuracy_after"],
    }


def _beside(callback: Any, clock: Clock) -> Any:
    """Such a callback, which brings the clock along."""

    def make(*args: Any) -> Any:
        made = callback(*args)
        attach = made.attach
        made.attach = lambda trainer: (attach(trainer), trainer.add_callback(clock))
        return made

    return make


def run(small: bool) -> list[Row]:
    if small:
        return [once(1, 0, True)]
    return [in_fresh_process(once, ahead, seed, False) for seed in (0,) for ahead in (0, 1)]
