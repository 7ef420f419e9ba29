"""What k, β and its schedule, noisy rewards and long answers do (docs/guide/beta.md).

Four parts, the first three on the task of `sequences.py`, on-policy unless said otherwise, initial reference:

- *k*: groups of 2 to 32 at 64 responses an update, with the group's own mean and with what could steady it.
- *noise*: rewards of 0 or 1, seen the wrong way round now and then, or always for some responses.
- *schedule*: β as it is from the beginning, or falling to it.
- *length*: does training prefer short responses, where the reward does not (`lengths.py`)?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments import lengths
from experiments.comparison import (
    Arm,
    Interval,
    Record,
    Scale,
    Setting,
    grid,
    named,
    of_part,
    summarise,
    under,
)
from experiments.exact import Dice, Problem, train
from experiments.losses import GVPO, RejectionSampling
from experiments.offline import pretrain
from experiments.opponents import CorrectedGRPO, DrGRPO
from experiments.relatives.losses import AStarPO, MirrorDescent, SharedGVPO, SmoothedGVPO, log_ratio
from experiments.report import COLOURS, by_condition, save
from experiments.responses import Responses
from experiments.sequences import REWARDS, run_arm
from gvpo.run import new_figure

if TYPE_CHECKING:
    from jaxtyping import Float

BETA, ROWS, STEPS = 0.3, 64, 300
KS = (2, 4, 8, 16, 32)
RIGHT = (REWARDS == 1).float()
RATES = (5e-3, 2e-2)


def arms(part: str, scale: Scale) -> list[Arm]:
    """As many settings for each arm of a part (one in a quick run)."""

    def settings(rates: Sequence[float] = RATES, **choice: Iterable[float]) -> list[Setting]:
        every = grid(rates, **choice)
        return every[:1] if scale.quick else every

    if part == "k":
        smoothed = partial(SmoothedGVPO, beta=BETA, rate=0.1)
        return [
            Arm("gvpo", "GVPO", partial(GVPO, beta=BETA), settings()),
            Arm("shared", "one mean a prompt", partial(SharedGVPO, beta=BETA), settings()),
            Arm("smoothed", "smoothed mean", partial(smoothed, strength=4), settings()),
            Arm("running", "running mean alone", partial(smoothed, strength=1e9), settings()),
            Arm("astar", "V̂* of 8 answers of the reference", partial(AStarPO, beta=BETA), settings()),
            Arm("kimi", "OPMD, mean R", partial(MirrorDescent, beta=BETA), settings()),
        ]
    if part == "noise":
        four = (1e-3, 2e-3, *RATES)
        return [
            Arm("gvpo", "GVPO", GVPO, settings(beta=(0.1, 0.3))),
            Arm("grpo_k3", "GRPO + corrected k3", CorrectedGRPO, settings(kl=(0.1, 0.03))),
            Arm("dr_grpo", "Dr. GRPO", DrGRPO, settings(kl=(0.03, 0.0))),
            Arm("rft", "rejection-sampling SFT", RejectionSampling, settings(four)),
        ]
    if part == "length":
        betas = (0.1, 0.3)
        return [
            Arm("gvpo", "GVPO", GVPO, settings(beta=betas)),
            Arm("per_token", "GVPO, βℓ a token", PerToken, settings(beta=betas)),
            Arm("grpo", "GRPO, mean a response", lambda beta: CorrectedGRPO(kl=beta), settings(beta=betas)),
            Arm("dr_grpo", "Dr. GRPO", lambda beta: DrGRPO(kl=beta), settings(beta=betas)),
        ]
    shapes = [
        ("constant", "β from the beginning", None, 1.0),
        ("half", "from 1, there at half the updates", 1.0, 0.5),
        ("whole", "from 1, there at the end", 1.0, 1.0),
    ]
    return [  # β is given by the condition
        Arm(name, label, partial(Scheduled, first, updates=share * _steps(scale)), settings())
        for name, label, first, share in shapes
    ]


class PerToken:
    """GVPO with the mean log-ratio of a response's tokens in place of their sum."""

    def __init__(self, *, beta: float) -> None:
        self.beta = beta

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        length = responses.mask.sum(1).view(-1, responses.k)
        residual = self.beta * log_ratio(responses) / length - responses.grouped_rewards
        away = residual - residual.mean(1, keepdim=True)
        return away.square().sum() / (2 * len(away) * (responses.k - 1))


