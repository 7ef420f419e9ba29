"""Learning from responses that the policy did not sample: demonstrations, logs, old rollouts.

    OMP_NUM_THREADS=1 python -m benchmarks.offpolicy [demonstrations] [offline] [stale] --seeds 0 1 2

Two-digit sums and the tiny Llama of the quickstart; accuracy is greedy, on 1,000 held-out problems. Prints
tables and writes `results/offpolicy.json`. All experiments with three seeds take an hour or two on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import set_seed

from benchmarks.measure import RESULTS, clock, record
from gvpo.progress import Ticker
from gvpo.sums import TASKS, answers, make_model, make_tokenizer, warm_up
from gvpo.trl import GVPOConfig, GVPOTrainer

TASK = TASKS["addition"]
TOKENIZER = make_tokenizer()
Curve = list[tuple[int, float]]  # optimizer step (or epoch), accuracy


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(given == wanted) for given, wanted in zip(completions, answer, strict=True)]


def prompts(pairs: list[tuple[int, int]]) -> Dataset:
    right = [TASK.right(*p) for p in pairs]
    return Dataset.from_dict(
        {"prompt": [TASK.prompt(*p) for p in pairs], "answer": right, "demonstrations": right}
    )


def accuracy(model: LlamaForCausalLM, pairs: list[tuple[int, int]], *, sample: bool = False) -> float:
    given = answers(model, TOKENIZER, [TASK.prompt(*p) for p in pairs], sample=sample)
    return sum(a == TASK.right(*p) for a, p in zip(given, pairs, strict=True)) / len(pairs)


def weak_policy(seed: int) -> LlamaForCausalLM:
    """The quickstart's model after its sloppy teacher."""
    set_seed(seed)
    model = make_model(TOKENIZER)
    quiet = Ticker(Console(quiet=True), "", 1)
    warm_up(model, TOKENIZER, TASK, TASK.pairs(seed)[0], quiet, seed)
    return model


class Watch(TrainerCallback):
    """Accuracy every so many optimizer steps."""

    def __init__(self, model: LlamaForCausalLM, pairs: list[tuple[int, int]], every: int) -> None:
        self.model, self.pairs, self.every = model, pairs, every
        self.curve: Curve = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.curve.append((state.global_step, accuracy(self.model, self.pairs)))


