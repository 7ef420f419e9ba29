"""Reward against KL on-policy, beside the exact frontier (docs/evidence.md).

The task of `sequences.py`; one update per rollout, the initial policy as the reference. Every algorithm is
run at several strengths of its KL control, and held against the best reward that any policy of the same KL
could have, which is π* ∝ π_ref exp(R/β) with the β of that KL. Each seed has its own reference policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.comparison import Arm, Interval, Record, Scale, grid, named, summarise
from experiments.losses import GVPO, Loss
from experiments.opponents import GRPO, RLOO, CorrectedGRPO, DrGRPO
from experiments.report import COLOURS, by_metric, save
from experiments.sequences import REWARDS, pretrained, run_arm
from gvpo.run import new_figure

if TYPE_CHECKING:
    from jaxtyping import Float

K, GROUPS = 8, 32
METRIC = "gap"
BETAS = (0.05, 0.1, 0.2, 0.3, 0.5, 1)

# Algorithm → label, name of its strength, the strengths, its loss.
FAMILIES: dict[str, tuple[str, str, tuple[float, ...], Callable[[float], Loss]]] = {
    "gvpo": ("GVPO", "β", (0.05, 0.1, 0.2, 0.4, 0.8), lambda s: GVPO(beta=s)),
    "rloo": ("RLOO + KL in the reward", "β", (0.05, 0.1, 0.2, 0.4, 0.8), lambda s: RLOO(kl=s)),
    "grpo_k3": ("GRPO + k3", "KL coefficient", (0.02, 0.06, 0.2, 0.6, 1.5), lambda s: GRPO(kl=s)),
    "grpo_k3_corrected": (
        "GRPO + corrected k3",
        "KL coefficient",
        (0.02, 0.06, 0.2, 0.6, 1.5),
        lambda s: CorrectedGRPO(kl=s),
    ),
    "dr_grpo_k3_corrected": (
        "Dr. GRPO + corrected k3",
        "KL coefficient",
        (0.015, 0.03, 0.07, 0.15, 0.3),
        lambda s: DrGRPO(kl=s),
    ),
}


def arms(scale: Scale) -> list[Arm]:
    """Four learning rates for each strength (one in a quick run)."""
    rates = (3e-3,) if scale.quick else (1e-3, 3e-3, 1e-2, 3e-2)
    return [
        Arm(name, label, lambda strength, loss=loss: loss(strength), grid(rates, strength=strengths))
        for name, (label, _, strengths, loss) in FAMILIES.items()
    ]


def jobs(scale: Scale) -> list[str]:
    return [arm.name for arm in arms(scale)]


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm at all its strengths."""
    references = pretrained(scale.all_seeds, skew=-0.5, noise=0.5)
    frontiers = {
        seed: Frontier(table.sum(-1))
        for seed, table in zip(scale.all_seeds, references.table().detach(), strict=True)
    }
    # What runs are measured against is the whole frontier, not the optimum of one β.
    found = run_arm(
        named(arms(scale), name), scale, references, "", steps=steps(scale), groups=GROUPS, k=K, beta=1.0
    )
    records = []
    for record in found:
        gap = frontiers[record.seed].reward_at(record.metrics["kl_reference"]) - record.metrics["reward"]
        kept = {key: record.metrics[key] for key in ("kl_reference", "reward", "entropy")}
        condition = f"{FAMILIES[name][1]} {record.setting['strength']:g}"
        records.append(replace(record, condition=condition, metrics=kept | {METRIC: gap}))
    return records


def steps(scale: Scale) -> int:
    return 100 if scale.quick else 300


