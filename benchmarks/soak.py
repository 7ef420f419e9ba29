"""2,000 optimizer steps of the quickstart's task with replay: nothing may grow, nothing may slow down.

make soak           # some minutes
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback

from benchmarks.measure import record
from gvpo.run import RunDirectory
from gvpo.sums import TASKS, make_model, make_tokenizer
from gvpo.trl import GVPOConfig, GVPOTrainer
from gvpo.trl.watch import RunCallback

EVERY = 50


class Gauge(TrainerCallback):
    """Memory, open files, threads and time of every so many steps."""

    def __init__(self) -> None:
        self.process, self.readings = psutil.Process(), []
        self.readings: list[dict[str, float]] = []
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY:
            return
        now = time.perf_counter()
        self.readings.append(
            {
                "step": state.global_step,
                "resident_mb": self.process.memory_info().rss / 2**20,
                "files": self.process.num_fds(),
                "threads": threading.active_count(),
                "seconds_per_step": (now - self.since) / EVERY,
            }
        )
        self.since = now


def soak(steps: int) -> list[dict[str, float]]:
    """Train and return the readings."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="gvpo-soak-")
    tokenizer, task = make_tokenizer(), TASKS["addition"]
    pairs, _ = task.pairs(0)
    data = Dataset.from_dict(
        {"prompt": [task.prompt(*p) for p in pairs], "answer": [task.right(*p) for p in pairs]}
    )

    def digits(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [
            sum(a == b for a, b in zip(c, w, strict=False)) / 3
            for c, w in zip(completions, answer, strict=True)
        ]

    config = GVPOConfig(
        output_dir=folder, beta=0.2, reference="initial", num_generations=8, per_device_train_batch_size=128,
        max_completion_length=4, learning_rate=5e-4, max_steps=steps, logging_steps=EVERY, seed=0,
        replay_ratio=0.5, replay_capacity=2000, save_strategy="steps", save_steps=500, save_total_limit=1,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        dataloader_pin_memory=False, micro_batch_tokens=3000,
    )  # fmt: skip
    trainer = GVPOTrainer(
        make_model(tokenizer), digits, config, train_dataset=data, processing_class=tokenizer
    )
    gauge = Gauge()
    RunCallback(RunDirectory(folder), Console()).attach(trainer)
    trainer.add_callback(gauge)
    trainer.train()
    return gauge.readings


def summary(readings: list[dict[str, float]], steps: int) -> dict[str, float]:
    """Growth from the first quarter after the warm-up to the last."""
    # By then the replay buffer has filled and the first checkpoint was written: what grows after that would
    # grow for ever.
    warm = [r for r in readings if r["step"] > steps // 4]
    half, quarter = len(warm) // 2, len(warm) // 4

    def median(of: list[dict[str, float]], key: str) -> float:
        return sorted(r[key] for r in of)[len(of) // 2]

    first, last = warm[:quarter], warm[-quarter:]
    return {
        "steps": steps,
        "memory_growth": median(last, "resident_mb") / median(first, "resident_mb") - 1,
        "files_growth": warm[-1]["files"] - warm[0]["files"],
        "threads_growth": warm[-1]["threads"] - warm[0]["threads"],
        "step_time_second_half_over_first": median(warm[half:], "seconds_per_step")
        / median(warm[:half], "seconds_per_step"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("results/soak.json"))
    options = parser.parse_args()
    readings = soak(options.steps)
    result = summary(readings, options.steps)
    record(options.output, {**result, "readings": readings})
    print(result)


if __name__ == "__main__":
    main()
