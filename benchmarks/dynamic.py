"""The quickstart's lesson with dynamic sampling and without: what it learns, and what it samples for that."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from benchmarks.measure import Row, in_fresh_process

ABOUT = (
    "`gvpo quickstart` (addition, 30 steps of 32 groups of 8) with each way to deal with groups of equal "
    "rewards, one thread, seeds 0 to 2: greedy accuracy on 1,000 held-out problems, and what was sampled."
)
KINDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "resampled": {"dynamic_sampling": "resample"},
    "filled from replay": {"dynamic_sampling": "replay"},
    "solved ones at a tenth": {"easy_threshold": 1.0, "easy_fraction": 0.1},
}


def once(kind: str, seed: int, small: bool) -> Row:
    import gvpo.quickstart
    import gvpo.sums

    console, cpu = Console(file=io.StringIO()), time.process_time()
    config = functools.partial(gvpo.quickstart.GVPOConfig, **KINDS[kind])
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(gvpo.sums, "WARMUP_STEPS", 2 if small else gvpo.sums.WARMUP_STEPS),
        mock.patch.object(gvpo.quickstart, "GVPOConfig", config),
    ):
        steps = 5 if small else 30
        summary = gvpo.quickstart.quickstart("addition", seed, f"{folder}/run", steps=steps, console=console)
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [entry for entry in map(json.loads, lines) if "num_tokens" in entry]
    return {
        "kind": kind,
        "seed": seed,
        "accuracy before": summary["accuracy_before"],
        "accuracy after": summary["accuracy_after"],
        "tokens, thousands": round(logged[-1]["num_tokens"] / 1000),
        "groups of equal rewards": sum(entry["frac_reward_zero_std"] for entry in logged) / len(logged),
        "CPU s": round(time.process_time() - cpu, 1),
    }


def run(small: bool) -> list[Row]:
    if small:
        return [once("resampled", 0, True)]
    return [in_fresh_process(once, kind, seed, False) for seed in (0, 1, 2) for kind in KINDS]
