"""verl's asynchronous trainers under GVPO, beside the synchronous one and beside verl's decoupled PPO.

    python -m benchmarks.verl_async

Whole runs of verl 0.9 on two CPU cores, as in `benchmarks.verl`: one training worker and one rollout server
of one thread each, the same prompts and as many updates. Writes `results/verl_async.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.measure import RESULTS, Row, show, write
from benchmarks.verl import PROMPTS, Kinds, prepare, run
from benchmarks.workloads import Workload

ABOUT = (
    "Seconds on the wall of a step of two updates, the mean of the steps after the first (64 responses of 64 "
    "tokens of 8 prompts, 4 layers, a vocabulary of 4,096, float32; a trainer and a rollout server of one "
    "thread each), all of it, and of that: waiting for responses, log-probabilities under an old policy, "
    "under the reference, and under the policy before each update. GVPO's reference is the initial policy."
)
MODE = "trainer.v1.trainer_mode="
SEPARATE = [f"{MODE}separate_async", "trainer.v1.separate_async.parameter_sync_step=2"]
INITIAL = "gvpo.reference=initial"
GRPO = [
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "trainer.v1.sampler.max_off_policy_strategy=wait",
]
KINDS: Kinds = {
    "GVPO, sync": ("gvpo.verl", [INITIAL]),
    "GVPO, colocate_async": ("gvpo.verl", [INITIAL, f"{MODE}colocate_async"]),
    "GVPO, separate_async": ("gvpo.verl", [INITIAL, *SEPARATE]),
    "GRPO, separate_async (decoupled PPO)": ("verl.trainer.main_ppo", [*GRPO, *SEPARATE]),
    "GRPO, sync": ("verl.trainer.main_ppo", GRPO),
}
COLUMNS = {
    "step s": "step",
    "waiting s": "gen",
    "old policy s": "old_log_prob",
    "reference s": "ref",
    "scoring s": "gvpo_score",
}


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 6,
    output: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = RESULTS,
) -> None:
    """Time a step of each trainer."""
    kinds = {
        kind: (module, [*extra, f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // 2}"])
        for kind, (module, extra) in KINDS.items()
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), Workload(vocabulary=4096))
        for kind in kinds:
            logged = run(Path(name), kind, steps, kinds)[1:]
            row: Row = {"trainer": kind}
            for column, timer in COLUMNS.items():
                row[column] = sum(entry.get(f"timing_s/{timer}", 0.0) for entry in logged) / len(logged)
            age = [entry.get("training/off_policy/trajectory_staleness_worst/mean", 0.0) for entry in logged]
            rows.append(row | {"age in steps": sum(age) / len(age)})
    for row in rows:
        row["sync / this"] = rows[0]["step s"] / row["step s"]
    show(Console(), f"verl_async: {ABOUT}", rows)
    write(output, "verl_async", ABOUT, rows)


if __name__ == "__main__":
    typer.run(main)
