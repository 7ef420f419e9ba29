"""Runs the comparison: processes side by side on one device, then records, tables and pictures."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.comparison import TUNING_SEED
from experiments.language.jobs import Job, Options, plan, result, work
from experiments.runner import circumstances, rounded
from gvpo.errors import InputError
from gvpo.progress import Ticker
from gvpo.run import RunDirectory, replaced

_GRACE = 20.0  # seconds beyond the deadline in which processes end by themselves


def run(options: Options, *, console: Console | None = None) -> int:
    """Run all jobs that are not done yet, until none is left or time is up.

    Returns:
        How many of the jobs are done.

    Raises:
        InputError: no model in the folder, or all jobs failed.
    """
    console = console or Console()
    if not (Path(options.model) / "config.json").exists():
        raise InputError(f"--model {options.model} has no config.json: give a transformers model's folder.")
    RunDirectory(options.output)
    folder = options.output / "jobs"
    folder.mkdir(exist_ok=True)
    jobs = plan(options)
    for job in jobs:  # what failed, was cut short or was abandoned is done again
        found = result(options, job)
        if found is None or "error" in found:
            (folder / f"{job.name}.claim").unlink(missing_ok=True)
            (folder / f"{job.name}.json").unlink(missing_ok=True)
    begun = time.time()
    deadline = begun + 60 * options.minutes if options.minutes else float("inf")
    if any(result(options, job) is None for job in jobs):
        _side_by_side(options, jobs, deadline, console)
    outcomes = [result(options, job) for job in jobs]
    errors = [found["error"] for found in outcomes if found and "error" in found]
    done = sum(found is not None and "error" not in found for found in outcomes)
    with replaced(options.output / "made.json") as aside:
        aside.write_text(json.dumps(_made(options, time.time() - begun), indent=1) + "\n")
    console.print(
        f"{done} of {len(jobs)} jobs are done, {len(errors)} failed or were cut; in {folder}.", soft_wrap=True
    )
    if errors:
        console.print(errors[0], markup=False, highlight=False)
    if errors and not done:
        raise InputError(f"All {len(errors)} jobs failed; the first reason stands above.")
    return done


def collect(output: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Records, summary, tables and picture of the jobs that are done; the summary.

    Raises:
        InputError: there are none, or not for the start and one seed of a task.
    """
    from experiments.language import report

    console, run = console or Console(), RunDirectory(output)
    made = json.loads((output / "made.json").read_text(encoding="utf-8"))
    options = made.pop("options")
    del options["output"]
    outcomes = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "jobs").glob("*.json"))
    ]
    outcomes = [outcome for outcome in outcomes if "error" not in outcome]
    records = report.records(outcomes)
    arms = {record.arm for record in records}
    if "start" not in arms or arms <= {"start", "optimum"}:
        raise InputError(f"{output / 'jobs'} has no finished training, or none of the start.")
    seeds = sorted({record.seed for record in records} - {TUNING_SEED})
    records = [replace(record, metrics=rounded(record.metrics)) for record in records]
    run.start({"command": "lab language", **options})
    run.write_lines("metrics.jsonl", map(vars, records))
    by_task = report.summary(records, seeds)
    if options["device"] == "cpu":  # a thread a run
        spent = (outcome.get(name, 0) for outcome in outcomes for name in ("seconds", "seconds_evaluation"))
        made["cpu_seconds"] = round(sum(spent))
    found = {
        "experiment": "language",
        "command": "gvpo lab language "
        + " ".join(
            f"--{name.replace('_', '-')} {options[name]}"
            for name in ("device", "jobs", "updates", "rows", "start_rounds", "minutes")
            if options[name]
        )
        + " --tasks "
        + ",".join(options["tasks"])
        + " --rates "
        + ",".join(f"{rate:g}" for rate in options["rates"])
        + (f" --seeds {options['seeds']}" if options["seeds"] != Options.seeds else ""),
        "made": made,
        "seeds": seeds,
        "tuning_seed": TUNING_SEED,
        "problem": {name: options[name] for name in ("updates", "rows", "samples", "rates")},
        "runs": sum("rate" in outcome for outcome in outcomes),
        "tasks": list(by_task),
        **rounded(by_task),
    }
    found = run.finish(found)
    report.draw(found, run.path / "language.png")
    for table in report.tables(found):
        console.print(table)
    return found


def _side_by_side(options: Options, jobs: list[Job], deadline: float, console: Console) -> None:
    # Before the first import of torch in the processes that take it over.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(options, deadline), daemon=True) for _ in range(options.jobs)
    ]
    for worker in workers:
        worker.start()
    ticker = Ticker(console, "gvpo lab language", len(jobs))
    with ticker.running():
        while any(worker.is_alive() for worker in workers) and time.time() < deadline + _GRACE:
            time.sleep(0.5)
            ticker.advance(sum((options.output / "jobs" / f"{job.name}.json").exists() for job in jobs))
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
        worker.join()


def _made(options: Options, seconds: float) -> dict[str, Any]:
    """When, where and with what: for the head of the summary."""
    machine = f"{platform.machine()} CPU"
    if options.device == "cuda":
        import torch

        machine = torch.cuda.get_device_name()
    return {
        **circumstances(f"{machine}, {options.jobs} processes side by side"),
        "seconds": round(seconds),
        "options": asdict(options) | {"model": Path(options.model).name, "output": ""},
    }
