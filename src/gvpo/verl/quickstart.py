"""The quickstart's task on verl: Ray, FSDP and a rollout server, all on a CPU.

The same tiny model as in `gvpo quickstart`, warmed up by the same sloppy teacher, is trained by
`python -m gvpo.verl` with two Ray workers. Run it with `gvpo verl quickstart` or `make quickstart-verl`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rich.console import Console
from transformers import LlamaForCausalLM

from gvpo.errors import InputError
from gvpo.progress import Ticker
from gvpo.run import RunDirectory
from gvpo.samples import read_samples, sample_of
from gvpo.sums import Lesson, Task
from gvpo.verl import TRAINERS
from gvpo.verl.main import V09, check_versions

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_SECONDS = {"seconds_generation": "timing_s/gen", "seconds_update": "timing_s/update_actor"}


def quickstart(
    task_name: str = "addition",
    seed: int = 0,
    output: str | Path = "runs/quickstart-verl",
    *,
    steps: int = 10,
    beta: float = 0.2,
    workers: int = 2,
    trainer_mode: str = TRAINERS[0],
    console: Console | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Warm up the quickstart's model, train it on verl, and write the run to `output`.

    Options are those of `gvpo verl quickstart`; `started` is the `time.time()` at which the job began, for
    `seconds_total`. Returns what is also written to `summary.json`, with the quickstart's keys.

    Raises:
        InputError: an unknown task or trainer, no verl, or an output directory that cannot be written to.
        RuntimeError: verl failed; its log is in the run directory.
    """
    if check_versions() != V09:
        raise InputError("The quickstart needs verl 0.9: pip install -c constraints.txt 'gvpo[verl]'.")
    if trainer_mode not in TRAINERS:
        raise InputError(f"trainer_mode={trainer_mode} is not known: choose {', '.join(TRAINERS)}.")
    arguments = _arguments(Path(output).resolve(), steps=steps, beta=beta, workers=workers, seed=seed)
    arguments.append(f"trainer.v1.trainer_mode={trainer_mode}")
    config = {"command": "verl quickstart", "overrides": arguments}
    lesson = Lesson(
        task_name, seed, output, config, console=console, started=started, chat_template=_TEMPLATE
    )
    run = lesson.run
    _write_prompts(run.path / "train.parquet", lesson.task, lesson.train_pairs)
    _write_prompts(run.path / "held_out.parquet", lesson.task, lesson.test_pairs[:200])
    lesson.console.print(
        f"verl starts {workers} Ray workers, a rollout server and a trainer: half a minute or more …"
    )
    _train(run, arguments, lesson.console, steps)
    saved = run.path / "checkpoints" / f"global_step_{steps}" / "actor" / "huggingface"
    trained = LlamaForCausalLM.from_pretrained(saved, attn_implementation="eager")
    seconds = {ours: round(sum(run.curve(theirs)[1]), 1) for ours, theirs in _SECONDS.items()}
    summary = lesson.examine(trained, **seconds, steps=steps, beta=beta, workers=workers)
    run.log({"step": steps, "accuracy": summary["accuracy_after"]})
    lesson.finish(summary, "GVPO on verl", "rollout")
    lesson.console.print("verl's own log is verl.log.")
    return summary


def _write_prompts(path: Path, task: Task, pairs: list[tuple[int, int]]) -> None:
    rows = [
        {
            "data_source": "quickstart",
            "prompt": [{"role": "user", "content": task.prompt(*pair)}],
            "ability": "arithmetic",
            "reward_model": {"style": "rule", "ground_truth": task.right(*pair)},
            "extra_info": {"index": index},
        }
        for index, pair in enumerate(pairs)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _arguments(run: Path, *, steps: int, beta: float, workers: int, seed: int) -> list[str]:
    """The overrides of the run, on top of `machine/cpu.yaml` and `experiment/quickstart.yaml`."""
    return [
        "+machine=cpu",
        "+experiment=quickstart",
        f"data.train_files={run / 'train.parquet'}",
        f"data.val_files={run / 'held_out.parquet'}",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={run / 'warmed-up-model'}",
        f"actor_rollout_ref.actor.gvpo_beta={beta}",
        f"trainer.n_gpus_per_node={workers}",
        f"trainer.test_freq={max(1, steps // 2)}",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={run / 'checkpoints'}",
        f"trainer.rollout_data_dir={run / 'rollouts'}",
    ]


def _train(run: RunDirectory, arguments: list[str], console: Console, steps: int) -> None:
    """Run `python -m gvpo.verl` and follow its metrics."""
    for folder in ("checkpoints", "rollouts"):
        shutil.rmtree(run.path / folder, ignore_errors=True)
    metrics, log = run.path / "verl-metrics.jsonl", run.path / "verl.log"
    metrics.unlink(missing_ok=True)
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(metrics.resolve())}
    environment |= {"HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0"}
    ticker = Ticker(console, "GVPO on verl", steps)
    command = [sys.executable, "-m", "gvpo.verl", *arguments]
    with open(log, "wb") as out, ticker.running():
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        # Without this, ending the quickstart would leave verl running.
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            for entry in _follow(metrics, process):
                run.log(entry)
                for line in read_samples(run.path)[-1:]:
                    ticker.sample = sample_of(line["samples"][-1])
                ticker.advance(entry["step"], metrics=entry)
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
            signal.signal(signal.SIGTERM, previous)
    if code:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError("verl ended with an error; the end of {}:\n{}".format(log, "\n".join(tail)))


def _follow(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The entries that verl's file logger appends, as they come."""
    seen, running = 0, True
    while running:
        running = process.poll() is None
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        for entry in map(json.loads, whole[seen:]):
            data = entry["data"]
            right = [v for k, v in data.items() if re.fullmatch(r"val-core/.*/acc/mean@\d+", k)]
            yield {"step": entry["step"], **data, **({"accuracy_200": right[0]} if right else {})}
        seen = len(whole)
        time.sleep(0.5 * running)
