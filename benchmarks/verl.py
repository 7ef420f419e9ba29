"""verl's `update_actor` with GVPO's weights, beside verl's stock GRPO on the same data.

    python -m benchmarks.verl

Whole runs of verl 0.9 (Ray, FSDP2, one training worker) on a CPU: a random Llama, rollouts of 8 prompts × 8
responses, one update each. Half of the prompts have equal rewards for all responses. Seconds are verl's own
`timing_s/update_actor`, the least of the steps after the first. Writes `results/verl.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pyarrow
import pyarrow.parquet
import typer
from rich.console import Console

from benchmarks.measure import RESULTS, Row, show, write
from benchmarks.workloads import GROUP, Workload
from gvpo.sums import make_tokenizer
from gvpo.verl.cpu import OVERRIDE, use

ABOUT = (
    "Seconds of verl's update_actor on the wall (64 responses of 64 tokens of 8 prompts, 4 layers, float32, "
    "one worker of one thread), the least of the steps after the first. GVPO's holds the driver's weights, "
    "scoring passes (none here) and the workers' update."
)
PROMPTS, RESPONSE = 8, 64
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Kinds = dict[str, tuple[str, list[str]]]  # the module to run, and overrides
KINDS: Kinds = {
    "GVPO": ("gvpo.verl", []),
    "GVPO, rows of weight 0 kept": ("gvpo.verl", ["gvpo.leave_out_zero_weights=False"]),
    "GRPO": (
        "verl.trainer.main_ppo",
        ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=False"],
    ),
}


def prepare(folder: Path, work: Workload) -> None:
    """A random model, the quickstart's tokenizer (one token a character), and prompts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for part in (tokenizer, work.model()):
        part.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "equal" if i % 2 else "different",
            "prompt": [{"role": "user", "content": f"{i:016d}"}],
            "ability": "none",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i in range(64)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")


def run(folder: Path, kind: str, steps: int, kinds: Kinds = KINDS) -> list[dict[str, float]]:
    """verl's metrics of each step."""
    module, extra = kinds[kind]
    metrics = folder / f"{kind}.jsonl"
    arguments = [
        # verl's own entry point does not know where `machine` is.
        "hydra.searchpath=[pkg://gvpo.verl.config,pkg://verl.trainer.config]",
        OVERRIDE,
        "trainer.n_gpus_per_node=1",
        f"data.train_files={folder / 'prompts.parquet'}",
        f"data.val_files={folder / 'prompts.parquet'}",
        f"data.train_batch_size={PROMPTS}",
        "data.shuffle=False",
        "data.max_prompt_length=20",
        f"data.max_response_length={RESPONSE}",
        f"actor_rollout_ref.model.path={folder / 'model'}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        f"actor_rollout_ref.rollout.n={GROUP}",
        f"reward.custom_reward_function.path={Path(__file__).with_name('verl_rewards.py')}",
        "trainer.logger=[file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        *extra,
    ]
    environment = {**os.environ, **use(), "VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1"}
    # Which also keeps verl away from TRL: what verl 0.9 imports of it, TRL has no more.
    environment["VERL_USE_EXTERNAL_MODULES"] += ",gvpo.verl.plugin"
    environment["VERL_LOGGING_LEVEL"] = "WARNING"  # docs/upstream/verl-async.md
    with open(folder / "log.txt", "wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, env=environment, cwd=folder
        )
    if done.returncode:
        raise RuntimeError((folder / "log.txt").read_text(errors="replace")[-4000:])
    return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = RESULTS,
) -> None:
    """Time verl's update under GVPO and under GRPO."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), Workload())
        for kind in KINDS:
            logged = run(Path(name), kind, steps)
            rows.append(
                {
                    "update": kind,
                    "update_actor s": min(entry["timing_s/update_actor"] for entry in logged[1:]),
                    "rows left out": logged[-1].get("gvpo/rows_left_out", 0.0),
                }
            )
    stock = rows[-1]["update_actor s"]
    for row in rows:
        row["GRPO / this"] = stock / row["update_actor s"]
    show(Console(), f"verl: {ABOUT}", rows)
    write(output, "verl", ABOUT, rows)


if __name__ == "__main__":
    typer.run(main)
