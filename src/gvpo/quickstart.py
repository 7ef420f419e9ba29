"""The main job in a minute, on a laptop: a tiny language model learns two-digit sums by GVPO.

A sloppy teacher, who mostly forgets to carry, warms up a small Llama; then `GVPOTrainer` makes it right
with nothing but a reward for correct answers. Numbers are padded with zeros and answers are written least
significant digit first, the form that a model of this size learns. Run it with `gvpo quickstart`.
"""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging
from transformers.trainer_utils import set_seed

from gvpo.errors import InputError
from gvpo.run import RunDirectory, Ticker, plot_curves
from gvpo.trl import GVPOConfig, GVPOTrainer
from gvpo.trl.callback import RunCallback

HELD_OUT = 1000
WARMUP_STEPS = 1000
WARMUP_ROWS = 64
FORGETFUL = 0.62  # share of the teacher's answers without carries (or borrows)


@dataclass(frozen=True)
class Task:
    """Two numbers of two digits, one operation, an answer of three characters."""

    symbol: str
    right: Callable[[int, int], str]
    sloppy: Callable[[int, int], str]
    allowed: Callable[[int, int], bool] = lambda a, b: True

    def prompt(self, a: int, b: int) -> str:
        return f"<bos>{a:02d}{self.symbol}{b:02d}="

    def pairs(self, seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Pairs for training and 1,000 held-out ones, in an order that the seed fixes."""
        everything = [(a, b) for a in range(100) for b in range(100) if self.allowed(a, b)]
        random.Random(seed).shuffle(everything)
        return everything[HELD_OUT:], everything[:HELD_OUT]


def _digitwise(operation: Callable[[int, int], int]) -> Callable[[int, int], str]:
    """Digit by digit modulo 10, as someone who forgets carries and borrows would."""
    return lambda a, b: f"{operation(a % 10, b % 10) % 10}{operation(a // 10, b // 10) % 10}0"


TASKS = {
    "addition": Task("+", lambda a, b: f"{a + b:03d}"[::-1], _digitwise(lambda x, y: x + y)),
    "subtraction": Task(
        "-", lambda a, b: f"{a - b:03d}"[::-1], _digitwise(lambda x, y: x - y), lambda a, b: a >= b
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+-="]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.13 M parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    pairs: list[tuple[int, int]],
    ticker: Ticker,
    seed: int,
) -> None:
    """Supervised training on the sloppy teacher's answers."""

    def encode(answer: Callable[[int, int], str]) -> torch.Tensor:
        return torch.tensor(tokenizer([f"{task.prompt(*p)}{answer(*p)}<eos>" for p in pairs])["input_ids"])

    right, sloppy = encode(task.right), encode(task.sloppy)
    prompt_length = len(tokenizer(task.prompt(0, 0))["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(WARMUP_STEPS):
        progress = step / WARMUP_STEPS
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        chosen = torch.randint(len(pairs), (WARMUP_ROWS,), generator=generator)
        forgets = torch.rand(WARMUP_ROWS, generator=generator) < FORGETFUL
        rows = torch.where(forgets[:, None], sloppy[chosen], right[chosen])
        logits = model(input_ids=rows[:, :-1]).logits[:, prompt_length - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, prompt_length:].flatten(), reduction="sum"
        ) / len(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ticker.advance(step + 1)


@torch.no_grad()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    sample: bool = False,
) -> list[str]:
    """The model's answers, greedy or sampled at temperature 1."""
    training = model.training
    model.eval()
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=sample, top_k=0, top_p=1.0
    )
    model.train(training)
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


class _TimedTrainer(GVPOTrainer):
    """Knows how long it generated and updated."""

    seconds_generation = 0.0
    seconds_update = 0.0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        self.seconds_generation += time.perf_counter() - started
        return result

    def _score_reference(self, batch: Any) -> torch.Tensor:
        started = time.perf_counter()
        result = super()._score_reference(batch)
        self.seconds_update += time.perf_counter() - started
        return result

    def _update(self, model: torch.nn.Module) -> torch.Tensor:
        started = time.perf_counter()
        result = super()._update(model)
        self.seconds_update += time.perf_counter() - started
        return result


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
    """Warm up a tiny model, train it with GVPO, and write the run to `output`.

    Args:
        task_name: one of `TASKS`.
        seed: of everything.
        output: the run directory.
        steps: optimizer steps of GVPO.
        beta: temperature of the implicit reward.
        console: where to show progress.
        started: `time.time()` at which the job began, for `seconds_total`; now by default.

    Returns:
        What is also written to `summary.json`: accuracies on 1,000 held-out problems (greedy before and
        after, sampled after), seconds, steps, parameters, beta, seed.

    Raises:
        InputError: an unknown task, or an output directory that cannot be written to.
    """
    started = time.time() if started is None else started
    console = console or Console()
    if task_name not in TASKS:
        raise InputError(f"There is no quickstart task {task_name!r}: choose one of {', '.join(TASKS)}.")
    task, run = TASKS[task_name], RunDirectory(output)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run.start({"command": "quickstart", "task": task_name, "seed": seed, "steps": steps, "beta": beta})
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train_pairs, test_pairs = task.pairs(seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    console.print(f"A Llama of {n_parameters:,} parameters learns {task_name} from a sloppy teacher …")
    ticker = Ticker(console, "Warm-up", WARMUP_STEPS)
    with ticker.running():
        warm_up(model, tokenizer, task, train_pairs, ticker, seed)
    model.save_pretrained(run.path / "warmed-up-model")
    tokenizer.save_pretrained(run.path / "warmed-up-model")

    prompts = [task.prompt(*p) for p in test_pairs]
    gold = [task.right(*p) for p in test_pairs]
    run.write_lines(
        "held_out.jsonl", ({"prompt": p, "answer": g} for p, g in zip(prompts, gold, strict=True))
    )

    def accuracy(given: list[str]) -> float:
        return sum(a == b for a, b in zip(given, gold, strict=True)) / len(gold)

    before = answers(model, tokenizer, prompts)
    run.log({"step": 0, "accuracy": accuracy(before)})
    console.print(f"Greedy accuracy on {len(gold):,} held-out problems: {accuracy(before):.1%}")
    console.print(
        "GVPO: 32 problems × 8 answers a step, reward 1 for a right answer, nothing else …", soft_wrap=True
    )
    trainer = _make_trainer(model, tokenizer, task, train_pairs, run, seed=seed, steps=steps, beta=beta)
    callback = RunCallback(
        run,
        console,
        lambda step: {"accuracy": accuracy(answers(model, tokenizer, prompts))} if step % 10 == 0 else {},
    )
    callback.attach(trainer)
    try:
        trainer.train()
    finally:
        callback.close()
    after = answers(model, tokenizer, prompts)
    sampled = answers(model, tokenizer, prompts, sample=True)
    trainer.save_model(str(run.path / "model"))
    _draw(run, task_name)
    samples = [
        {"prompt": p.removeprefix("<bos>"), "before": b, "after": a, "answer": g}
        for p, b, a, g in zip(prompts, before, after, gold, strict=True)
    ]
    (run.path / "samples.json").write_text(json.dumps(samples[:100], indent=1) + "\n")
    summary = {
        "accuracy_before": accuracy(before),
        "accuracy_after": accuracy(after),
        "sampled_accuracy_after": accuracy(sampled),
        "seconds_total": round(time.time() - started, 1),
        "seconds_generation": round(trainer.seconds_generation, 1),
        "seconds_update": round(trainer.seconds_update, 1),
        "steps": steps,
        "parameters": n_parameters,
        "beta": beta,
        "seed": seed,
    }
    run.finish(summary)
    _show(console, run, samples, summary)
    return summary


def _make_trainer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    pairs: list[tuple[int, int]],
    run: RunDirectory,
    *,
    seed: int,
    steps: int,
    beta: float,
) -> _TimedTrainer:
    def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(given == wanted) for given, wanted in zip(completions, answer, strict=True)]

    dataset = Dataset.from_dict(
        {"prompt": [task.prompt(*p) for p in pairs], "answer": [task.right(*p) for p in pairs]}
    )
    config = GVPOConfig(
        output_dir=str(run.path),
        beta=beta,
        reference="initial",
        num_generations=8,
        per_device_train_batch_size=256,
        max_completion_length=4,
        learning_rate=7e-4,
        micro_batch_tokens=3000,
        max_steps=steps,
        logging_steps=5,
        seed=seed,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _TimedTrainer(model, correct, config, train_dataset=dataset, processing_class=tokenizer)


def _draw(run: RunDirectory, task_name: str) -> None:
    plot_curves(
        run.path / "learning_curve.png",
        [
            (
                "accuracy",
                [("greedy, held out", *run.curve("accuracy")), ("sampled, training", *run.curve("reward"))],
            ),
            ("explained variance of the reward", [("", *run.curve("gvpo/explained_variance"))]),
            ("KL to the initial policy (nats)", [("", *run.curve("gvpo/kl"))]),
        ],
        title=f"GVPO quickstart: two-digit {task_name}",
        x="optimizer step",
    )


def _show(
    console: Console, run: RunDirectory, samples: list[dict[str, str]], summary: dict[str, Any]
) -> None:
    table = Table(title="Answers to held-out problems (least significant digit first)")
    for column in ("problem", "before", "after", "right answer"):
        table.add_column(column)
    changed = [s for s in samples if s["before"] != s["after"]]
    for s in (changed + samples)[:6]:
        marks = {True: "green", False: "red"}
        table.add_row(
            s["prompt"],
            *(f"[{marks[s[key] == s['answer']]}]{s[key]}[/]" for key in ("before", "after")),
            s["answer"],
        )
    console.print(table)
    console.print(
        f"Greedy accuracy {summary['accuracy_before']:.1%} → [bold]{summary['accuracy_after']:.1%}[/bold], "
        f"sampled {summary['sampled_accuracy_after']:.1%}, in {summary['seconds_total']:.0f} s "
        f"({summary['seconds_generation']:.0f} s generation, {summary['seconds_update']:.0f} s updates).",
        soft_wrap=True,
    )
    console.print(f"Model, metrics and learning_curve.png are in {run.path}.")
    console.print("\nA real model, on a GPU:", highlight=False)
    console.print(
        "  gvpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name gsm8k "
        "--reward_funcs accuracy --output_dir runs/gsm8k",
        highlight=False,
        soft_wrap=True,
    )
