"""Many updates on each rollout: where GVPO loses to a clipped ratio, and a remedy (docs/evidence.md).

The task of `addition.py`. Each rollout of 16 prompts × 8 answers is used for eight updates, at a moderate and
at a high learning rate. `TrustedGVPO` leaves out tokens that have moved far since the rollout.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import addition
from experiments.comparison import Arm, Record, Scale, Setting, named, summarise, tune_and_report
from experiments.losses import GVPO, TrustedGVPO
from experiments.opponents import GRPO, GSPO
from experiments.report import by_condition, dots, legend_below, save
from gvpo.run import new_figure

METRIC = "accuracy"
RATES = {"learning rate 3e-4": 3e-4, "learning rate 1e-3": 1e-3}
UPDATES = 8


def arms(scale: Scale) -> list[Arm]:
    """Two settings each (one in a quick run); the learning rate is the condition."""

    def two(name: str, *values: float) -> list[Setting]:
        return [{name: value} for value in scale.cut(*values)]

    trusted, moving = partial(TrustedGVPO, trust=0.2), partial(GVPO, reference="current")
    return [
        Arm("gvpo", "GVPO", GVPO, two("beta", 0.2, 0.5)),
        Arm("gvpo_trust", "GVPO, trust mask", trusted, two("beta", 0.2, 0.5)),
        Arm("gvpo_moving", "GVPO, reference moved each update", moving, two("beta", 0.2, 0.5)),
        Arm("grpo", "GRPO, clipped", GRPO, two("epsilon", 0.2, 0.4)),
        Arm("gspo", "GSPO", GSPO, two("epsilon", 0.2, 0.05)),
    ]


def jobs(scale: Scale) -> list[str]:
    return [f"{arm.name}, {condition}" for arm in arms(scale) for condition in RATES]


def prepare(scale: Scale, directory: Path) -> None:
    addition.prepare(directory, quick=scale.quick)


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm at one learning rate: its settings on the tuning seed, then the best on the others."""
    arm_name, condition = name.split(", ", 1)
    arm = named(arms(scale), arm_name)

    def run(setting: Setting, seed: int) -> Record:
        return _run(arm, condition, setting, seed, scale, directory)

    return tune_and_report(arm, scale, METRIC, run)


def rollouts(scale: Scale) -> int:
    return 4 if scale.quick else 16


def _run(arm: Arm, condition: str, setting: Setting, seed: int, scale: Scale, directory: Path) -> Record:
    initial = addition.load(directory, "policy")
    policy = addition.load(directory, "policy")
    learner = addition.Learner(policy, RATES[condition], rollouts(scale) * UPDATES)
    loss, generator = arm.loss(**setting), torch.Generator().manual_seed(seed)
    for _ in range(rollouts(scale)):
        rollout = addition.Rollout.of(learner.model, initial, generator)
        first = None
        for _ in range(UPDATES):
            responses = rollout.responses(learner.model, first)
            first = responses.rollout
            learner.update(responses, loss)
    return Record(arm.name, condition, setting, seed, addition.evaluate(learner.model, initial))


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    initial = addition.load(directory, "policy")
    return {
        "question": "How accurate after eight updates on each rollout?",
        "metric": METRIC,
        "problem": {
            "prompts": addition.PROMPTS,
            "k": addition.K,
            "rollouts": rollouts(scale),
            "updates_per_rollout": UPDATES,
            "trust": 0.2,
        },
        "start": {"policy": addition.evaluate(initial, initial)},
        "rows": summarise(arms(scale), records, METRIC, highest=True),
    }


def tables(found: dict[str, Any]) -> list[Any]:
    return [
        *by_condition(found["rows"], METRIC, "Expected accuracy after eight updates on each rollout"),
        *by_condition(found["rows"], "kl_initial", "KL to the start, nats"),
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(width=8, height=4.2)
    dots(axis, found["rows"], METRIC)
    start = found["start"]["policy"][METRIC]
    axis.axhline(start, color="black", linestyle="--", linewidth=1, label="before")
    axis.set_ylabel("expected accuracy, held out, exact")
    axis.set_title("Addition, eight updates on each rollout", fontsize=10)
    legend_below(figure, axis, columns=3)
    save(figure, path, found)
