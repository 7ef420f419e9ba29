"""The jobs of the comparison, shared out among processes that need nothing of each other but a folder.

A process takes a job by making its `.claim` file and leaves a `.json` file, whole or not at all. The order is
that of worth: the start, then tuning, then all of the first seed before anything of the second. So a run that
ends early, or loses a process, leaves a table that is whole for fewer seeds, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from transformers import logging as transformers_logging
from transformers.trainer_utils import set_seed

from experiments.comparison import FIRST_SEED, TUNING_SEED
from experiments.language.measure import SAMPLES, evaluate
from experiments.language.methods import METHODS, RATES, make_trainer
from experiments.language.optimum import optimum
from experiments.language.sources import UPDATES_PER_ROLLOUT, Logs, logged
from experiments.language.tasks import TASKS
from gvpo.run import replaced


@dataclass(frozen=True)
class Options:
    """What a run does; see `gvpo lab language --help`."""

    model: str
    output: Path
    device: str = "cpu"
    jobs: int = 1
    minutes: float = 0.0
    seeds: int = 3
    updates: int = 20
    rows: int = 128
    samples: int = SAMPLES
    start_rounds: int = 32
    tasks: Sequence[str] = tuple(TASKS)
    methods: Sequence[str] = tuple(METHODS)
    rates: Sequence[float] = RATES


@dataclass(frozen=True)
class Job:
    """One training run, at the tuned rate if it says none; or samples of the start (method "start"), or the
    logs of another model ("logger") that runs off policy are trained on."""

    task: str
    method: str
    strength: float
    seed: int
    rate: float | None = None
    source: str = "policy"

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        source = "" if self.source == "policy" else f"-{self.source}"
        return f"{self.task}-{self.method}-{self.strength:g}{source}-seed{self.seed}{rate}"


def plan(options: Options) -> list[Job]:
    """All jobs, most worth first."""
    tasks = options.tasks
    jobs = [Job(task, "start", 0.0, TUNING_SEED, 0.0) for task in tasks]
    jobs += [_logger(task, options) for task in tasks if TASKS[task].demonstrations]
    arms = _arms(options)
    jobs += [replace(arm, rate=rate) for arm in arms for rate in options.rates]
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        jobs += [
            replace(arm, seed=seed) for arm in sorted(arms, key=lambda arm: not TASKS[arm.task].thorough)
        ]
    return jobs


def _arms(options: Options) -> list[Job]:
    """First on the policy's own completions, each method's first strength first; then on others."""
    arms = [
        (source != "policy", i, Job(task, name, strength, TUNING_SEED, source=source))
        for name in options.methods
        for i, strength in enumerate(METHODS[name].strengths)
        for task in options.tasks
        for source in METHODS[name].sources
        if i == 0 or (TASKS[task].thorough and source == "policy")
        if source == "policy" or TASKS[task].demonstrations
    ]
    return [arm for *_, arm in sorted(arms, key=lambda arm: arm[:2])]


def _logger(task: str, options: Options) -> Job:
    """Half of a rejection-sampling run: another model than the start, and not a good one."""
    return Job(task, "logger", 0.0, TUNING_SEED, options.rates[0])


def result(options: Options, job: Job) -> dict[str, Any] | None:
    """What a job left, if it is done (or failed, or was cut short: it says so)."""
    path = options.output / "jobs" / f"{job.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def tuned_rate(options: Options, job: Job) -> float | None:
    """The rate whose run on the tuning seed ended with the highest reward; None while they are running."""
    found = {rate: result(options, replace(job, seed=TUNING_SEED, rate=rate)) for rate in options.rates}
    if any(done is None for done in found.values()):
        return None
    scores = {
        rate: done["points"][-1]["reward"] for rate, done in found.items() if done and done.get("points")
    }
    return max(scores, key=lambda rate: scores[rate]) if scores else options.rates[0]


class _Points(TrainerCallback):
    """Evaluates at some updates and stops the training when time is up."""

    def __init__(self, worker: Worker, task: str, at: set[int]) -> None:
        self.worker, self.task, self.at = worker, task, at
        self.points: list[dict[str, float]] = []
        self.cut = False
        self.seconds = 0.0  # spent here

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begun = time.perf_counter()
        if state.global_step in self.at:
            found = self.worker.evaluate(kwargs["model"], self.task)
            self.points.append({"updates": state.global_step, **found})
            self.seconds += time.perf_counter() - begun
        if time.time() > self.worker.deadline:
            self.cut = control.should_training_stop = True


class Worker:
    """A process's model, to which every job goes back."""

    def __init__(self, options: Options, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        torch.set_num_threads(1)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if options.device == "cuda":
            _prepare_cuda(options.jobs)
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        self.tokenizers = {name: TASKS[name].tokenizer(tokenizer) for name in options.tasks}
        self.start = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(
            options.device
        )
        self.start.eval().requires_grad_(False)
        self.longest = 0.0  # of the jobs so far, in seconds

    def work(self) -> None:
        """Take jobs until none is left, or the next would not be ready in time."""
        left = plan(self.options)
        while left:
            # The first whose learning rate is known, and logs are there.
            ready = next((job for job in left if self._is_ready(job)), None)
            if time.time() + self.longest > self.deadline:
                return
            if ready is None:
                time.sleep(0.2)
                continue
            left.remove(ready)
            if self._claim(ready):
                begun = time.time()
                self._write(ready, self._attempt(ready))
                self.longest = max(self.longest, time.time() - begun)

    def _is_ready(self, job: Job) -> bool:
        return self._rate(job) is not None and (job.source != "logs" or self._logs(job) is not None)

    def _logs(self, job: Job) -> Logs | None:
        found = result(self.options, _logger(job.task, self.options))
        return found and found.get("logs")

    def _rate(self, job: Job) -> float | None:
        return tuned_rate(self.options, job) if job.rate is None else job.rate

    def _claim(self, job: Job) -> bool:
        try:
            (self.options.output / "jobs" / f"{job.name}.claim").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _write(self, job: Job, found: dict[str, Any]) -> None:
        with replaced(self.options.output / "jobs" / f"{job.name}.json") as aside:
            aside.write_text(json.dumps({"job": asdict(job), **found}) + "\n", encoding="utf-8")

    def _attempt(self, job: Job) -> dict[str, Any]:
        try:
            return self.run(job)
        except Exception:  # the others are not to end with it
            return {"error": traceback.format_exc()}
        finally:
            if self.options.device == "cuda":
                torch.cuda.empty_cache()

    def evaluate(self, policy: Any, task: str) -> dict[str, float]:
        """With random numbers of its own, so that evaluating changes nothing in the training."""
        devices = [torch.cuda.current_device()] if self.options.device == "cuda" else []
        with torch.random.fork_rng(devices), self._precision():
            return evaluate(policy, self.start, self.tokenizers[task], TASKS[task], each=self.options.samples)

    def _precision(self) -> Any:
        """That of the training."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.options.device == "cpu")

    def run(self, job: Job) -> dict[str, Any]:
        """A job's outcome: `points` along the training, or the `answers` of the start."""
        set_seed(job.seed)
        if job.method == "start":
            with self._precision():
                return self._run_start(job)
        if job.method == "logger":
            return self._run_logger(job)
        updates, seen = self.options.updates, []
        on_the_way = TASKS[job.task].thorough and job.seed != TUNING_SEED and job.source == "policy"
        half_way = {max(updates // 2, 1)} if on_the_way else set()
        callback = _Points(self, job.task, half_way | {updates})
        begun = time.perf_counter()
        self._train(job, updates, [callback], lambda rewards: seen.append(sum(rewards) / len(rewards)))
        return {
            "rate": self._rate(job),
            "points": callback.points,
            "rewards": seen,
            "samples": len(seen) * self.options.rows * UPDATES_PER_ROLLOUT[job.source],
            "seconds": time.perf_counter() - begun - callback.seconds,
            "seconds_evaluation": callback.seconds,
            "peak_memory": torch.cuda.max_memory_allocated() if self.options.device == "cuda" else 0,
        } | ({"error": "cut: time was up"} if callback.cut else {})

    def _train(
        self, job: Job, updates: int, callbacks: Sequence[TrainerCallback], on_rewards: Any = lambda _: None
    ) -> PreTrainedModel:
        rate = self._rate(job)
        assert rate is not None
        model = copy.deepcopy(self.start).requires_grad_(True)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(
                METHODS[job.method], model, self.tokenizers[job.task], TASKS[job.task],
                strength=job.strength, rate=rate, seed=job.seed, updates=updates, rows=self.options.rows,
                output=Path(scratch), callbacks=callbacks, on_rewards=on_rewards, source=job.source,
                logs=self._logs(job) if job.source == "logs" else None,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return model

    def _run_logger(self, job: Job) -> dict[str, Any]:
        model = self._train(replace(job, method="rft"), max(self.options.updates // 2, 1), [])
        task = TASKS[job.task]
        with self._precision():
            logs = logged(model, self.tokenizers[job.task], task)
        texts = {
            key: self.tokenizers[job.task].batch_decode([one["ids"] for one in found])
            for key, found in logs.items()
        }
        right = [task.right(text, key) for key, found in texts.items() for text in found]
        return {"logs": logs, "reward": sum(right) / len(right)}

    def _run_start(self, job: Job) -> dict[str, Any]:
        point = {"updates": 0, **self.evaluate(self.start, job.task)}
        strengths = METHODS["gvpo"].strengths
        task = TASKS[job.task]
        rounds = self.options.start_rounds
        return {
            "points": [point],
            **optimum(self.start, self.tokenizers[job.task], task, self.options.samples, rounds, strengths),
        }


def _prepare_cuda(jobs: int) -> None:
    # Else one process keeps memory that another needs.
    torch.cuda.set_per_process_memory_fraction(0.92 / jobs)
    torch.set_float32_matmul_precision("high")  # TF32, as finely as the device allows it fast
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        # TRL compiles kernels for its head when they are first used; without a compiler it has plain torch.
        with contextlib.suppress(ImportError):
            from trl.kernels import chunked_logprob

            chunked_logprob._TRITON_AVAILABLE = False


def work(options: Options, deadline: float) -> None:
    """What a process of the run does."""
    Worker(options, deadline).work()
