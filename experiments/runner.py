"""Runs experiments: their jobs side by side, then tables, JSON and pictures."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from experiments.comparison import TUNING_SEED, Record, Scale
from gvpo import __version__
from gvpo.errors import InputError
from gvpo.progress import Ticker
from gvpo.run import RunDirectory

EXPERIMENTS = ("optimum", "offline", "foreign", "frontier", "reuse", "staleness", "relatives", "choices")
JOBS = "jobs.jsonl"  # what an unfinished run has done


def run_experiment(
    name: str, scale: Scale, output: Path, *, workers: int = 1, console: Console | None = None
) -> dict[str, Any]:
    """Run one experiment and write `config.yaml`, `metrics.jsonl`, `summary.json` and a picture.

    Jobs that an interrupted run of the same settings has done are not done again.

    Args:
        name: one of `EXPERIMENTS`.
        scale: seeds, and whether to be quick.
        output: the run directory.
        workers: processes. What is found does not depend on it.
        console: where to show progress and tables.

    Returns:
        The summary.

    Raises:
        InputError: the output directory cannot be written to.
    """
    console = console or Console()
    module = importlib.import_module(f"experiments.{name}")
    run = RunDirectory(output)
    config = {"command": f"lab {name}", "seeds": list(scale.seeds), "quick": scale.quick}
    earlier = _earlier(run, config)
    run.start(config)
    jobs = module.jobs(scale)
    if hasattr(module, "prepare"):
        console.print(f"gvpo lab {name}: models to begin with …", highlight=False)
        module.prepare(scale, run.path)
    ticker = Ticker(console, f"gvpo lab {name}", len(jobs))
    done = {job: outcome for job, outcome in earlier.items() if job in jobs}
    with ticker.running():
        ticker.advance(len(done))
        left = [job for job in jobs if job not in done]
        for job, records, taken in _outcomes(name, left, scale, run.path, workers):
            done[job] = records, taken
            with open(run.path / JOBS, "a", encoding="utf-8") as file:
                file.write(json.dumps([job, [vars(record) for record in records], taken]) + "\n")
            ticker.advance(len(done), f"({job}, {taken:.0f} s)")
    seconds = sum(taken for _, taken in done.values())
    # Rounded as they are written, so that `show_again` finds the same.
    records = [replace(record, metrics=rounded(record.metrics)) for job in jobs for record in done[job][0]]
    run.write_lines("metrics.jsonl", map(vars, records))
    machine = f"{platform.machine()} CPU, one thread a worker, no GPU"
    head = {
        "experiment": name,
        "command": f"gvpo lab {name}" + (" --quick" if scale.quick else "") + f" --seeds {len(scale.seeds)}",
        "made": circumstances(machine) | {"cpu_seconds": round(seconds)},
        "seeds": list(scale.seeds),
        "tuning_seed": TUNING_SEED,
        "quick": scale.quick,
    }
    found = _finish(module, head, records, scale, run, console)
    (run.path / JOBS).unlink(missing_ok=True)
    return found


def _earlier(run: RunDirectory, config: dict[str, Any]) -> dict[str, tuple[list[Record], float]]:
    """What an interrupted run of the same settings has done: job → records, seconds."""
    path, settings = run.path / JOBS, run.path / "config.yaml"
    if not (path.exists() and settings.exists() and yaml.safe_load(settings.read_text()) == config):
        path.unlink(missing_ok=True)
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return {job: ([Record(**record) for record in records], taken) for job, records, taken in lines}


def show_again(name: str, output: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Make tables, JSON and picture again from the runs that an experiment left in `output`.

    Raises:
        InputError: there are none.
    """
    run_path = output / "metrics.jsonl"
    if not (run_path.exists() and (output / "summary.json").exists()):
        raise InputError(f"{output} has no finished run of gvpo lab {name} (metrics.jsonl, summary.json).")
    run = RunDirectory(output)
    records = [Record(**entry) for entry in run.metrics()]
    before = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    head = {key: before[key] for key in ("experiment", "command", "made", "seeds", "tuning_seed", "quick")}
    scale = Scale(tuple(before["seeds"]), before["quick"])
    module = importlib.import_module(f"experiments.{name}")
    return _finish(module, head, records, scale, run, console or Console())


def _finish(
    module: Any,
    head: dict[str, Any],
    records: list[Record],
    scale: Scale,
    run: RunDirectory,
    console: Console,
) -> dict[str, Any]:
    name = head["experiment"]
    found = {**head, **rounded(module.summary(records, scale, run.path))}
    run.finish(found)
    module.draw(found, run.path / f"{name}.png")
    for table in module.tables(found):
        console.print(table)
    console.print(
        f"95 % intervals over {len(scale.seeds)} seeds; settings chosen on another seed. "
        f"{found['made']['cpu_seconds']} CPU seconds. summary.json, metrics.jsonl (every run) and {name}.png "
        f"are in {run.path}.",
        soft_wrap=True,
    )
    return found


def _outcomes(
    name: str, jobs: list[str], scale: Scale, directory: Path, workers: int
) -> Iterator[tuple[str, list[Record], float]]:
    if workers <= 1 or not jobs:
        for job in jobs:
            yield job, *_run_job(name, job, scale, directory)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        waiting = {pool.submit(_run_job, name, job, scale, directory): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], *future.result()


def _run_job(name: str, job: str, scale: Scale, directory: Path) -> tuple[list[Record], float]:
    # More threads cost models of this size more than they bring.
    torch.set_num_threads(1)
    started = time.process_time()
    records = importlib.import_module(f"experiments.{name}").run_job(job, scale, directory)
    return records, time.process_time() - started


def circumstances(machine: str) -> dict[str, Any]:
    """When, where and with what: for the head of a summary."""
    packages = ("torch", "trl", "transformers", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "versions": {
            "gvpo": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def rounded(value: Any) -> Any:
    """Six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
