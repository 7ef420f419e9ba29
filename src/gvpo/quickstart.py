"""The main job in a minute, on a laptop: a tiny language model learns two-digit sums by GVPO.

A sloppy teacher warms up a small Llama (`gvpo.sums`); then `GVPOTrainer` makes it right with nothing but a
reward for correct answers. Run it with `gvpo quickstart`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console

from gvpo.sums import Lesson, answers
from gvpo.trl import GVPOConfig, GVPOTrainer
from gvpo.trl.watch import RunCallback


def quickstart(
    task_name: str = "addition",
    seed: int = 0,
    output: str | Path = "runs/quickstart",
    *,
    steps: int = 100,
    beta: float = 0.2,
    console: Console | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Warm up a tiny model, train it with GVPO, and write the run to `output`; see `gvpo quickstart --help`.

    `started` is the `time.time()` at which the job began, for `seconds_total`; now by default.

    Returns:
        What is also written to `summary.json`: accuracies on 1,000 held-out problems (greedy before and
        after, sampled after), seconds, steps, parameters, beta, seed.

    Raises:
        InputError: an unknown task, or an output directory that cannot be written to.
    """
    config = {"command": "quickstart", "steps": steps, "beta": beta}
    lesson = Lesson(task_name, seed, output, config, console=console, started=started)
    lesson.console.print(
        "GVPO: 32 problems × 8 answers a step, reward 1 for a right answer, nothing else …", soft_wrap=True
    )
    trainer = _make_trainer(lesson, steps=steps, beta=beta)

    def held_out(step: int) -> dict[str, float]:
        if step % 10:
            return {}
        return {"accuracy": lesson.accuracy(answers(lesson.model, lesson.tokenizer, lesson.prompts))}

    callback = RunCallback(lesson.run, lesson.console, held_out)
    callback.attach(trainer)
    try:
        trainer.train()
    finally:
        callback.close()
    generation = trainer.timing.total["generation"]
    summary = lesson.examine(
        lesson.model,
        seconds_generation=round(generation, 1),
        seconds_update=round(trainer.timing.total.total() - generation, 1),
        steps=steps,
        beta=beta,
    )
    lesson.finish(summary, "GVPO quickstart", "optimizer step")
    lesson.console.print(
        "\nNext: gvpo quickstart --llm, and a reward of your own (docs/start.md). On a GPU:\n"
        "  gvpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name gsm8k "
        "--reward_funcs accuracy --output_dir runs/gsm8k",
        highlight=False,
        soft_wrap=True,
    )
    return summary


def _make_trainer(lesson: Lesson, *, steps: int, beta: float) -> GVPOTrainer:
    def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(given == wanted) for given, wanted in zip(completions, answer, strict=True)]

    task, pairs = lesson.task, lesson.train_pairs
    dataset = Dataset.from_dict(
        {"prompt": [task.prompt(*p) for p in pairs], "answer": [task.right(*p) for p in pairs]}
    )
    config = GVPOConfig(
        output_dir=str(lesson.run.path),
        beta=beta,
        reference="initial",
        num_generations=8,
        per_device_train_batch_size=256,
        max_completion_length=4,
        learning_rate=7e-4,
        micro_batch_tokens=3000,
        max_steps=steps,
        logging_steps=5,
        seed=lesson.seed,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return GVPOTrainer(
        lesson.model, correct, config, train_dataset=dataset, processing_class=lesson.tokenizer
    )
