"""An evaluation: sample, grade, summarise; killed and started again it goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml

from gvpo.data.sources import Row, read_file
from gvpo.errors import InputError
from gvpo.evaluate.sampling import Completion, Sampler, SamplingOptions
from gvpo.evaluate.statistics import bootstrap, majority_correct, paired_test, pass_at_k
from gvpo.rewards.extraction import extract_answer
from gvpo.rewards.functions import RewardFunction
from gvpo.rewards.normalization import clean, key, quantity
from gvpo.run import RunDirectory, new_figure, replaced, save_figure

SAMPLES = "samples.parquet"
_PARTS = "samples.by-length"


@dataclass(frozen=True)
class Settings:
    """Everything that an evaluation's result depends on; see `gvpo eval --help`.

    `batch_size` belongs to it, as part of what fixes the random numbers.
    """

    model: str
    data: str
    split: str = "test"
    size: int | None = None
    reward: str = "accuracy"
    samples: int = 1
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    batch_size: int = 32
    chat: bool = True
    system_prompt: str | None = None
    instruction: str | None = None
    chat_template: str | None = None
    backend: str = "transformers"
    dtype: str = "auto"
    seed: int = 0


def sample_all(
    settings: Settings,
    prompts: datasets.Dataset,
    run: RunDirectory,
    make_sampler: Callable[[], Sampler],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Every sample of the evaluation, each batch on disk as soon as it is drawn.

    What an earlier, interrupted call drew under the same settings is taken over, and the model is loaded by
    `make_sampler` only if something is left. `progress` is called with the number of samples on disk.

    Raises:
        InputError: the directory holds an evaluation with other settings.
    """
    _start(run, settings, prompts)
    complete = run.path / SAMPLES
    if complete.exists():
        return list(read_file(complete))
    parts = run.path / _PARTS
    parts.mkdir(exist_ok=True)
    # A prompt's samples together, to read it once; prompts of like length together, to pad them little.
    lengths = [len(str(prompt)) for prompt in prompts["prompt"]]
    by_length = sorted(range(len(prompts)), key=lambda index: -lengths[index])
    jobs = [(index, number) for index in by_length for number in range(settings.samples)]
    sampler: Sampler | None = None
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        file = parts / f"{start:09d}.parquet"
        if not file.exists():
            sampler = sampler or make_sampler()
            texts = [sampler.render(prompts[index]["prompt"]) for index, _ in batch]
            # Seeds far apart for batches next to each other and for seeds next to each other.
            drawn = sampler.sample(texts, (settings.seed * 1_000_003 + start * 7_919) % 2**31)
            _write([_row(prompts, *one) for one in zip(batch, texts, drawn, strict=True)], file)
        progress(start + len(batch))
    rows = [row for file in parts.glob("*.parquet") for row in read_file(file)]
    rows.sort(key=itemgetter("prompt_index", "sample"))
    _write(rows, complete)
    shutil.rmtree(parts)
    return rows


def _start(run: RunDirectory, settings: Settings, prompts: datasets.Dataset) -> None:
    # A file may have changed under the same name.
    content = json.dumps([prompts[name][:] for name in ("prompt", "answer") if name in prompts.column_names])
    config = {**asdict(settings), "prompts_sha256": hashlib.sha256(content.encode()).hexdigest()}
    path = run.path / "config.yaml"
    started = (run.path / SAMPLES).exists() or (run.path / _PARTS).exists()
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if started and path.exists() else config
    for name, value in config.items():
        if before.get(name) != value:
            raise InputError(
                f"{run.path} holds an evaluation with {name} {before.get(name)!r} instead of {value!r}: "
                "choose another --output, or remove it."
            )
    run.start(config | {"threads": torch.get_num_threads()})


def _row(prompts: datasets.Dataset, job: tuple[int, int], text: str, completion: Completion) -> Row:
    index, number = job
    source = prompts[index]
    return {
        "prompt_index": index,
        "sample": number,
        "prompt": text,
        "answer": source.get("answer"),
        "completion": completion.text,
        "tokens": completion.tokens,
        "truncated": completion.truncated,
    }


def _write(rows: Sequence[Row], path: Path) -> None:
    with replaced(path) as aside:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), aside, compression="zstd")


# --- Grading ------------------------------------------------------------------------------------------------


