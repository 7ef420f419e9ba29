"""An off-policy step: two passes without stored activations, against one that stores them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import Laps, Row, in_fresh_process, laps_of, minima, peak_of
from benchmarks.step import WORK, flat_gradient, tiny
from benchmarks.workloads import PER_DEVICE, Workload
from gvpo.model.micro_batch import MicroBatch
from gvpo.objective import gvpo_loss
from gvpo.packing import plan_micro_batches
from gvpo.step import GVPOStep

ABOUT = (
    "An update whose policy is not its reference: CPU seconds and peak MiB of its gradient, one thread. "
    "one pass: forward of all rows with torch's cross-entropy on the positions that count, in packed "
    "micro-batches, activations and logits kept; the formula; backward. two passes: GVPOStep. "
    "free step: GVPOStep where the policy is the reference, one pass over the same rows."
)

BETA = 0.1
KINDS = ("one pass", "two passes", "free step")


def make(kind: str, work: Workload) -> tuple[Any, Any]:
    """A model, and a job that adds the gradient to it and returns the seconds of its parts."""
    model = work.model()
    batch = work.batch()
    budget = PER_DEVICE * batch.input_ids.shape[1]
    if kind == "two passes":
        batch.reference_logps = torch.full((len(batch),), -500.0, dtype=torch.float64)
    step = GVPOStep(model, beta=BETA, token_budget=budget)
    plan = plan_micro_batches(batch.lengths.tolist(), list(range(len(batch))), budget)

    def two_passes() -> list[float]:
        model.zero_grad(set_to_none=True)
        laps = laps_of(step)
        step(batch)
        laps()
        return laps.seconds

    def one_pass() -> list[float]:
        model.zero_grad(set_to_none=True)
        laps = Laps()
        policy = torch.zeros(len(batch), dtype=torch.float64)
        for indices in plan:
            micro = MicroBatch.of(batch, indices, batch.lengths.tolist())
            hidden = model.model(input_ids=micro.input_ids[:, :-1], use_cache=False).last_hidden_state
            chosen = micro.chosen[:, 1:]
            nll = F.cross_entropy(
                hidden[chosen] @ model.lm_head.weight.t(), micro.input_ids[:, 1:][chosen], reduction="none"
            )
            policy = policy.index_add(0, micro.row_of, -nll.to(policy.dtype))
            laps()
        reference = torch.full_like(policy, -500.0)
        gvpo_loss(policy, reference, batch.rewards, batch.group_ids, beta=BETA).loss.backward()
        laps()
        return laps.seconds

    return model, one_pass if kind == "one pass" else two_passes


def _peak(kind: str, work: Workload) -> float:
    job = make(kind, work)[1]
    return peak_of(lambda: (job(), job()))


def compare(name: str, work: Workload, repeats: int, *, fresh: bool = True) -> Row:
    made = {kind: make(kind, work) for kind in KINDS}
    best = minima({kind: job for kind, (_, job) in made.items()}, repeats)
    expected, got = (flat_gradient(made[kind][0]) for kind in KINDS[:2])
    peaks = {kind: in_fresh_process(_peak, kind, work) if fresh else _peak(kind, work) for kind in KINDS}
    return {
        "work": name,
        **{f"{kind} s": best[kind] for kind in KINDS},
        "two passes / one": best["two passes"] / best["one pass"],
        **{f"{kind} MiB": peaks[kind] for kind in KINDS},
        "two / one, memory": peaks["two passes"] / peaks["one pass"],
        "gradient difference": ((got - expected).norm() / expected.norm()).item(),
    }


def run(small: bool, repeats: int = 8) -> list[Row]:
    works = {name: replace(work, zero_groups=0.0) for name, work in WORK.items()}
    del works["V 32k, d 256, heavy tail, half zero"]  # zero weights save nothing off-policy
    if small:
        return [compare("tiny", tiny(works["V 32k, d 256, uniform"]), 1, fresh=False)]
    return [compare(name.removesuffix(", half zero"), work, repeats) for name, work in works.items()]
