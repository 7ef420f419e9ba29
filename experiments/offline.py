"""Learning from a fixed log where several answers are good, exactly measured (docs/evidence.md).

The log holds 1,024 groups of 8 responses drawn by the reference policy, by another model, or uniformly; the
task is that of `sequences.py`, β = 0.3. A second part goes over the reference's log for 37 epochs at a
constant learning rate: who drifts? Each seed has its own reference policy, other model and log.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.comparison import Arm, Interval, Record, Scale, grid, named, summarise
from experiments.exact import Problem, from_reference, make_log, train
from experiments.losses import GVPO, RejectionSampling, RewardWeighted
from experiments.opponents import DPO, GRPO, GSPO, RLOO, CorrectedGRPO, DrGRPO
from experiments.report import COLOURS, by_condition, by_metric, dots, legend_below, save
from experiments.sequences import REWARDS, SequencePolicies, pretrained
from gvpo.run import new_figure

BETA, K, GROUPS, LOGGED = 0.3, 8, 32, 1024
METRIC = "kl_optimum"
LOGS = ("reference", "other model", "uniform")
DRIFT = "reference, 37 epochs"
DRIFT_STEPS = 1200
DRIFT_AT = (32, 100, 200, 400, 800, DRIFT_STEPS)


def arms(scale: Scale) -> list[Arm]:
    """Eight settings each (one in a quick run)."""
    eight: tuple[float, ...] = (3e-3,)
    four: tuple[float, ...] = (3e-3,)
    if not scale.quick:
        eight, four = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2), (1e-3, 3e-3, 1e-2, 3e-2)
    for_dpo = (1e-3,) if scale.quick else (3e-4, 1e-3, 3e-3, 1e-2)
    corrected, dr_grpo = "GRPO, clipped + corrected k3", "Dr. GRPO, clipped + corrected k3"
    cut = scale.cut
    return [
        Arm("gvpo", "GVPO", partial(GVPO, beta=BETA), grid(eight)),
        Arm("grpo_clip", "GRPO, clipped", GRPO, grid(four, epsilon=cut(0.2, 0.5))),
        Arm("grpo_k3", "GRPO, clipped + k3", GRPO, grid(four, kl=cut(0.1, 0.03))),
        Arm("grpo_k3_corrected", corrected, CorrectedGRPO, grid(four, kl=cut(0.1, 0.03))),
        Arm("dr_grpo", dr_grpo, DrGRPO, grid(four, kl=cut(0.03, 0.01))),
        Arm("gspo", "GSPO", GSPO, grid(four, epsilon=cut(0.2, 0.5))),
        Arm("rloo_is", "RLOO + KL, knows μ", partial(RLOO, kl=BETA), grid(four, cap=cut(5, 20))),
        Arm("dpo", "DPO", DPO, grid(for_dpo, beta=cut(2.0, 5.0))),
        Arm("rwr", "reward-weighted SFT", RewardWeighted, grid(four, beta=cut(0.3, 0.15))),
        Arm("rft", "rejection-sampling SFT", RejectionSampling, grid(eight)),
    ]


# Without a choice: what 37 epochs do at a learning rate that suits the shorter run.
DRIFTERS = (
    Arm("gvpo", "GVPO", partial(GVPO, beta=BETA), [{"lr": 3e-3}]),
    Arm("grpo_clip", "GRPO, clipped", GRPO, [{"lr": 3e-3}]),
    Arm("grpo_free", "GRPO, not clipped", partial(GRPO, epsilon=1e9), [{"lr": 1e-3}]),
    Arm("dpo", "DPO", partial(DPO, beta=0.5), [{"lr": 1e-3}]),
    Arm("rft", "rejection-sampling SFT", RejectionSampling, [{"lr": 3e-3}]),
)


def jobs(scale: Scale) -> list[str]:
    return [arm.name for arm in arms(scale)] + [f"drift:{arm.name}" for arm in DRIFTERS]


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm on all logs, or over 37 epochs."""
    if name.startswith("drift:"):
        return _drift(named(DRIFTERS, name.removeprefix("drift:")), scale)
    return run_arm(named(arms(scale), name), scale)


def run_arm(arm: Arm, scale: Scale, *, updates: int = 0, reference_n: int = 0) -> list[Record]:
    """One algorithm on all logs; `updates` and `reference_n` as in `optimum.run_arm`."""
    starts = pretrain(scale.all_seeds)
    steps = updates or (100 if scale.quick else 320)
    records = []
    for setting, rates in arm.by_loss():
        runs = [(log, seed, lr) for log in LOGS for seed in scale.all_seeds for lr in rates]
        found = _train(starts, runs, arm.loss(**setting), scale, reference_n, steps=steps)
        records += [
            Record(arm.name, log, {"lr": lr, **setting}, seed, metrics)
            for (log, seed, lr), metrics in zip(runs, found[steps], strict=True)
        ]
    return records


def _drift(arm: Arm, scale: Scale) -> list[Record]:
    starts = pretrain(scale.all_seeds)
    (setting,) = arm.grid
    steps = DRIFT_STEPS // 4 if scale.quick else DRIFT_STEPS
    runs = [("reference", seed, setting["lr"]) for seed in scale.seeds]
    history = _train(starts, runs, arm.loss(), scale, steps=steps, constant=True, measure_at=DRIFT_AT)
    return [
        Record(arm.name, f"{DRIFT}: {step}", setting, seed, metrics)
        for step, outcome in history.items()
        for (_, seed, _), metrics in zip(runs, outcome, strict=True)
    ]


