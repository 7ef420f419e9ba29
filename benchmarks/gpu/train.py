"""A chat model learns times tables, generation by transformers: `--model FOLDER`."""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import AutoTokenizer, TrainerCallback

from benchmarks.gpu import Part
from benchmarks.measure import Row
from benchmarks.whole_step import right, tables
from gvpo.trl import GVPOConfig, GVPOTrainer

ABOUT = (
    "20 optimizer steps of GVPOTrainer on times tables, 64 responses of 8 prompts, 16 tokens at most, "
    "bfloat16 autocast of float32 weights, learning rate 1e-5, one seed. The first two steps' seconds do "
    "not count."
)


class Watch(TrainerCallback):
    """Rewards and seconds of each step."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.seconds: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.rewards.append(logs["reward"])
            self.seconds.append(logs["step_time"])


def train(part: Part, **options: Any) -> Row:
    """Train the model of `part` for 20 steps."""
    watch, on_cpu = Watch(), part.device == "cpu"
    path = str(part.model)
    with tempfile.TemporaryDirectory() as folder:
        settings = GVPOConfig(
            folder,
            num_generations=8,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,
            max_completion_length=16,
            learning_rate=1e-5,
            max_steps=2 if part.tiny else 20,
            use_cpu=on_cpu,
            bf16=not on_cpu,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
        trainer = GVPOTrainer(
            path, right, settings, train_dataset=tables(), processing_class=tokenizer, callbacks=[watch]
        )
        trainer.train()
    few = watch.rewards[:3], watch.rewards[-3:]
    first, last = (sum(rewards) / len(rewards) for rewards in few)
    later = watch.seconds[2:] or watch.seconds
    return {"steps": len(watch.rewards), "s a step": min(later), "reward, first": first, "reward, last": last}


def run(part: Part) -> None:
    what = {"what": "GVPOTrainer, generation by transformers"}
    if part.model is None:
        part.add({**what, "note": "no model was given: --model FOLDER"})
    else:
        part.attempt(what, lambda: train(part))
