"""Where the updates lead: one prompt, 512 responses, every divergence exact (docs/evidence.md).

A table of logits is trained from ten samplers with β = 0.2, and held against π* ∝ π_ref exp(R/β). GVPO gets
one setting for all samplers and no sampler's probabilities; each opponent gets its best setting for each
sampler, and those that say so know the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.comparison import Arm, Record, Scale, grid, named, summarise
from experiments.exact import Problem, Table, from_reference, train
from experiments.losses import GVPO
from experiments.opponents import DPO, GRPO, RLOO, CorrectedGRPO, DrGRPO
from experiments.report import by_condition, dots, legend_below, save
from gvpo.run import new_figure

if TYPE_CHECKING:
    from jaxtyping import Float

RESPONSES, BETA, K, GROUPS = 512, 0.2, 8, 16
METRIC = "kl_optimum"

SAMPLERS = {
    "on-policy": "the policy",
    "T=1.5": "the policy at temperature 1.5",
    "T=0.6": "the policy at temperature 0.6",
    "quantised": "the policy with logits rounded to multiples of 0.5",
    "perturbed": "the policy with normal noise of 0.5 on its logits, drawn once",
    "reference": "the reference",
    "uniform": "all responses alike",
    "peaked": "a stranger: logits of normal noise of 3",
    "inverse": "the reference upside down: likely where it is unlikely",
    "top-p 0.8": "the policy's nucleus of 0.8: does not cover the optimum",
}
COVERING = tuple(name for name in SAMPLERS if name != "top-p 0.8")


class Tables:
    """A free logit for each response: (runs, 1, responses, 1)."""

    def __init__(self, reference: Float[Tensor, "runs responses"]) -> None:
        self.parameters = [reference[:, None, :, None].clone().requires_grad_()]

    def table(self) -> Float[Tensor, "runs 1 responses 1"]:
        return self.parameters[0].log_softmax(2)

    def values(self) -> Float[Tensor, "runs 1"]:
        return self.parameters[0][..., 0].logsumexp(2)


def make_problem(seed: int) -> dict[str, Float[Tensor, "responses"]]:
    """Reference, rewards (nine in ten 0, the others between 0.5 and 1), stranger and noise."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(RESPONSES, generator=g, dtype=torch.float64)

    reference = normal(1.5).log_softmax(0)
    good = torch.rand(RESPONSES, generator=g) < 0.1
    rewards = good * (0.5 + 0.5 * torch.rand(RESPONSES, generator=g, dtype=torch.float64))
    return {
        "reference": reference,
        "rewards": rewards,
        "stranger": normal(3).log_softmax(0),
        "noise": normal(0.5),
    }


def sampler_logps(name: str, policy: Tensor, problem: dict[str, Tensor]) -> Float[Tensor, "runs responses"]:
    """log μ of a sampler, for runs of one kind of sampler."""
    reference = problem["reference"]
    if name.startswith("T="):
        return (policy / float(name[2:])).log_softmax(-1)
    if name == "quantised":
        return ((policy / 0.5).round() * 0.5).log_softmax(-1)
    if name == "perturbed":
        return (policy + problem["noise"]).log_softmax(-1)
    if name == "top-p 0.8":
        p, order = policy.exp().sort(-1, descending=True)
        kept = p * ((p.cumsum(-1) - p) < 0.8)
        nucleus = torch.zeros_like(p).scatter(-1, order, kept)
        return (nucleus / nucleus.sum(-1, keepdim=True)).clamp_min(1e-300).log()
    fixed = {
        "on-policy": policy,
        "reference": reference,
        "uniform": torch.zeros_like(reference).log_softmax(-1),
        "peaked": problem["stranger"],
        "inverse": (-reference).log_softmax(-1),
    }
    return fixed[name]