Start = tuple[SequencePolicies, SequencePolicies]  # the references and the other models, one a seed


@cache
def pretrain(seeds: tuple[int, ...]) -> Start:
    """References that prefer small first symbols, other models that prefer large ones; both half noise."""
    references = pretrained(seeds, skew=-0.5, noise=0.5)
    return references, pretrained([seed + 5000 for seed in seeds], skew=0.7, noise=0.5)


def _train(
    starts: Start,
    runs: list[tuple[str, int, float]],
    loss: Any,
    scale: Scale,
    reference_n: int = 0,
    *,
    steps: int,
    **others: Any,
) -> dict[int, list[dict[str, float]]]:
    row = [scale.all_seeds.index(seed) for _, seed, _ in runs]
    with torch.no_grad():
        reference, other = (policies.table()[row] for policies in starts)
    samplers: dict[str, Tensor] = {
        "reference": reference.sum(-1),
        "other model": other.sum(-1),
        "uniform": torch.zeros_like(other.sum(-1)).log_softmax(-1),
    }
    sampler = torch.stack([samplers[log][i] for i, (log, *_) in enumerate(runs)])
    seeds = [seed for _, seed, _ in runs]
    rewards = REWARDS.expand(len(runs), -1, -1)
    problem = Problem(rewards, reference, seeds, torch.tensor([lr for *_, lr in runs]), BETA)
    if reference_n:
        problem.reference_rewards = from_reference(problem, reference_n)
    log = make_log(sampler, seeds, LOGGED, K)
    policies = starts[0].copies(row)
    return train(policies, problem, log, loss, steps=steps, groups=GROUPS, k=K, clip=1.0, **others)


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    return {
        "question": "From a log, how close to π* does training come, in KL(π‖π*) nats, and does it stay?",
        "metric": METRIC,
        "problem": {"beta": BETA, "k": K, "groups": GROUPS, "logged_groups": LOGGED},
        "start": _start(scale),
        "rows": summarise(arms(scale), [r for r in records if r.condition in LOGS], METRIC),
        "drift": [
            {
                "arm": arm.name,
                "label": arm.label,
                "setting": arm.grid[0],
                "curve": _curve([r for r in records if r.arm == arm.name and r.condition.startswith(DRIFT)]),
            }
            for arm in DRIFTERS
        ],
    }


def _start(scale: Scale) -> dict[str, Any]:
    """Where all begin: KL(reference‖π*)."""
    references = pretrained(scale.seeds, skew=-0.5, noise=0.5).table().detach().double().sum(-1)
    optimum = (references + REWARDS / BETA).log_softmax(-1)
    divergence = (references.exp() * (references - optimum)).sum(-1).mean(-1)
    reward = (references.exp() * REWARDS).sum(-1).mean(-1)
    best = (optimum.exp() * REWARDS).sum(-1).mean(-1)
    return {
        "kl_optimum": vars(Interval.of(divergence.tolist())),
        "reward": vars(Interval.of(reward.tolist())),
        "reward_of_optimum": vars(Interval.of(best.tolist())),
    }


def _curve(records: list[Record]) -> list[dict[str, Any]]:
    steps = dict.fromkeys(int(r.condition.split()[-1]) for r in records)
    return [
        {
            "step": step,
            "epochs": round(step * GROUPS / LOGGED, 1),
            METRIC: vars(
                Interval.of([r.metrics[METRIC] for r in records if r.condition.endswith(f" {step}")])
            ),
        }
        for step in sorted(steps)
    ]


def tables(found: dict[str, Any]) -> list[Any]:
    first = by_condition(found["rows"], METRIC, "KL(π‖π*) in nats after training, by who made the log")
    rows = [
        {"label": arm["label"], **{f"{point['epochs']:g} epochs": point[METRIC] for point in arm["curve"]}}
        for arm in found["drift"]
    ]
    metrics = {name: name for name in rows[0] if name != "label"}
    return [*first, by_metric(rows, metrics, "KL(π‖π*) in nats over the epochs, the reference's log")]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (left, right) = new_figure(2, width=8.6, height=4.8)
    dots(left, found["rows"], METRIC, log=True)
    left.set_ylabel("KL(π‖π*) after training, nats")
    left.set_title("by who made the log", fontsize=10)
    colours = {row["label"]: COLOURS[i] for i, row in enumerate(_first_rows(found["rows"]))}
    spare = iter(COLOURS[len(colours) :])
    for arm in found["drift"]:
        colour = colours.get(arm["label"]) or next(spare)
        xs = [point["epochs"] for point in arm["curve"]]
        band = [point[METRIC] for point in arm["curve"]]
        right.plot(xs, [b["mean"] for b in band], marker="o", markersize=3, color=colour, label=arm["label"])
        right.fill_between(xs, [max(b["low"], b["mean"] / 3) for b in band], [b["high"] for b in band],
                           alpha=0.15, color=colour)  # fmt: skip
    right.set_yscale("log")
    right.set_xlabel("epochs over the reference's log")
    right.set_title("and over the epochs, constant learning rate", fontsize=10)
    right.set_ylim(bottom=right.get_ylim()[0] / 3)  # room for the legend
    right.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)
    legend_below(figure, left)
    save(figure, path, found)


def _first_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["condition"] == rows[0]["condition"]]
