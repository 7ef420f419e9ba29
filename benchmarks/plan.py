"""`gvpo train --plan` against the memory that training takes.

python -m benchmarks.plan FOLDER_OF_MODEL
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer
from trl import get_peft_config

from benchmarks.measure import RESULTS, Row, in_fresh_process, peak_of, show, write
from gvpo.trl import GVPOTrainer
from gvpo.trl.arguments import parse_arguments
from gvpo.trl.plan import make_plan

ABOUT = (
    "MiB that two optimizer steps add to a process at their peak (4 responses of 240 tokens in one "
    "micro-batch of at most 1,024, one thread, blocks from 1 MiB on given back at once), and what "
    "`gvpo train --plan` said."
)
TOKENS = 1024
_MMAP_THRESHOLD = -3  # of glibc's malloc.h
WAYS = {
    "full": ["--reference", "initial"],
    "full, reference=rollout": [],
    "gradient checkpointing": ["--reference", "initial", "--gradient_checkpointing", "true"],
    "LoRA": ["--reference", "initial", "--use_peft", "--lora_target_modules", "all-linear"],
    "bf16": ["--reference", "initial", "--bf16", "true"],
}


class Canned(GVPOTrainer):
    """Any tokens will do."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        draw = torch.Generator().manual_seed(self.state.global_step)
        return torch.randint(100, 40_000, (len(prompt_ids), 240), generator=draw).tolist(), None


def measure(path: str, way: str) -> Row:
    """Planned and measured, of one way to train."""
    # Else glibc keeps holes between PEFT's temporaries, 40 % of all memory, which no other allocator has.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
    words = ["--model_name_or_path", path, "--num_generations", "2", "--per_device_train_batch_size", "4"]
    words += ["--max_steps", "2", "--micro_batch_tokens", str(TOKENS), "--max_completion_length", "240"]
    words += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse_arguments([*words, "--output_dir", folder, *WAYS[way]])
        plan = make_plan(arguments)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")

        def train() -> None:
            Canned(
                path,
                lambda completions, **_: [float(len(text)) for text in completions],
                arguments.training,
                train_dataset=Dataset.from_dict({"prompt": [f"{i} is a number." for i in range(8)]}),
                processing_class=tokenizer,
                peft_config=get_peft_config(arguments.model),
            ).train()

        measured = peak_of(train)
    planned = (plan.fixed + TOKENS * plan.activation) / 2**20
    return {
        "way": way,
        "planned MiB": planned,
        "measured MiB": measured,
        "planned / measured": planned / measured,
    }


def main(path: str) -> None:
    rows = [in_fresh_process(measure, path, way) for way in WAYS]
    show(Console(), ABOUT, rows)
    write(RESULTS, "plan", ABOUT, rows)


if __name__ == "__main__":
    main(sys.argv[1])