def train(
    model: LlamaForCausalLM, seed: int, *, every: int, data: Dataset | None, **settings: Any
) -> tuple[Curve, list[dict[str, float]], float]:
    """Train with `GVPOTrainer`; returns the accuracies, the log and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GVPOConfig(
            output_dir=folder,
            max_completion_length=4,
            micro_batch_tokens=4000,
            logging_steps=10,
            seed=seed,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            adam_beta2=0.99,
            **settings,
        )
        trainer = GVPOTrainer(
            model,
            None if data is None else correct,
            config,
            train_dataset=data,
            processing_class=TOKENIZER,
        )
        watch = Watch(model, TASK.pairs(seed)[1], every)
        trainer.add_callback(watch)
        trainer.remove_callback(
            next(type(c) for c in trainer.callback_handler.callbacks if "Print" in type(c).__name__)
        )
        started = clock()
        trainer.train()
        print(f"  seed {seed}, {settings}: {watch.curve}", flush=True)  # a long wait else
        return watch.curve, trainer.state.log_history, clock() - started


# ------------------------------------------------------------------------------------------ demonstrations


def demonstrations(seed: int) -> dict[str, Any]:
    """A randomly initialised model, no warm-up: groups of 4 with and without a demonstration in each."""
    out: dict[str, Any] = {}
    for name, count in (("no demonstrations", 0), ("one demonstration of 4", 1)):
        set_seed(seed)
        curve, log, seconds = train(
            make_model(TOKENIZER),
            seed,
            every=100,
            data=prompts(TASK.pairs(seed)[0]),
            demonstrations_per_group=count,
            num_generations=4,
            per_device_train_batch_size=256,
            max_steps=1000,
            beta=0.1,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
        )
        sampled = [entry.get("demonstrations/sampled_reward", entry.get("reward")) for entry in log]
        out[name] = {
            "accuracy": curve[-1][1],
            "curve": curve,
            "sampled reward, first": next(r for r in sampled if r is not None),
            "sampled reward, last": [r for r in sampled if r is not None][-1],
            "seconds": round(seconds, 1),
        }
    return out


# ------------------------------------------------------------------------------------------------ offline


def offline(
    seed: int, *, groups: int = 2500, k: int = 8, epochs: int = 20, betas: tuple[float, ...] = (0.3,)
) -> dict[str, Any]:
    """20,000 logged completions of the weak policy; GVPO on them beside fine-tuning on the right ones."""
    logger = weak_policy(seed)
    train_pairs, held_out = TASK.pairs(seed)
    chosen = random.Random(seed).sample(train_pairs, groups)
    rows = [p for p in chosen for _ in range(k)]
    torch.manual_seed(seed)
    given = [
        a
        for i in range(0, len(rows), 2000)
        for a in answers(logger, TOKENIZER, [TASK.prompt(*p) for p in rows[i : i + 2000]], sample=True)
    ]
    right = [a == TASK.right(*p) for a, p in zip(given, rows, strict=True)]
    out: dict[str, Any] = {
        "logging policy": {
            "accuracy": accuracy(logger, held_out),
            "sampled accuracy": accuracy(logger, held_out, sample=True),
            "reward of the logs": statistics.mean(right),
        }
    }
    state = {name: value.clone() for name, value in logger.state_dict().items()}
    per_epoch = groups // 32
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        table = {
            "prompt": [TASK.prompt(*p) for p in rows],
            "completion": given,
            "reward": [float(r) for r in right],
            "complete": [len(a) < 4 for a in given],  # else it was cut off
        }
        pyarrow.parquet.write_table(pyarrow.table(table), file.name)
        for beta in betas:
            logger.load_state_dict(state)
            curve, _, seconds = train(
                logger,
                seed,
                every=per_epoch,
                data=None,
                offline=file.name,
                reference="initial",
                num_generations=k,
                per_device_train_batch_size=32 * k,
                max_steps=epochs * per_epoch,
                beta=beta,
                learning_rate=3e-4,
                lr_scheduler_type="linear",
                warmup_steps=20,
            )
            out[f"GVPO, beta {beta:g}"] = _summary(curve, seconds)
    logger.load_state_dict(state)
    kept = [(TASK.prompt(*p), a) for p, a, r in zip(rows, given, right, strict=True) if r]
    curve, seconds = rejection_sampling(logger, kept, seed, epochs * per_epoch, per_epoch, held_out)
    out["rejection-sampling fine-tuning"] = _summary(curve, seconds)
    return out


def rejection_sampling(
    model: LlamaForCausalLM,
    kept: list[tuple[str, str]],
    seed: int,
    steps: int,
    every: int,
    held_out: list[tuple[int, int]],
) -> tuple[Curve, float]:
    """Maximum likelihood of the right completions, with as many rows a step and as many steps."""
    ids = torch.tensor(TOKENIZER([f"{prompt}{answer}<eos>" for prompt, answer in kept])["input_ids"])
    length = len(TOKENIZER(kept[0][0])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    curve: Curve = []
    started = clock()
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(1, steps + 1):
        if len(order) < 256:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        batch, order = ids[order[:256]], order[256:]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 20)
        logits = model(input_ids=batch[:, :-1]).logits[:, length - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, length:].flatten(), reduction="sum"
        )
        optimizer.zero_grad(set_to_none=True)
        (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            curve.append((step, accuracy(model, held_out)))
    return curve, clock() - started


def _summary(curve: Curve, seconds: float) -> dict[str, Any]:
    values = [value for _, value in curve]
    return {"accuracy": values[-1], "best": max(values), "curve": curve, "seconds": round(seconds, 1)}


# -------------------------------------------------------------------------------------------------- stale

_REPLAY = {"per_device_train_batch_size": 64, "replay_ratio": 3.0, "replay_max_age": 16}
_HEAVY = {"per_device_train_batch_size": 16, "replay_ratio": 15.0}
STALE: dict[str, dict[str, Any]] = {
    "rollouts up to 16 updates old, stored reference": {"steps_per_generation": 16},
    "8 fresh and 24 replayed groups up to 16 updates old, stored reference": _REPLAY,
    "the same, re-anchored": _REPLAY | {"replay_reference": "current"},
    "2 fresh and 30 replayed groups, stored reference": _HEAVY,
    "2 fresh and 30 replayed groups, re-anchored": _HEAVY | {"replay_reference": "current"},
    "fresh rollouts, initial reference": {"reference": "initial"},
}


def stale(seed: int) -> dict[str, Any]:
    """From the weak policy, 160 updates of 32 groups of 8 at beta 0.3, with rollouts of different ages."""
    start = weak_policy(seed)
    state = {name: value.clone() for name, value in start.state_dict().items()}
    data = prompts(TASK.pairs(seed)[0])
    out: dict[str, Any] = {"start": {"accuracy": accuracy(start, TASK.pairs(seed)[1])}}
    for name, settings in STALE.items():
        start.load_state_dict(state)
        common = {"per_device_train_batch_size": 256, "num_generations": 8, "max_steps": 160, "beta": 0.3}
        curve, log, seconds = train(
            start, seed, every=16, data=data, learning_rate=7e-4, **{**common, **settings}
        )
        ages = [entry["replay/age_max"] for entry in log if "replay/age_max" in entry]
        out[name] = _summary(curve, seconds) | {"oldest replayed": max(ages, default=None)}
    return out


# --------------------------------------------------------------------------------------------------- main

EXPERIMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "demonstrations": demonstrations,
    "offline": offline,
    "stale": stale,
}


def rows_of(by_seed: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way of training, in percent, seeds one after the other."""
    rows = []
    for name in next(iter(by_seed.values())):
        runs = [seed[name] for seed in by_seed.values()]
        row: dict[str, Any] = {"run": name}
        for key in ("accuracy", "best", "reward of the logs", "sampled accuracy"):
            if key in runs[0]:
                row[key] = [round(100 * run[key], 1) for run in runs]
        for key in ("sampled reward, first", "sampled reward, last"):
            if key in runs[0]:
                row[key] = [round(run[key], 3) for run in runs]
        if "seconds" in runs[0]:
            row["CPU seconds"] = [round(run["seconds"]) for run in runs]
        if "oldest replayed" in runs[0]:
            row["oldest replayed"] = runs[0]["oldest replayed"]
        rows.append(row)
    return rows