def arms(scale: Scale) -> list[Arm]:
    """Eight settings each (two in a quick run)."""
    two: tuple[float, ...] = (0.1,)
    eight: tuple[float, ...] = (0.03, 0.1)
    if not scale.quick:
        two, eight = (0.03, 0.1), (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)

    def four(*values: float) -> tuple[float, ...]:
        return values[1:3] if scale.quick else values

    costs, for_dr_grpo = four(0.2, 0.5, 1.0, 3.0), four(0.05, 0.1, 0.175, 0.2)
    return [
        Arm("gvpo", "GVPO", partial(GVPO, beta=BETA), grid(eight), one_setting=True),
        Arm("rloo", "RLOO + KL in the reward", partial(RLOO, kl=BETA), grid(eight)),
        Arm("rloo_is", "RLOO + KL, knows μ", partial(RLOO, kl=BETA), grid(two, cap=four(1, 2, 5, 10))),
        Arm("grpo_k3", "GRPO + k3", GRPO, grid(two, kl=costs)),
        Arm("grpo_k3_corrected", "GRPO + corrected k3", CorrectedGRPO, grid(two, kl=costs)),
        Arm("dr_grpo_k3_corrected", "Dr. GRPO + corrected k3", DrGRPO, grid(two, kl=for_dr_grpo)),
        Arm(
            "grpo_k3_is", "GRPO + corrected k3, knows μ", partial(CorrectedGRPO, cap=10), grid(two, kl=costs)
        ),
        Arm("dpo", "DPO", DPO, grid(two, beta=four(0.2, 1.0, 2.0, 4.0))),
    ]


def jobs(scale: Scale) -> list[str]:
    return [arm.name for arm in arms(scale)]


def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
    """All samplers, seeds and settings of one algorithm."""
    return run_arm(named(arms(scale), name), scale, tuple(SAMPLERS))


def run_arm(
    arm: Arm, scale: Scale, samplers: Sequence[str], *, updates: int = 0, reference_n: int = 0
) -> list[Record]:
    """Some samplers, all seeds and settings.

    Args:
        updates: if not as many as the table of this module has.
        reference_n: how many rewards of the reference's own responses the losses are given.
    """
    updates = updates or steps(scale)
    problems = {seed: make_problem(seed) for seed in scale.all_seeds}
    records = []
    for setting, rates in arm.by_loss():
        runs = [(s, seed, lr) for s in samplers for seed in scale.all_seeds for lr in rates]
        drawn = {
            key: torch.stack([problems[seed][key] for _, seed, _ in runs])
            for key in ("reference", "rewards", "stranger", "noise")
        }
        block = {s: torch.tensor([i for i, run in enumerate(runs) if run[0] == s]) for s in samplers}
        parts = {s: {key: value[block[s]] for key, value in drawn.items()} for s in samplers}

        def sampler(
            table: Table, block: dict[str, Tensor] = block, parts: dict[str, dict[str, Tensor]] = parts
        ) -> Tensor:
            policy = table[:, 0, :, 0]
            out = torch.empty_like(policy)
            for s, rows in block.items():
                out[rows] = sampler_logps(s, policy[rows], parts[s])
            return out[:, None]

        problem = Problem(
            drawn["rewards"][:, None],
            drawn["reference"][:, None, :, None],
            [seed for _, seed, _ in runs],
            torch.tensor([lr for *_, lr in runs], dtype=torch.float64),
            BETA,
        )
        if reference_n:
            problem.reference_rewards = from_reference(problem, reference_n)
        outcome = train(
            Tables(drawn["reference"]),
            problem,
            sampler,
            arm.loss(**setting),
            steps=updates,
            groups=GROUPS,
            k=K,
        )[updates]
        records += [
            Record(arm.name, s, {"lr": lr, **setting}, seed, metrics)
            for (s, seed, lr), metrics in zip(runs, outcome, strict=True)
        ]
    return records


def steps(scale: Scale) -> int:
    return 400 if scale.quick else 3000


def summary(records: list[Record], scale: Scale, directory: Path) -> dict[str, Any]:
    return {
        "question": "How far from π* does training end, in KL(π‖π*) nats?",
        "metric": METRIC,
        "problem": {
            "responses": RESPONSES,
            "beta": BETA,
            "k": K,
            "groups": GROUPS,
            "steps": steps(scale),
            "samplers": SAMPLERS,
        },
        "rows": summarise(arms(scale), records, METRIC),
    }


def tables(found: dict[str, Any]) -> list[Any]:
    return by_condition(found["rows"], METRIC, "KL(π‖π*) in nats after training, by sampler")


def draw(found: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(width=8.6, height=4.6)
    dots(axis, found["rows"], METRIC, log=True)
    axis.set_ylabel("KL(π‖π*) after training, nats")
    axis.set_title("One prompt, 512 responses, β = 0.2: how far from the optimum, by sampler", fontsize=10)
    legend_below(figure, axis)
    save(figure, path, found)
