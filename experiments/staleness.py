"""Responses sampled by a policy some updates old: who still learns, and how far it goes (docs/evidence.md).

The task of `sequences.py` with rewards of 0 and 1. At update t the responses come from the policy of update
t − lag, as from an asynchronous engine, and nothing else differs. Every algorithm has as many settings, and
chooses anew for each lag; a second table gives each learning rate at the longest lag.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.comparison import TUNING_SEED, Arm, Interval, Record, Scale, Setting, grid, named, summarise
from experiments.exact import Dice, Problem, StackedAdam, measure, pick
from experiments.exact import draw as respond
from experiments.losses import GVPO, TrustedGVPO
from experiments.opponents import GRPO, GSPO, RLOO
from experiments.relatives.losses import TrajectoryBalance
from experiments.report import COLOURS, by_condition, by_metric, legend_below, save
from experiments.responses import Responses
from experiments.sequences import REWARDS, SequencePolicies, pretrained
from gvpo.run import new_figure

K, GROUPS, CLIP = 8, 32, 1.0
METRIC = "accuracy"
LAGS = (0, 1, 2, 4, 8, 16, 32)
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
MOVES = 25  # updates after which a reference that moves does so
WHY, WHY_ARMS, WHY_RATE, FAR = "why", ("gvpo", "gvpo_sampler", "rloo_is"), 5e-3, 2.0
CYCLE = 4  # updates that decoupled PPO makes with one proximal policy
TUNING = (TUNING_SEED, TUNING_SEED + 1, TUNING_SEED + 2)  # one is too few where settings nearly fail
RIGHT = (REWARDS == 1).float()

Version = Callable[[int, int], int]


def initial(t: int, v: int) -> int:
    return 0


def sampler(t: int, v: int) -> int:
    return v


def current(t: int, v: int) -> int:
    return t


@dataclass(frozen=True)
class Feed:
    """Which versions of the policy an algorithm asks for, at update t on responses that version v sampled.

    Attributes:
        reference: π_θ'.
        old: the policy that ratios are taken to.
    """

    reference: Version = initial
    old: Version = sampler


# In the order of the arms.
FEEDS = {
    "gvpo": Feed(),
    "gvpo_sampler": Feed(reference=sampler),
    "gvpo_moving": Feed(reference=lambda t, v: v - v % MOVES),  # a group keeps the one that it was begun with
    "gvpo_trust": Feed(),
    "tba": Feed(reference=lambda t, v: t - t % MOVES),
    "grpo": Feed(),
    "grpo_is": Feed(old=current),
    "grpo_decoupled": Feed(old=lambda t, v: t - t % CYCLE),
    "gspo": Feed(),
    "rloo": Feed(),
    "rloo_is": Feed(old=current),
}


def arms(scale: Scale) -> list[Arm]:
    """Twelve settings each (one in a quick run): six learning rates, two coefficients."""
    rates = RATES[3:4] if scale.quick else RATES

    def settings(name: str, *values: float) -> list[Setting]:
        return grid(rates, **{name: scale.cut(*values)})

    moving = f"GVPO, moved every {MOVES} updates"
    trusted, fixed = partial(TrustedGVPO, trust=0.2), partial(RLOO, fresh=False)
    truncated = partial(GRPO, cap=2)
    return [
        Arm("gvpo", "GVPO, initial reference", GVPO, settings("beta", 0.2, 0.05)),
        Arm("gvpo_sampler", "GVPO, the sampler's", GVPO, settings("beta", 0.2, 0.5)),
        Arm("gvpo_moving", moving, GVPO, settings("beta", 0.2, 0.5)),
        Arm("gvpo_trust", "GVPO, initial, trust mask", trusted, settings("beta", 0.2, 0.05)),
        Arm("tba", "TBA", TrajectoryBalance, settings("beta", 0.2, 0.05)),
        Arm("grpo", "GRPO, clipped", GRPO, settings("epsilon", 0.2, 0.4)),
        Arm("grpo_is", "GRPO, truncated weights", truncated, settings("by_token", 1, 0)),
        Arm("grpo_decoupled", "GRPO, decoupled PPO", truncated, settings("by_token", 1, 0)),
        Arm("gspo", "GSPO", GSPO, settings("epsilon", 0.2, 0.05)),
        Arm("rloo", "RLOO + KL", fixed, settings("kl", 0.2, 0.05)),
        Arm("rloo_is", "RLOO + KL, truncated weights", partial(RLOO, cap=2), settings("kl", 0.2, 0.05)),
    ]


def jobs(scale: Scale) -> list[str]:
    return [arm.name for arm in arms(scale)] + [WHY]


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm at all lags: its settings on the tuning seeds, then the best on the others."""
    if name == WHY:
        return _why(scale)
    arm = named(arms(scale), name)
    starts = Starts(scale.seeds)
    records = []
    for lag in LAGS:
        tuned = []
        for setting, rates in arm.by_loss():
            runs = [(seed, rate) for rate in rates for seed in TUNING]
            outcome = _run(arm, setting, lag, runs, scale, starts)
            for rate in rates:
                mine = [found for (_, r), found in zip(runs, outcome, strict=True) if r == rate]
                means = {key: statistics.fmean(found[key] for found in mine) for key in mine[0]}
                tuned.append(Record(name, f"lag {lag}", {"lr": rate, **setting}, TUNING_SEED, means))
        records += tuned + _reported(arm, tuned, lag, scale, starts)
        if lag == LAGS[-1]:
            for rate in dict.fromkeys(record.setting["lr"] for record in tuned):
                here = [replace(r, condition=f"rate {rate:g}") for r in tuned if r.setting["lr"] == rate]
                records += here + _reported(arm, here, lag, scale, starts)
    return records