def show(console: Console, name: str, by_seed: dict[str, dict[str, Any]]) -> None:
    function = EXPERIMENTS[name]
    table = Table(title=f"{name}: {(function.__doc__ or '').splitlines()[0]}")
    for column in ("", "greedy accuracy, held out, by seed", "mean", "best of the curve", "seconds"):
        table.add_column(column)
    for row in next(iter(by_seed.values())):
        runs = [seed[row] for seed in by_seed.values()]
        values = [run["accuracy"] for run in runs]
        table.add_row(
            row,
            "  ".join(f"{value:.1%}" for value in values),
            f"{statistics.mean(values):.1%}",
            "  ".join(f"{run['best']:.1%}" for run in runs if "best" in run),
            "  ".join(f"{run['seconds']:.0f}" for run in runs if "seconds" in run),
        )
    console.print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over the epochs of the log; a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.4), dpi=160, layout="constrained")
    axis = figure.subplots()
    seeds = list(results["offline"].values())
    arms = [arm for arm, run in seeds[0].items() if "curve" in run]
    for colour, arm in enumerate(arms):
        for i, seed in enumerate(seeds):
            epochs = range(1, len(seed[arm]["curve"]) + 1)
            values = [accuracy for _, accuracy in seed[arm]["curve"]]
            axis.plot(epochs, values, color=f"C{colour}", alpha=0.8, label=None if i else arm)
    for i, seed in enumerate(seeds):
        start = seed["logging policy"]["accuracy"]
        axis.axhline(start, color="gray", linestyle=":", linewidth=1, label=None if i else "logging policy")
    axis.set(xlabel="epochs of 20,000 logged completions", ylabel="greedy accuracy, held out", ylim=(0, 1.02))
    axis.set_xticks(range(0, len(seeds[0][arms[0]]["curve"]) + 1, 5))
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], default=[*EXPERIMENTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "offpolicy.json")
    arguments = parser.parse_args()
    console = Console()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.experiments:
        for seed in arguments.seeds:
            results.setdefault(name, {})[str(seed)] = EXPERIMENTS[name](seed)
            results["rows"] = {name: rows_of(results[name]) for name in EXPERIMENTS if name in results}
            record(arguments.output, results)
        show(console, name, results[name])
    if "offline" in results:
        draw(results, arguments.output.with_suffix(".png"))
    console.print(f"Written to {arguments.output}.")


if __name__ == "__main__":
    main()
