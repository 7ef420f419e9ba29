"""The quickstarts' lesson: a tiny model, two-digit sums, and a sloppy teacher who mostly forgets to carry.

Numbers are padded with zeros and answers are written least significant digit first, the form that a model of
this size learns.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging
from transformers.trainer_utils import set_seed

from gvpo.errors import InputError
from gvpo.progress import Ticker
from gvpo.run import RunDirectory, plot_curves

HELD_OUT = 1000
WARMUP_STEPS = 1000
WARMUP_ROWS = 64
FORGETFUL = 0.62  # share of the teacher's answers without carries (or borrows)
Pair = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """Two numbers of two digits, one operation, an answer of three characters."""

    symbol: str
    right: Callable[[int, int], str]
    sloppy: Callable[[int, int], str]
    allowed: Callable[[int, int], bool] = lambda a, b: True

    def prompt(self, a: int, b: int) -> str:
        return f"<bos>{a:02d}{self.symbol}{b:02d}="

    def pairs(self, seed: int) -> tuple[list[Pair], list[Pair]]:
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
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    vocabulary = [*special.values(), *"0123456789+-="]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


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
    pairs: list[Pair],
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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], *, sample: bool = False
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


class Lesson:
    """What the quickstarts of both engines share: a model that the teacher warmed up, its exam, the records.

    Args:
        task_name: one of `TASKS`.
        seed: of everything.
        output: the run directory.
        config: what `config.yaml` says beside task and seed.
        console: where to show progress.
        started: `time.time()` at which the job began; now by default.
        chat_template: of the tokenizer.

    Raises:
        InputError: an unknown task, or an output directory that cannot be written to.
    """

    def __init__(
        self,
        task_name: str,
        seed: int,
        output: str | Path,
        config: Mapping[str, Any],
        *,
        console: Console | None = None,
        started: float | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.started = time.time() if started is None else started
        self.console = console or Console()
        if task_name not in TASKS:
            raise InputError(f"There is no quickstart task {task_name!r}: choose one of {', '.join(TASKS)}.")
        self.name, self.task, self.seed = task_name, TASKS[task_name], seed
        self.run = RunDirectory(output)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.run.start({"task": task_name, "seed": seed, **config})
        set_seed(seed)
        self.tokenizer = make_tokenizer()
        self.tokenizer.chat_template = chat_template
        self.model = make_model(self.tokenizer)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.train_pairs, self.test_pairs = self.task.pairs(seed)
        self.prompts = [self.task.prompt(*pair) for pair in self.test_pairs]
        self.gold = [self.task.right(*pair) for pair in self.test_pairs]
        self._warm_up()

    def _warm_up(self) -> None:
        self.console.print(
            f"A Llama of {self.parameters:,} parameters learns {self.name} from a sloppy teacher …"
        )
        ticker = Ticker(self.console, "Warm-up", WARMUP_STEPS)
        with ticker.running():
            warm_up(self.model, self.tokenizer, self.task, self.train_pairs, ticker, self.seed)
        self.save(self.model, "warmed-up-model")
        rows = zip(self.prompts, self.gold, strict=True)
        self.run.write_lines("held_out.jsonl", ({"prompt": p, "answer": g} for p, g in rows))
        self.before = answers(self.model, self.tokenizer, self.prompts)
        self.run.log({"step": 0, "accuracy": self.accuracy(self.before)})
        self.console.print(
            f"Greedy accuracy on {len(self.gold):,} held-out problems: {self.accuracy(self.before):.1%}"
        )

    def save(self, model: LlamaForCausalLM, name: str) -> None:
        """A model and its tokenizer, in the run directory."""
        for part in (model, self.tokenizer):
            part.save_pretrained(self.run.path / name)

    def accuracy(self, given: list[str]) -> float:
        """Share of the held-out problems that are answered right."""
        return sum(a == b for a, b in zip(given, self.gold, strict=True)) / len(self.gold)

    def examine(self, model: LlamaForCausalLM, **extra: Any) -> dict[str, Any]:
        """Save the trained model; what `summary.json` will say of it.

        Args:
            model: the trained one.
            extra: seconds, steps and what else belongs into the summary.
        """
        after = answers(model, self.tokenizer, self.prompts)
        sampled = answers(model, self.tokenizer, self.prompts, sample=True)
        self.save(model, "model")
        rows = zip(self.prompts, self.before, after, self.gold, strict=True)
        self.samples = [
            {"prompt": p.removeprefix("<bos>"), "before": b, "after": a, "answer": g} for p, b, a, g in rows
        ]
        return {
            "accuracy_before": self.accuracy(self.before),
            "accuracy_after": self.accuracy(after),
            "sampled_accuracy_after": self.accuracy(sampled),
            "seconds_total": round(time.time() - self.started, 1),
            **extra,
            "parameters": self.parameters,
            "seed": self.seed,
        }

    def finish(self, summary: dict[str, Any], title: str, x: str) -> None:
        """Write the summary and the picture, and show what was learnt."""
        self.run.finish(summary)
        title = f"{title}: two-digit {self.name}"
        show_learnt(self.run, self.console, summary, self.samples, title, x, "least significant digit first")


def show_learnt(
    run: RunDirectory,
    console: Console,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    title: str,
    x: str,
    how: str,
) -> None:
    """Write `samples.json` and `learning_curve.png`, and show some answers (and how to read them).

    `samples` have `prompt`, `before`, `after` and `answer`, `summary` the quickstart's keys; `x` is what a
    step of the run's metrics is.
    """
    (run.path / "samples.json").write_text(json.dumps(samples[:100], indent=1) + "\n")
    accuracy = [
        ("greedy, held out", *run.curve("accuracy", "accuracy_200")),
        ("sampled", *run.curve("reward", "critic/score/mean")),
    ]
    panels = [
        ("accuracy", accuracy),
        ("explained variance of the reward", [("", *run.curve("gvpo/explained_variance"))]),
        ("KL to the initial policy (nats)", [("", *run.curve("gvpo/kl"))]),
    ]
    plot_curves(run.path / "learning_curve.png", panels, title=title, x=x)
    table = Table(title=f"Answers to held-out problems ({how})")
    for column in ("problem", "before", "after", "right answer"):
        table.add_column(column)
    changed = [s for s in samples if s["before"] != s["after"]]
    for s in [*changed, *samples][:6]:
        answers = (Text(s[key], "green" if s[key] == s["answer"] else "red") for key in ("before", "after"))
        table.add_row(s["prompt"], *answers, s["answer"])
    console.print(table)
    console.print(
        f"Greedy accuracy {summary['accuracy_before']:.1%} → "
        f"[bold]{summary['accuracy_after']:.1%}[/bold], sampled "
        f"{summary['sampled_accuracy_after']:.1%}, in {summary['seconds_total']:.0f} s "
        f"({summary['seconds_generation']:.0f} s generation, {summary['seconds_update']:.0f} s updates).",
        soft_wrap=True,
    )
    console.print(f"Model, metrics and learning_curve.png are in {run.path}.")