def _reported(arm: Arm, tuned: Sequence[Record], lag: int, scale: Scale, starts: Starts) -> list[Record]:
    """The best of the settings, on the seeds that are reported."""
    best = max(tuned, key=lambda record: record.metrics[METRIC])
    setting = {key: value for key, value in best.setting.items() if key != "lr"}
    runs = [(seed, best.setting["lr"]) for seed in scale.seeds]
    outcome = _run(arm, setting, lag, runs, scale, starts)
    return [
        Record(arm.name, best.condition, best.setting, seed, metrics)
        for seed, metrics in zip(scale.seeds, outcome, strict=True)
    ]


def _why(scale: Scale) -> list[Record]:
    """At the longest lag: how much of the update goes to responses that the policy has left behind."""
    starts, records = Starts(scale.seeds), []
    for arm in (arm for arm in arms(scale) if arm.name in WHY_ARMS):
        for setting, _ in arm.by_loss():
            runs = [(seed, WHY_RATE) for seed in scale.seeds]
            outcome = _run(arm, setting, LAGS[-1], runs, scale, starts, watch=True)
            (strength,) = setting.values()
            records += [
                Record(arm.name, f"{WHY}, β {strength:g}", {"lr": WHY_RATE, **setting}, seed, metrics)
                for seed, metrics in zip(scale.seeds, outcome, strict=True)
            ]
    return records


class Starts:
    """The policies to begin with, one a seed: a fifth of their answers is right."""

    def __init__(self, seeds: Sequence[int], pretraining: int = 400) -> None:
        self.seeds = (*TUNING, *seeds)
        self.policies = pretrained(self.seeds, skew=-0.5, noise=0.8, steps=pretraining)

    def of(self, seeds: Sequence[int]) -> SequencePolicies:
        return self.policies.copies([self.seeds.index(seed) for seed in seeds])


def steps(scale: Scale) -> int:
    return 60 if scale.quick else 200


def _run(
    arm: Arm,
    setting: Setting,
    lag: int,
    runs: Sequence[tuple[int, float]],
    scale: Scale,
    starts: Starts,
    *,
    watch: bool = False,
) -> list[dict[str, float]]:
    """Train runs of (seed, learning rate) side by side; the learning rate is constant.

    With `watch` there is one metric more, `behind`: the share of Σ|∂L/∂S| over the updates that falls on
    responses which the policy finds less than e^−FAR times as likely as their sampler did.
    """
    seeds, rates = [seed for seed, _ in runs], torch.tensor([rate for _, rate in runs])
    policies = starts.of(seeds)
    loss, feed = arm.loss(**setting), FEEDS[arm.name]
    versions = {0: policies.table().detach()}
    rewards = RIGHT.expand(len(runs), -1, -1)
    dice, optimizer = Dice(seeds), StackedAdam(policies.parameters, rates, CLIP)
    total = torch.zeros(2, len(runs))
    for t in range(steps(scale)):
        table = policies.table()
        versions[t] = table.detach()
        if (forgotten := t - lag - MOVES - 1) > 0:
            del versions[forgotten]
        v = max(0, t - lag)
        prompts = (dice.throw(GROUPS) * table.shape[1]).long()
        drawn = respond(versions[v].sum(-1), prompts, dice.throw(GROUPS, K))
        policy = pick(table, prompts, drawn)
        behaviour, reference, old = (
            pick(versions[i], prompts, drawn) for i in (v, feed.reference(t, v), feed.old(t, v))
        )
        batch = Responses(
            policy=policy,
            rollout=old,
            reference=reference,
            behaviour=behaviour.sum(1),
            rewards=pick(rewards, prompts, drawn),
            mask=torch.ones_like(policy, dtype=torch.bool),
            k=K,
            behaviour_tokens=behaviour,
        )
        *gradients, weights = torch.autograd.grad(loss(batch) * len(runs), [*policies.parameters, policy])
        optimizer.step(gradients)
        left = (policy.detach() - behaviour).sum(1) < -FAR
        total += torch.stack([(weights[:, 0].abs() * kept).view(len(runs), -1).sum(1) for kept in (left, 1)])
    found = measure(policies, Problem(rewards, versions[0], seeds, rates, beta=1.0))
    metrics = [{METRIC: f["reward"], "kl": f["kl_reference"], "entropy": f["entropy"]} for f in found]
    if watch:
        shares = (total[0] / total[1]).tolist()
        metrics = [{**m, "behind": share} for m, share in zip(metrics, shares, strict=True)]
    return metrics


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    before = Starts(scale.seeds).of(scale.seeds).table().detach().double().sum(-1)
    start = (before.exp() * RIGHT).sum(-1).mean(-1)

    def rows(kind: str) -> list[dict[str, Any]]:
        return summarise(
            arms(scale), [r for r in records if r.condition.startswith(kind)], METRIC, highest=True
        )

    return {
        "question": "How accurate after training on responses of a policy so many updates old?",
        "metric": METRIC,
        "tuning_seed": list(TUNING),
        "problem": {
            "k": K,
            "groups": GROUPS,
            "steps": steps(scale),
            "moves": MOVES,
            "why_rate": WHY_RATE,
            "cap": 2,
        },
        "start": {METRIC: vars(Interval.of(start.tolist()))},
        "optima": _optima(before),
        "rows": rows("lag"),
        "rates": rows("rate"),
        "why": _rows_of_why(scale, records),
    }