class Frontier:
    """The best reward for each KL from the reference: π*_β for β from 0.01 to 10, means over the prompts."""

    def __init__(self, reference: Float[torch.Tensor, "prompts responses"]) -> None:
        self.logp = logp = reference.double().log_softmax(-1)
        betas = torch.logspace(1, -2, 300, dtype=torch.float64)[:, None, None]
        best = (logp + REWARDS.double() / betas).log_softmax(-1)
        self.kl = (best.exp() * (best - logp)).sum(-1).mean(-1)
        self.reward = (best.exp() * REWARDS.double()).sum(-1).mean(-1)

    def at(self, beta: float) -> tuple[float, float]:
        """KL and reward of π*_β."""
        best = (self.logp + REWARDS.double() / beta).log_softmax(-1).exp()
        kl = torch.where(best > 0, best * (best.log() - self.logp), 0.0).sum(-1).mean(-1)
        return float(kl), float((best * REWARDS.double()).sum(-1).mean(-1))

    def reward_at(self, kl: float) -> float:
        """By linear interpolation; the end's reward beyond the ends."""
        right = int(torch.searchsorted(self.kl, kl).clamp(1, len(self.kl) - 1))
        left = right - 1
        share = (kl - self.kl[left]) / (self.kl[right] - self.kl[left])
        return float(torch.lerp(self.reward[left], self.reward[right], share.clamp(0, 1)))


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    tables = pretrained(scale.seeds, skew=-0.5, noise=0.5).table().detach().sum(-1)
    frontiers = [Frontier(table) for table in tables]
    kls = [0.05 * i for i in range(1, 61)]
    return {
        "question": "How much less reward than the best policy of the same KL?",
        "metric": METRIC,
        "problem": {"k": K, "groups": GROUPS, "steps": steps(scale)},
        "targets": _targets(frontiers),
        "binary": [binary_target(p, beta) for p in (0.01, 0.1, 0.3, 0.5) for beta in BETAS],
        "frontier": [
            {"kl": kl, "reward": sum(f.reward_at(kl) for f in frontiers) / len(frontiers)} for kl in kls
        ],
        "rows": summarise(arms(scale), records, METRIC),
    }


def _targets(frontiers: list[Frontier]) -> list[dict[str, Any]]:
    """Where π*_β is, for the strengths that GVPO is run at."""
    rows = []
    for beta in FAMILIES["gvpo"][2]:
        found = [f.at(beta) for f in frontiers]
        rows.append(
            {
                "label": "π*",
                "condition": f"β {beta:g}",
                "kl_reference": vars(Interval.of([kl for kl, _ in found])),
                "reward": vars(Interval.of([reward for _, reward in found])),
            }
        )
    return rows


def binary_target(p: float, beta: float) -> dict[str, Any]:
    """What β asks for where rewards are 0 or 1 and the reference is right with probability p.

    With Z = 1 − p + p e^{1/β}, π* is right with probability q = p e^{1/β} / Z, at KL(π*‖π_ref) = q/β − log Z.
    """
    normaliser = 1 - p + p * math.exp(1 / beta)
    right = p * math.exp(1 / beta) / normaliser
    return {
        "label": f"right {p:.0%} of the time",
        "condition": f"β {beta:g}",
        "right": right,
        "kl": right / beta - math.log(normaliser),
    }


_COLUMNS = {"kl_reference": "KL, nats", "reward": "E[R]", METRIC: "below the frontier"}


def tables(found: dict[str, Any]) -> list[Any]:
    rows = [{**row, "label": f"{row['label']}, {row['condition']}"} for row in found["rows"]]
    return [by_metric(rows, _COLUMNS, "Reward and KL on-policy, and how far below the exact frontier")]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (left, right) = new_figure(2, width=8.6, height=4.2)
    left.plot(
        [point["kl"] for point in found["frontier"]],
        [point["reward"] for point in found["frontier"]],
        color="black",
        linewidth=1,
        label="the best there is",
    )
    for index, label in enumerate(dict.fromkeys(row["label"] for row in found["rows"])):
        rows = [row for row in found["rows"] if row["label"] == label]
        kl = [row["kl_reference"]["mean"] for row in rows]
        for axis, metric in ((left, "reward"), (right, METRIC)):
            means = [row[metric]["mean"] for row in rows]
            half = [row[metric]["high"] - row[metric]["mean"] for row in rows]
            axis.errorbar(kl, means, yerr=half, marker="D" if index == 0 else "o", markersize=4,
                          linewidth=0.8, color=COLOURS[index], label=label)  # fmt: skip
    for axis, text in ((left, "E[R], exact"), (right, "E[R] below the frontier, exact")):
        axis.set_xlabel(r"KL(π‖$\pi_\mathrm{ref}$), nats, exact")
        axis.set_ylabel(text)
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle("One update per rollout: reward against KL", fontsize=10)
    save(figure, path, found)