def grade(
    rows: list[Row], prompts: datasets.Dataset, run: RunDirectory, reward_name: str, reward: RewardFunction
) -> None:
    """Add `extracted` and `reward` to every sample, in `rows` and in the run's samples.

    The reward gets what it gets in training: the data set's columns, and conversations for conversations.

    Raises:
        InputError: the reward cannot score a sample.
    """
    columns = prompts[[row["prompt_index"] for row in rows]]
    completions: list[Any] = [row["completion"] for row in rows]
    if not isinstance(columns["prompt"][0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    rewards = reward(prompts=columns.pop("prompt"), completions=completions, **columns)
    closing = "sentence" if reward_name == "accuracy:sentence" else None  # as the reward reads it
    for row, score in zip(rows, rewards, strict=True):
        if score is None:
            index = row["prompt_index"]
            raise InputError(f"the reward {reward_name} cannot score prompt {index} (from 0): remove it.")
        found = extract_answer(row["completion"], closing)
        whole = row["completion"].strip() or None
        row["extracted"] = whole if reward_name == "exact" else found and found.text
        row["reward"] = float(score)
    _write(rows, run.path / SAMPLES)


def _vote(row: Row) -> str | None:
    """What makes two answers the same vote: the number, or the text whatever its spacing."""
    if row["extracted"] is None:
        return None
    text = clean(row["extracted"])
    number = quantity(text)
    return key(text) if number is None else f"{number.value}{'%' * number.percent}"


# --- Summary ------------------------------------------------------------------------------------------------


def summarise(rows: Iterable[Row], samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Every figure with its 95 % bootstrap interval over prompts.

    Returns:
        `pass@1` (mean over samples; the same is called `avg@n` for n samples), `pass@k` and `maj@k` for
        k = 2, 4, 8, … up to n, `truncated` and `unparsable` (shares of samples) and `tokens` (mean length),
        each with `mean`, `low` and `high`.
    """
    groups = [list(group) for _, group in groupby(rows, itemgetter("prompt_index"))]
    scores = [[row["reward"] for row in group] for group in groups]
    right = [sum(score >= 1.0 for score in group) for group in scores]
    values: dict[str, list[float]] = {"pass@1": [fmean(group) for group in scores]}
    if samples > 1:
        values[f"avg@{samples}"] = values["pass@1"]
    sizes = sorted({2**power for power in range(1, samples.bit_length())} | ({samples} - {1}))
    values |= {f"pass@{k}": [pass_at_k(samples, count, k) for count in right] for k in sizes}
    votes = [[_vote(row) for row in group] for group in groups]
    both = list(zip(votes, scores, strict=True))
    values |= {f"maj@{k}": [majority_correct(vote[:k], score[:k]) for vote, score in both] for k in sizes}
    values["truncated"] = [fmean(row["truncated"] for row in group) for group in groups]
    values["unparsable"] = [fmean(row["extracted"] is None for row in group) for group in groups]
    values["tokens"] = [fmean(row["tokens"] for row in group) for group in groups]
    return {name: asdict(bootstrap(value, seed)) for name, value in values.items()}


def compare(run: Path, other: Path, seed: int) -> dict[str, Any]:
    """The paired test between two finished evaluations of the same prompts.

    Raises:
        InputError: one of them is not finished, or their prompts differ.
    """
    these, others = (_means(path) for path in (run, other))
    if list(these) != list(others):
        raise InputError(f"{run} and {other} evaluated different prompts: compare runs on the same ones.")
    result = asdict(paired_test(list(these.values()), list(others.values()), seed))
    return {"run": run.name, "other": other.name, "prompts": len(these), **result}


def _means(path: Path) -> dict[tuple[Any, ...], float]:
    """Mean reward for each prompt, told apart by its place and its answer."""
    if not (path / SAMPLES).is_file() or not (path / "summary.json").is_file():
        raise InputError(f"{path} holds no finished evaluation: run gvpo eval --output {path} first.")
    prompts = groupby(read_file(path / SAMPLES), itemgetter("prompt_index", "answer"))
    return {prompt: fmean(row["reward"] for row in rows) for prompt, rows in prompts}


def finish(run: RunDirectory, settings: Settings, rows: list[Row]) -> dict[str, Any]:
    """Summarise a graded evaluation, write `summary.json` and draw its picture."""
    figures = summarise(rows, settings.samples, settings.seed)
    summary = {
        "model": settings.model,
        "data": settings.data,
        "prompts": len({row["prompt_index"] for row in rows}),
        "samples": settings.samples,
        "metrics": figures,
    }
    draw(figures, f"{settings.model} on {settings.data}", run.path / "summary.png")
    return run.finish(summary)


def draw(figures: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """The accuracies and rates with their intervals, as a PNG."""
    names = [name for name in figures if name != "tokens"][::-1]
    means, low, high = (np.array([figures[name][key] for name in names]) for key in ("mean", "low", "high"))
    figure, (axis,) = new_figure(width=7, height=1.2 + 0.36 * len(names))
    axis.errorbar(means, names, xerr=[means - low, high - means], fmt="o", capsize=3, color="#1f5fa8")
    for name, mean in zip(names, means, strict=True):
        axis.annotate(
            f"{mean:.1%}", (mean, name), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8
        )
    axis.set_xlim(-0.03, 1.03)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("mean and 95 % interval over prompts")
    save_figure(figure, path)
