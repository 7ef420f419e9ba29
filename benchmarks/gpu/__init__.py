"""What needs a GPU: exactness in half precision, speed at the shapes of Qwen2.5-0.5B and 7B, memory.

    make gpu                                # all of it, into benchmarks/results/gpu/
    python -m benchmarks.gpu exactness      # one part

Each part runs in a process and under a limit of time of its own, and writes each row as it comes: one that
fails or is cut off keeps its rows and does not stop the rest.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, record

# Of each part: seconds after which it is cut off. Together below ten minutes.
LIMITS = {
    "tests": 110,
    "exactness": 60,
    "head": 60,
    "step": 110,
    "shared_prompts": 90,
    "memory": 60,
    "vllm": 50,
    "train": 50,
}


@dataclass
class Part:
    """What a part is given, and the rows that it found.

    Attributes:
        name: of `LIMITS`.
        about: what its figures mean.
        device: "cuda", or "cpu" to try it out.
        tiny: sizes that only show that everything runs.
        output: folder of `name.json`.
        model: folder of a chat model, if one was given.
        started: when it was let go, by `time.monotonic`.
    """

    name: str
    about: str
    device: str
    tiny: bool
    output: Path
    model: Path | None = None
    started: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until it is cut off, less some to end in. Any, on a CPU, where nothing is measured."""
        if self.device == "cpu":
            return math.inf
        return LIMITS[self.name] - 5 - (time.monotonic() - self.started)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save("running")
        print(
            f"{self.name}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True
        )

    def save(self, status: str) -> None:
        found = {"benchmark": self.name, "about": self.about, "status": status, "rows": self.rows}
        record(self.output / f"{self.name}.json", found)

    def attempt(self, row: Row, job: Callable[[], Row]) -> None:
        """Add `row` with what `job` finds out, or with why it could not."""
        with self.surviving(row):
            self.add({**row, **job()})

    @contextmanager
    def surviving(self, row: Row) -> Iterator[None]:
        """Other rows are wanted all the same: an error goes into `row`, unless the device is beyond use."""
        try:
            if self.left < 0:
                raise TimeoutError("no time left")
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self.add({**row, "note": why[:160]})
            if "CUDA error" in why and "out of memory" not in why:
                raise
        clear()

    def seconds(self, job: Callable[[], Any], repeats: int = 5) -> Row:
        """The least seconds on the wall until the device is done, and peak GiB over what was there before.

        After a run that does not count; fewer repeats where time is short.
        """
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        job()
        self.synchronize()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken: list[float] = []
        while not taken or (len(taken) < (1 if self.tiny else repeats) and self.left > 10 * taken[0]):
            started = time.perf_counter()
            job()
            self.synchronize()
            taken.append(time.perf_counter() - started)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if self.device == "cuda" else None
        return {"s": min(taken), "peak GiB": peak}

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def clear() -> None:
    """Give back what nobody holds any more, before a large model is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