class Scheduled:
    """GVPO whose β falls geometrically from `first` to `last` over so many updates."""

    def __init__(self, first: float | None, last: float, updates: float) -> None:
        self.first, self.last, self.updates, self.done = first or last, last, updates, 0

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        beta = self.first * (self.last / self.first) ** min(1.0, self.done / self.updates)
        self.done += 1
        return GVPO(beta=beta)(responses)


# Part → its conditions.
NOISE = {
    "none": (0.0, False),
    "5 % by chance": (0.05, False),
    "20 % by chance": (0.2, False),
    "20 % always": (0.2, True),
}
SAMPLERS = ("on-policy", "other model")
SCHEDULED = (0.05, 0.1, 0.2)
PARTS = {"k": "kl_optimum", "noise": "reward", "schedule": "kl_optimum", "length": "kl_optimum"}


def jobs(scale: Scale) -> list[str]:
    return [f"{part}: {arm.name}" for part in PARTS for arm in arms(part, scale)]


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One arm of one part, under all its conditions."""
    part, _, arm_name = name.partition(": ")
    run = {"k": _k, "noise": _noise, "schedule": _schedule, "length": _length}[part]
    return under(part, run(named(arms(part, scale), arm_name), scale))


def _run(arm: Arm, scale: Scale, condition: str, *, beta: float = BETA, **others: Any) -> list[Record]:
    references = pretrain(scale.all_seeds)[0]
    return run_arm(arm, scale, references, condition, steps=_steps(scale), beta=beta, **others)


def _k(arm: Arm, scale: Scale) -> list[Record]:
    records = []
    for k in KS:
        for which in SAMPLERS[: 2 if k in (2, 8, 32) else 1]:
            sampler = None if which == "on-policy" else pretrain(scale.all_seeds)[1]
            condition, groups = f"{which}, k {k}", ROWS // k
            records += _run(arm, scale, condition, k=k, groups=groups, sampler=sampler, reference_n=8)
    return records


def _noise(arm: Arm, scale: Scale) -> list[Record]:
    records = []
    for condition, (share, always) in NOISE.items():
        flips = torch.full((len(scale.all_seeds), *RIGHT.shape), share)
        if always:
            chance = Dice([seed + 31 for seed in scale.all_seeds]).throw(*RIGHT.shape)
            flips = (chance < share).float()
        records += _run(arm, scale, condition, k=8, groups=16, rewards=RIGHT, flips=flips)
    return records


def _schedule(arm: Arm, scale: Scale) -> list[Record]:
    records = []
    for beta in SCHEDULED:
        given = replace(arm, loss=partial(arm.loss, beta))
        records += _run(given, scale, f"β {beta:g}", k=8, groups=32, beta=beta)
    return records


def _length(arm: Arm, scale: Scale) -> list[Record]:
    """At each β; `bias` is the mean length less that of π*, and metrics are against the β of the setting."""
    records = []
    for setting in arm.grid:
        seeds = scale.all_seeds
        policies = lengths.LengthPolicies(seeds)
        reference = policies.table().detach()
        rewards = lengths.REWARDS.expand(len(seeds), -1, -1)
        problem = Problem(
            rewards, reference, list(seeds), torch.full((len(seeds),), setting["lr"]), setting["beta"]
        )
        problem.mask = lengths.MASK
        steps = _steps(scale)
        found = train(
            policies, problem, lambda table: table.sum(-1), arm.loss(beta=setting["beta"]),
            steps=steps, groups=16, k=8, clip=1.0,
        )[steps]  # fmt: skip
        with torch.no_grad():
            mean = [
                (logp.exp() * lengths.LENGTHS).sum(-1).mean(-1)
                for logp in (policies.table().sum(-1), problem.optimum, reference.sum(-1))
            ]
        for i, (seed, metrics) in enumerate(zip(seeds, found, strict=True)):
            length = {
                "length": float(mean[0][i]),
                "bias": float(mean[0][i] - mean[1][i]),
                "drift": float(mean[1][i] - mean[2][i]),
            }
            records.append(Record(arm.name, f"β {setting['beta']:g}", setting, seed, {**metrics, **length}))
    return records


def _steps(scale: Scale) -> int:
    return 60 if scale.quick else STEPS


# Table → its part, what its conditions begin with, the metrics it is about.
TABLES = {
    "k": ("k", "on-policy, ", ("kl_optimum",)),
    "k_other": ("k", "other model, ", ("kl_optimum",)),
    "noise": ("noise", "", ("reward", "kl_reference")),
    "schedule": ("schedule", "", ("kl_optimum", "kl_reference", "reward")),
    "length": ("length", "", ("bias", "reward")),
}
_METRIC = {
    "kl_optimum": "KL(π‖π*), nats",
    "reward": "E[R]",
    "kl_reference": "KL to the start, nats",
    "bias": "mean length less that of π*",
}


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    def rows(part: str, head: str) -> list[dict[str, Any]]:
        mine = of_part(f"{part}: {head}", records)
        return summarise(arms(part, scale), mine, PARTS[part], highest=part == "noise")

    return {
        "question": "What do k, β, its schedule, noisy rewards and long answers cost?",
        "problem": {"beta": BETA, "rows": ROWS, "steps": _steps(scale)},
        "start": _start(scale),
        **{table: rows(part, head) for table, (part, head, _) in TABLES.items()},
    }


def _start(scale: Scale) -> dict[str, Any]:
    """Expected reward of the reference for rewards of 0 or 1, and mean lengths."""
    p = pretrain(scale.all_seeds)[0].table().detach().sum(-1).exp()[1:]
    q = lengths.LengthPolicies(scale.seeds).table().detach().sum(-1).exp()
    return {
        "right": vars(Interval.of((p * RIGHT).sum(-1).mean(-1).tolist())),
        "length": vars(Interval.of((q * lengths.LENGTHS).sum(-1).mean(-1).tolist())),
    }


def tables(found: dict[str, Any]) -> list[Any]:
    return [
        table
        for name, (_, head, metrics) in TABLES.items()
        for metric in metrics
        for table in by_condition(found[name], metric, f"{head or name}: {_METRIC[metric]}", columns=6)
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2, width=9.2, height=4.2)
    for axis, name, metric in zip(axes, ("k", "noise"), ("kl_optimum", "reward"), strict=True):
        labels = list(dict.fromkeys(row["label"] for row in found[name]))
        conditions = list(dict.fromkeys(row["condition"] for row in found[name]))
        for colour, label in zip(COLOURS, labels, strict=False):
            cells = [row[metric] for row in found[name] if row["label"] == label]
            means = [cell["mean"] for cell in cells]
            half = [cell["high"] - cell["mean"] for cell in cells]
            axis.errorbar(range(len(cells)), means, yerr=half, marker="o", markersize=3.5, linewidth=1,
                          color=colour, label=label)  # fmt: skip
        axis.set_xticks(range(len(conditions)), conditions, rotation=0 if name == "k" else 20)
        axis.set_ylabel(_METRIC[metric])
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_yscale("log")
    axes[0].set_title(f"{ROWS} responses an update, on-policy", fontsize=10)
    axes[1].set_title("rewards of 0 or 1, seen the wrong way round", fontsize=10)
    save(figure, path, found)
