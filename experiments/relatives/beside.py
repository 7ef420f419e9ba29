"""GVPO and its relatives on the problems of `optimum.py`, `offline.py` and `foreign.py` (docs/relatives.md).

What is GVPO by an identity has no row of its own: all pairs, trajectory balance with the group's log Z, AGRO
from a fixed sampler. Learned numbers V(x), log Z(x) are a table by prompt here; where prompts hardly come
twice (`foreign`) their losses are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments import addition, foreign, offline, optimum
from experiments.comparison import Arm, Record, Scale, Setting, grid, summarise
from experiments.losses import GVPO, Loss
from experiments.opponents import DPO
from experiments.relatives.losses import (
    AGRO,
    DRO,
    QRPO,
    REBEL,
    TBRM,
    AStarPO,
    FlowRL,
    MirrorDescent,
    SmoothedGVPO,
)
from experiments.report import by_condition, by_metric, dots, legend_below, save
from gvpo.run import new_figure

SAMPLERS = ("on-policy", "perturbed", "uniform")
N = 64  # answers of the reference to each prompt, for those who ask for some
METRIC = "kl_optimum"
UPDATES = {"optimum": 1500, "offline": 160}
LME = "log-mean-exp"


def exact_arms(
    beta: float, rates: tuple[float, ...], coefficients: tuple[float, float], scale: Scale
) -> list[Arm]:
    """Four settings each (one in a quick run): learning rates, or two of them and two of a coefficient."""

    def four() -> list[Setting]:
        return grid(rates[1:2] if scale.quick else rates)

    def two(**choice: Iterable[float]) -> list[Setting]:
        settings = grid(rates[1:3], **choice)
        return settings[:1] if scale.quick else settings

    def smoothed(strength: float) -> Loss:
        return SmoothedGVPO(beta=beta, rate=0.1, strength=strength)

    return [
        Arm("gvpo", "GVPO", lambda: GVPO(beta=beta), four()),
        Arm("gvpo_smoothed", "GVPO, smoothed mean", smoothed, two(strength=(2, 8))),
        Arm("rebel", "REBEL", lambda: REBEL(beta=beta), four()),
        Arm("kimi", "OPMD, mean R", lambda: MirrorDescent(beta=beta), four()),
        Arm("kimi_z", "OPMD, log-mean-exp", lambda: MirrorDescent(beta=beta, normaliser=LME), four()),
        Arm("astar", "A*-PO, SPO", lambda n: AStarPO(beta=beta, n=int(n)), two(n=(8, N))),
        Arm("agro_on", "variance under π (AGRO)", lambda: AGRO(beta=beta, on_policy=True), four()),
        Arm("dro", "DRO", lambda rate: DRO(beta=beta, rate=rate), two(rate=(0.1, 0.5))),
        Arm("tbrm", "TBRM", lambda: TBRM(beta=beta), four()),
        Arm("flowrl", "FlowRL", lambda c: FlowRL(coefficient=c), two(c=coefficients)),
        Arm("qrpo", "QRPO", lambda b: QRPO(beta=b, n=N), two(b=(beta, 2 * beta))),
    ]  # fmt: skip


def foreign_arms(scale: Scale) -> list[Arm]:
    """Two settings each (one in a quick run)."""
    settings = grid((3e-4,), beta=(0.2,) if scale.quick else (0.2, 0.4))
    return [
        Arm("gvpo", "GVPO", lambda beta: GVPO(beta=beta), settings),
        Arm("rebel", "REBEL", lambda beta: REBEL(beta=beta), settings),
        Arm("kimi", "OPMD, mean R", lambda beta: MirrorDescent(beta=beta), settings),
        Arm("kimi_z", "OPMD, log-mean-exp", lambda beta: MirrorDescent(beta=beta, normaliser=LME), settings),
        Arm("astar", "A*-PO, SPO", lambda beta: AStarPO(beta=beta, n=addition.K), settings),
        Arm("qrpo", "QRPO", lambda beta: QRPO(beta=beta, n=addition.K), settings),
        Arm("dpo", "DPO", lambda beta: DPO(beta=5 * beta), settings),
    ]  # fmt: skip


def arms(problem: str, scale: Scale) -> list[Arm]:
    if problem == "optimum":
        dpo = grid((0.03, 0.1), beta=(2, 4))
        found = exact_arms(optimum.BETA, (0.01, 0.03, 0.1, 0.2), (1.2, 5), scale)
    elif problem == "offline":
        dpo = grid((1e-3, 3e-3), beta=(2, 5))
        found = exact_arms(offline.BETA, (3e-3, 1e-2, 2e-2, 4e-2), (0.4, 2), scale)
    else:
        return foreign_arms(scale)
    return [*found, Arm("dpo", "DPO", lambda beta: DPO(beta=beta), dpo[:1] if scale.quick else dpo)]


PROBLEMS = ("optimum", "offline", "foreign")


def jobs(scale: Scale) -> list[str]:
    return [f"{problem}: {arm.name}" for problem in PROBLEMS[:2] for arm in arms(problem, scale)] + [
        "foreign"
    ]


def prepare(scale: Scale, directory: Path) -> None:
    """The models and responses of `foreign.py`, and rewards of the policy's own answers at the start."""
    foreign.prepare(scale, directory)
    initial, path = addition.load(directory, "policy"), directory / "rollouts.pt"
    rollouts = torch.load(path)
    for seed, steps in rollouts.items():
        generator = torch.Generator().manual_seed(seed + 104_729)
        for rollout in steps:
            rollout["reference_rewards"] = addition.Rollout(**rollout).rewards_of(initial, generator)
    torch.save(rollouts, path)


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm on one problem; all of them on `foreign`, whose models are made first."""
    problem, _, arm_name = name.partition(": ")
    if problem == "foreign":
        prepare(scale, directory)
        records = [r for arm in arms(problem, scale) for r in foreign.run_arm(arm, scale, directory)]
    else:
        arm = next(a for a in arms(problem, scale) if a.name == arm_name)
        updates = 60 if scale.quick else UPDATES[problem]
        records = (
            optimum.run_arm(arm, scale, SAMPLERS, updates=updates, reference_n=N)
            if problem == "optimum"
            else offline.run_arm(arm, scale, updates=updates, reference_n=N)
        )
    return [replace(record, condition=f"{problem}: {record.condition}") for record in records]


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    def rows(problem: str) -> list[dict[str, Any]]:
        mine = [
            replace(r, condition=r.condition.removeprefix(f"{problem}: "))
            for r in records
            if r.condition.startswith(f"{problem}: ")
        ]
        highest = problem == "foreign"
        return summarise(arms(problem, scale), mine, foreign.METRIC if highest else METRIC, highest=highest)

    return {
        "question": "Where do the losses that regress log-ratios on rewards lead, each as its paper has it?",
        "problem": {"reference_answers": N, "updates": UPDATES},
        **{problem: rows(problem) for problem in PROBLEMS},
    }


_COLUMNS = {
    foreign.METRIC: "expected accuracy",
    "greedy_accuracy": "greedy",
    "kl_initial": "KL to the start, nats",
}


def tables(found: dict[str, Any]) -> list[Any]:
    return [
        *by_condition(found["optimum"], METRIC, "KL(π‖π*) in nats after training, by sampler"),
        *by_condition(found["offline"], METRIC, "KL(π‖π*) in nats after training, by who made the log"),
        by_metric(found["foreign"], _COLUMNS, "Addition from another model's responses"),
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (left, right) = new_figure(2, width=9.6, height=4.8)
    for axis, problem, title in (
        (left, "optimum", "one prompt, by sampler"),
        (right, "offline", "from a log, by who made it"),
    ):
        dots(axis, found[problem], METRIC, log=True)
        axis.set_title(title, fontsize=10)
    left.set_ylabel("KL(π‖π*) after training, nats")
    legend_below(figure, left)
    save(figure, path, found)
