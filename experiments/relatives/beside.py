"""GVPO and its relatives on the problems of `optimum.py` and `offline.py` (docs/relatives.md).

What is GVPO by an identity has no row of its own: all pairs, trajectory balance with the group's log Z, AGRO
from a fixed sampler. Learned numbers V(x), log Z(x) are a table by prompt here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from experiments import offline, optimum
from experiments.comparison import Arm, Record, Scale, Setting, grid, named, of_part, summarise, under
from experiments.losses import GVPO
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
from experiments.report import by_condition, dots, legend_below, save
from gvpo.run import new_figure

SAMPLERS = ("on-policy", "perturbed", "uniform")
N = 64  # answers of the reference to each prompt, for those who ask for some
METRIC = "kl_optimum"
UPDATES = {"optimum": 600, "offline": 100}


def exact_arms(
    beta: float, rates: tuple[float, ...], coefficients: tuple[float, float], scale: Scale
) -> list[Arm]:
    """Four settings each (one in a quick run): learning rates, or two of them and two of a coefficient."""

    def four() -> list[Setting]:
        return grid(rates[1:2] if scale.quick else rates)

    def two(**choice: Iterable[float]) -> list[Setting]:
        settings = grid(rates[1:3], **choice)
        return settings[:1] if scale.quick else settings

    descent, smoothed = partial(MirrorDescent, beta=beta), partial(SmoothedGVPO, beta=beta, rate=0.1)
    return [
        Arm("gvpo", "GVPO", partial(GVPO, beta=beta), four()),
        Arm("gvpo_smoothed", "GVPO, smoothed mean", smoothed, two(strength=(2, 8))),
        Arm("rebel", "REBEL", partial(REBEL, beta=beta), four()),
        Arm("kimi", "OPMD, mean R", descent, four()),
        Arm("kimi_z", "OPMD, log-mean-exp", partial(descent, normaliser="log-mean-exp"), four()),
        Arm("astar", "A*-PO, SPO", partial(AStarPO, beta=beta), two(n=(8, N))),
        Arm("agro_on", "variance under π (AGRO)", partial(AGRO, beta=beta, on_policy=True), four()),
        Arm("dro", "DRO", partial(DRO, beta=beta), two(rate=(0.1, 0.5))),
        Arm("tbrm", "TBRM", partial(TBRM, beta=beta), four()),
        Arm("flowrl", "FlowRL", lambda c: FlowRL(coefficient=c), two(c=coefficients)),
        Arm("qrpo", "QRPO", lambda b: QRPO(beta=b, n=N), two(b=(beta, 2 * beta))),
    ]


def arms(problem: str, scale: Scale) -> list[Arm]:
    if problem == "optimum":
        dpo = grid((0.03, 0.1), beta=(2, 4))
        found = exact_arms(optimum.BETA, (0.01, 0.03, 0.1, 0.2), (1.2, 5), scale)
    else:
        dpo = grid((1e-3, 3e-3), beta=(2, 5))
        found = exact_arms(offline.BETA, (3e-3, 1e-2, 2e-2, 4e-2), (0.4, 2), scale)
    return [*found, Arm("dpo", "DPO", DPO, dpo[:1] if scale.quick else dpo)]


PROBLEMS = ("optimum", "offline")


def jobs(scale: Scale) -> list[str]:
    return [f"{problem}: {arm.name}" for problem in PROBLEMS for arm in arms(problem, scale)]


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm on one problem."""
    problem, _, arm_name = name.partition(": ")
    arm = named(arms(problem, scale), arm_name)
    updates = 60 if scale.quick else UPDATES[problem]
    if problem == "optimum":
        records = optimum.run_arm(arm, scale, SAMPLERS, updates=updates, reference_n=N)
    else:
        records = offline.run_arm(arm, scale, updates=updates, reference_n=N)
    return under(problem, records)


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    def rows(problem: str) -> list[dict[str, Any]]:
        return summarise(arms(problem, scale), of_part(f"{problem}: ", records), METRIC)

    return {
        "question": "Where do the losses that regress log-ratios on rewards lead, each as its paper has it?",
        "problem": {"reference_answers": N, "updates": UPDATES},
        **{problem: rows(problem) for problem in PROBLEMS},
    }


def tables(found: dict[str, Any]) -> list[Any]:
    return [
        *by_condition(found["optimum"], METRIC, "KL(π‖π*) in nats after training, by sampler"),
        *by_condition(found["offline"], METRIC, "KL(π‖π*) in nats after training, by who made the log"),
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
