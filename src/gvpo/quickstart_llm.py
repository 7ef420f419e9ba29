"""`gvpo quickstart --llm`: a language model that people know learns, on a laptop, by commands that all use.

SmolLM2-135M-Instruct (or another chat model) is asked for products up to 12 x 12. `gvpo eval` examines
it, `gvpo train` trains it with a recipe, and `gvpo eval` examines it again, on products that it has not seen.
Killed, each of them goes on where it was, and so does the quickstart.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import time
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import typer
import yaml
from rich.console import Console
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo.data.sources import read_file
from gvpo.errors import InputError
from gvpo.evaluate.command import evaluate, report
from gvpo.model.smollm2 import smollm2
from gvpo.model.tokenizer import load_tokenizer
from gvpo.run import METRICS, RunDirectory, check_writable, replaced
from gvpo.sums import show_learnt
from gvpo.trl.arguments import parse_arguments
from gvpo.trl.train import main as train

HELD_OUT, TOKENS, REWARD = 25, 16, "accuracy:sentence"
_RECIPE: dict[str, Any] = {
    "reward_funcs": [REWARD],
    "reference": "initial",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "steps_per_generation": 2,
    "micro_batch_tokens": 1024,
    "max_completion_length": TOKENS,
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 1,
    "report_to": "none",
}
_EXAMS = {"before": "accuracy_before", "after": "accuracy_after", "sampled": "sampled_accuracy_after"}
_COMMANDS = typer.Typer()
_COMMANDS.command("eval")(evaluate)
_COMMANDS.command("report")(report)


def quickstart_llm(
    model: str | None = None,
    seed: int = 0,
    output: str | Path = "runs/quickstart-llm",
    *,
    steps: int = 40,
    beta: float = 0.1,
    started: float | None = None,
) -> dict[str, Any] | None:
    """Examine a chat model, train it with GVPO, examine it again, and write all that to `output`.

    See `gvpo quickstart --help`. An unfinished run goes on; a finished one is shown again. `started` is the
    `time.time()` at which the job began, for `seconds_total`; now by default.

    Returns:
        What is also written to `summary.json`: the quickstart's keys and 95 % `intervals` over the
        25 held-out problems. None where a signal stopped training.

    Raises:
        InputError: the model cannot be had or used, or the directory holds a run of other settings.
    """
    began, path = time.time() if started is None else started, Path(output)
    console = Console(highlight=False)
    check_writable(path)
    name = str(smollm2()) if model is None else model
    load_tokenizer(name, needs_template=True, advice="a chat model")
    settings = {"model_name_or_path": name, "seed": seed, "max_steps": steps, "beta": beta}
    run, held_out = prepare(path, settings)

    def do(*words: str | Path) -> None:
        line = ["gvpo", *map(str, words)]
        console.print(Text(f"\n$ {shlex.join(line)}", "bold"), soft_wrap=True)
        train(line[2:]) if words[0] == "train" else _COMMANDS(line[1:], standalone_mode=False)

    def examine(model: str | Path, name: str, *options: str) -> None:
        how = ["--reward", REWARD, "--max-tokens", str(TOKENS), "--seed", str(seed)]
        where = ("--data", path / "held_out.jsonl", "--output", path / name)
        do("eval", "--model", model, *where, *how, *options)

    if "accuracy_after" not in _summary(path):
        examine(name, "before")
        do("train", "--config", path / "recipe.yaml", "--resume", "auto")
        if not _summary(path):
            return None
        examine(path, "after")
        examine(path, "sampled", "--samples", "8")
        _summarise(run, settings, began)
    for checkpoint in path.glob("checkpoint-*"):  # with the optimizer, three times the model's size
        shutil.rmtree(checkpoint)
    summary, samples = _summary(path), _samples(path, held_out)
    title = "GVPO: times tables"
    show_learnt(run, console, summary, samples, title, "optimizer step", "greedy")
    do("report", path, path / "before", path / "after", "--output", path / "report.html")
    return summary


def problems(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations and answers for training, and held out. (3 x 4 and 4 x 3 are two problems.)"""
    pairs = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    random.Random(seed).shuffle(pairs)
    rows = []
    for a, b in pairs:
        question = {"role": "user", "content": f"What is {a} x {b}? Answer with the number only."}
        # Without a system message the template brings its own, which is longer than the question.
        rows.append({"prompt": [{"role": "system", "content": ""}, question], "answer": str(a * b)})
    return rows[HELD_OUT:], rows[:HELD_OUT]


def prepare(path: Path, settings: dict[str, Any]) -> tuple[RunDirectory, list[dict[str, Any]]]:
    """Write problems and recipe, the fixed one with these settings; the directory, and what is held out.

    Raises:
        InputError: a setting is wrong, or the directory has another recipe or cannot be written to.
    """
    where = {"dataset_name": [str(path / "train.jsonl")], "output_dir": str(path)}
    recipe, text = path / "recipe.yaml", yaml.safe_dump(settings | where | _RECIPE, sort_keys=False)
    if recipe.exists() and recipe.read_text(encoding="utf-8") != text:
        raise InputError(f"{path} holds a run of other settings: choose another --output, or remove it.")
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        parse_arguments(["--config", file.name])  # what is wrong is said before anything is made
    run = RunDirectory(path)
    training, held_out = problems(settings["seed"])
    run.write_lines("train.jsonl", training)
    run.write_lines("held_out.jsonl", held_out)
    with replaced(recipe) as aside:
        aside.write_text(text, encoding="utf-8")
    return run, held_out


def _summary(path: Path) -> dict[str, Any]:
    file = path / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _samples(path: Path, held_out: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each held-out question, and what was answered before and after."""
    before, after = (read_file(path / name / "samples.parquet") for name in ("before", "after"))
    return [
        {
            "prompt": problem["prompt"][-1]["content"],
            "before": one["completion"].strip(),
            "after": other["completion"].strip(),
            "answer": problem["answer"],
        }
        for problem, one, other in zip(held_out, before, after, strict=True)
    ]


def _summarise(run: RunDirectory, settings: dict[str, Any], began: float) -> None:
    """`summary.json` of exams and training together; the ends of the held-out curve join `metrics.jsonl`."""
    found = {key: _summary(run.path / name)["metrics"]["pass@1"] for name, key in _EXAMS.items()}
    steps = settings["max_steps"]
    first = {"step": 0, "accuracy": found["accuracy_before"]["mean"]}
    last = {"step": steps, "accuracy": found["accuracy_after"]["mean"]}
    run.write_lines(METRICS, [first, *(line for line in run.metrics() if line not in (first, last)), last])
    generation, whole = (sum(run.curve(name)[1]) for name in ("profiling/generation", "step_time"))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run.path))
    run.finish(
        {
            **{key: figures["mean"] for key, figures in found.items()},
            "intervals": {key: [figures["low"], figures["high"]] for key, figures in found.items()},
            "seconds_total": round(time.time() - began, 1),
            "seconds_generation": round(generation, 1),
            "seconds_update": round(whole - generation, 1),
            "steps": steps,
            "model": settings["model_name_or_path"],
            "parameters": skeleton.num_parameters(),
            "beta": settings["beta"],
            "seed": settings["seed"],
        }
    )