def _rows_of_why(scale: Scale, records: list[Record]) -> list[dict[str, Any]]:
    labels = {arm.name: arm.label for arm in arms(scale)}
    mine = [record for record in records if record.condition.startswith(WHY)]
    rows = []
    for arm, condition in dict.fromkeys((r.arm, r.condition) for r in mine):
        runs = [r.metrics for r in mine if (r.arm, r.condition) == (arm, condition)]
        cells = {name: vars(Interval.of([run[name] for run in runs])) for name in runs[0]}
        rows.append(
            {"arm": arm, "label": labels[arm], "condition": condition.removeprefix(f"{WHY}, "), **cells}
        )
    return rows


def _optima(before: Tensor) -> list[dict[str, Any]]:
    """Accuracy and KL of π*_β, what arms with the initial reference aim at."""
    rows = []
    for beta in (0.2, 0.05):
        optimum = (before + RIGHT / beta).log_softmax(-1)
        accuracy = (optimum.exp() * RIGHT).sum(-1).mean(-1)
        kl = (optimum.exp() * (optimum - before)).sum(-1).mean(-1)
        cells = {METRIC: vars(Interval.of(accuracy.tolist())), "kl": vars(Interval.of(kl.tolist()))}
        rows.append({"label": "π*", "condition": f"β {beta:g}", **cells})
    return rows


def tables(found: dict[str, Any]) -> list[Any]:
    return [
        *by_condition(found["rows"], METRIC, "Accuracy by lag, with the best setting for each", columns=4),
        *by_condition(found["rows"], "kl", "KL to the start, nats", columns=4),
        *by_condition(found["rates"], METRIC, f"Accuracy at lag {LAGS[-1]}, by learning rate", columns=3),
        by_metric(
            [{**row, "label": f"{row['label']}, {row['condition']}"} for row in found["why"]],
            {"behind": "weight on what it has left behind", METRIC: METRIC, "kl": "KL"},
            f"Lag {LAGS[-1]}, learning rate {WHY_RATE:g}",
        ),
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(3, width=10.2, height=4.6)
    panels = (("rows", METRIC, "error, exact"), ("rows", "kl", "KL to the start, nats"),
              ("rates", METRIC, f"error at lag {LAGS[-1]}"))  # fmt: skip
    for axis, (key, metric, label) in zip(axes, panels, strict=True):
        for index, name in enumerate(dict.fromkeys(row["label"] for row in found[key])):
            mine = [row for row in found[key] if row["label"] == name]
            xs = [float(row["condition"].split()[1]) for row in mine]
            means = [row[metric]["mean"] for row in mine]
            axis.plot(
                xs,
                [1 - mean for mean in means] if metric == METRIC else means,
                label=name,
                linewidth=1.2,
                marker="D" if name.startswith("GVPO") else "o",
                markersize=3.5,
                color=COLOURS[index],
            )
        axis.set_ylabel(label)
        if metric == METRIC:
            axis.set_yscale("log")
        if key == "rows":
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.set_xticks(LAGS, LAGS)
            axis.set_xlim(-0.3, 40)
            axis.set_xlabel("lag, updates")
        else:
            axis.set_xscale("log")
            axis.set_xlabel("learning rate")
    legend_below(figure, axes[0])
    save(figure, path, found)
