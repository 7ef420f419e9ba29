"""Peak memory of one optimizer step's gradient, each in a process of its own."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, in_fresh_process, peak_of
from benchmarks.step import WORK, tiny
from benchmarks.workloads import TRAINERS, Workload, floor, micro_steps, rollout, trainer, update

ABOUT = (
    "MiB by which the gradient of an optimizer step raises the resident memory of a fresh process at its "
    "peak, gradients included, model and trainer not; work and kinds as in the step's benchmark."
)


def peak(kind: str, work: Workload) -> float:
    """Of two steps (two micro-steps of TRL, which are all alike)."""
    if kind == "floor":
        ours = trainer("gvpo", work)
        batch = rollout(ours)
        weights = ours._gvpo_step.weigh(batch)[0].weights
        run = floor(ours.model, batch, weights, ours._token_budget(batch))
        return peak_of(lambda: (run(), run()))
    made = trainer(kind, work)
    if kind == "gvpo":
        return peak_of(lambda: (update(made), update(made)))
    return peak_of(lambda: micro_steps(made, 2))


def run(small: bool) -> list[Row]:
    rows: list[Row] = []
    for name, work in list(WORK.items())[: 1 if small else None]:
        work = tiny(work) if small else work
        peaks = {
            kind: peak(kind, work) if small else in_fresh_process(peak, kind, work)
            for kind in ("floor", *TRAINERS)
        }
        matrix = work.vocabulary * work.hidden * torch.float32.itemsize / 2**20
        rows.append(
            {
                "work": name,
                **{f"{kind} MiB": value for kind, value in peaks.items()},
                "gvpo / floor": peaks["gvpo"] / peaks["floor"],
                "gvpo / compact": peaks["gvpo"] / peaks["trl, compact head"],
                "gvpo / trl": peaks["gvpo"] / peaks["trl"],
                "head's matrix MiB": matrix,
            }
        )
    return rows
