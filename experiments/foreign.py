"""Learning from another model's responses, whose probabilities nobody knows (docs/evidence.md).

The task of `addition.py`. All responses come from the other model, which is worse than the policy and fixed;
every algorithm sees the same ones, and makes one update on each batch. All but the arms that say so are not
told the other model's probabilities. GVPO's relatives (docs/relatives.md) are there, too, but for those that
learn a number of each prompt: nearly every prompt comes once. Those who ask for them are told the rewards of
N answers of the initial policy to each prompt.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import addition
from experiments.comparison import Arm, Record, Scale, Setting, grid, named, summarise, tune_and_report
from experiments.losses import GVPO, RejectionSampling, RewardWeighted
from experiments.opponents import DPO, GRPO, GSPO, RLOO, CorrectedGRPO
from experiments.relatives.losses import QRPO, REBEL, TBRM, AStarPO, MirrorDescent
from experiments.report import by_metric, dots, save
from gvpo.run import new_figure

N = 64  # answers of the initial policy to each prompt, for those who ask for some
METRIC = "accuracy"
CONDITION = "other model"


def arms(scale: Scale) -> list[Arm]:
    """Twelve settings each (one in a quick run)."""
    cut = scale.cut
    rates, betas, costs = cut(6e-4, 1.5e-4, 3e-4, 1.2e-3), cut(0.2, 0.1, 0.4), cut(0.1, 0.01, 0.03)
    twelve = cut(3e-4, 3e-5, 6e-5, 1e-4, 1.5e-4, 2e-4, 4.5e-4, 6e-4, 9e-4, 1.2e-3, 2e-3, 3e-3)
    log_mean_exp = partial(MirrorDescent, normaliser="log-mean-exp")
    return [
        Arm("gvpo", "GVPO", GVPO, grid(rates, beta=betas)),
        Arm("grpo", "GRPO", GRPO, grid(twelve)),
        Arm("grpo_k3", "GRPO + k3", GRPO, grid(rates, kl=costs)),
        Arm("grpo_k3_corrected", "GRPO + corrected k3", CorrectedGRPO, grid(rates, kl=costs)),
        Arm("grpo_k3_is", "GRPO + k3, knows μ", partial(CorrectedGRPO, cap=2), grid(rates, kl=costs)),
        Arm("gspo_k3", "GSPO + k3", GSPO, grid(rates, kl=costs)),
        Arm("rloo_is", "RLOO + KL, knows μ", lambda beta: RLOO(kl=beta, cap=2), grid(rates, beta=betas)),
        Arm("dpo", "DPO", DPO, grid(rates, beta=cut(0.3, 1.0, 3.0))),
        Arm("rwr", "reward-weighted SFT", RewardWeighted, grid(rates, beta=betas)),
        Arm("rft", "rejection-sampling SFT", RejectionSampling, grid(twelve)),
        Arm("rebel", "REBEL", REBEL, grid(rates, beta=betas)),
        Arm("kimi", "OPMD, mean R", MirrorDescent, grid(rates, beta=betas)),
        Arm("kimi_z", "OPMD, log-mean-exp", log_mean_exp, grid(rates, beta=betas)),
        Arm("astar", "A*-PO, SPO", partial(AStarPO, n=N), grid(rates, beta=betas)),
        Arm("qrpo", "QRPO", partial(QRPO, n=N), grid(rates, beta=betas)),
        Arm("tbrm", "TBRM", TBRM, grid(rates, beta=betas)),
    ]


def jobs(scale: Scale) -> list[str]:
    return [arm.name for arm in arms(scale)]


def prepare(scale: Scale, directory: Path) -> None:
    """The models, and what the other one answers: the same for all algorithms."""
    addition.prepare(directory, quick=scale.quick)
    initial, other = addition.load(directory, "policy"), addition.load(directory, "other")
    rollouts = {}
    for seed in scale.all_seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = [addition.Rollout.of(other, initial, generator) for _ in range(steps(scale))]
        rollouts[seed] = [(vars(rollout), rollout.rewards_of(initial, N, generator)) for rollout in drawn]
    torch.save(rollouts, directory / "rollouts.pt")


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """One algorithm: its settings on the tuning seed, then the best of them on the others."""
    arm = named(arms(scale), name)

    def run(setting: Setting, seed: int) -> Record:
        return _run(arm, setting, seed, scale, directory)

    return tune_and_report(arm, scale, METRIC, run)


def steps(scale: Scale) -> int:
    return 20 if scale.quick else 60


def _run(arm: Arm, setting: Setting, seed: int, scale: Scale, directory: Path) -> Record:
    initial = addition.load(directory, "policy")
    learner = addition.Learner(addition.load(directory, "policy"), setting["lr"], steps(scale))
    loss = arm.loss(**{key: value for key, value in setting.items() if key != "lr"})
    for fields, of_reference in torch.load(directory / "rollouts.pt")[seed]:
        rollout = addition.Rollout(**fields)
        responses = replace(rollout.responses(learner.model), reference_rewards=of_reference)
        if getattr(loss, "wants_values", False):
            responses.values = addition.first_values(learner.model, rollout.prompts)
        learner.update(responses, loss)
    return Record(arm.name, CONDITION, setting, seed, addition.evaluate(learner.model, initial))


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    initial, other = addition.load(directory, "policy"), addition.load(directory, "other")
    return {
        "question": "How accurate does a policy get on another model's responses?",
        "metric": METRIC,
        "problem": {
            "prompts": addition.PROMPTS,
            "k": addition.K,
            "steps": steps(scale),
            "reference_answers": N,
        },
        "start": {"policy": addition.evaluate(initial, initial), "other": addition.evaluate(other, initial)},
        "rows": summarise(arms(scale), records, METRIC, highest=True),
    }


_COLUMNS = {METRIC: "expected accuracy", "greedy_accuracy": "greedy", "kl_initial": "KL to the start, nats"}


def tables(found: dict[str, Any]) -> list[Any]:
    start = {"label": "before", **{k: {"mean": v, "high": v} for k, v in found["start"]["policy"].items()}}
    other = {"label": "the other model"} | {
        k: {"mean": v, "high": v} for k, v in found["start"]["other"].items()
    }
    return [by_metric([start, other, *found["rows"]], _COLUMNS, "Addition from another model's responses")]


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(width=7.5, height=4.6)
    dots(axis, [row | {"condition": row["label"]} for row in found["rows"]], METRIC)
    for name, style in (("policy", "--"), ("other", ":")):
        label = {"policy": "the policy before", "other": "the other model"}[name]
        level = found["start"][name][METRIC]
        axis.axhline(level, color="black", linestyle=style, linewidth=1)
        axis.annotate(
            label, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    for tick in axis.get_xticklabels():
        tick.set(rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_ylabel("expected accuracy, held out, exact")
    axis.set_title("Addition, learnt from another model's responses", fontsize=10)
    save(figure, path, found)
