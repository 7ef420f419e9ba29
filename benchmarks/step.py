"""One optimizer step against TRL's, and against fine-tuning on the same tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.measure import Row, minima
from benchmarks.workloads import (
    PER_DEVICE,
    CannedGVPO,
    Workload,
    floor,
    micro_steps,
    rollout,
    trainer,
    update,
)

ABOUT = (
    "CPU seconds of the gradient of one optimizer step (64 responses of 8 prompts, 4 layers, float32, one "
    "thread) without generation, rewards and optimizer; sums over micro-batches of minima over "
    "interleaved repeats (TRL, whose micro-steps are all alike: 8 times the fastest). floor: weighted "
    "fine-tuning with torch's cross-entropy on exactly the tokens that have weight, packed alike. "
    "trl: GRPOTrainer as installed. trl, compact head: the same, forced to score completions only."
)

WORK = {
    "V 32k, d 256, heavy tail, half zero": Workload(zero_groups=0.5),
    "V 32k, d 256, heavy tail": Workload(),
    "V 32k, d 256, uniform": Workload(heavy_tail=False),
    "V 152k, d 128, heavy tail, half zero": Workload(vocabulary=152_000, hidden=128, zero_groups=0.5),
}

CALLS = 3  # micro-steps of TRL that are run


def tiny(work: Workload) -> Workload:
    """The same, small enough for a test."""
    return replace(work, vocabulary=97, hidden=16, rows=16, layers=1, mean_length=8, max_length=24)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(name: str, work: Workload, repeats: int) -> Row:
    ours: CannedGVPO = trainer("gvpo", work)
    compact, stock = trainer("trl, compact head", work), trainer("trl", work)
    batch = rollout(ours)
    update(ours)
    floor_model = work.model()
    least = floor(floor_model, batch, ours.report.weights, ours._token_budget(batch))
    least()
    expected, got = flat_gradient(floor_model), flat_gradient(ours.model)
    jobs = {
        "floor": least,
        "gvpo": lambda: update(ours),
        "trl, compact head": lambda: micro_steps(compact, CALLS),
        "trl": lambda: micro_steps(stock, CALLS),
    }
    best = minima(jobs, repeats, seldom={"trl": 0, "trl, compact head": 1})
    report = ours.report
    return {
        "work": name,
        **{f"{kind} s": seconds for kind, seconds in best.items()},
        "gvpo / floor": best["gvpo"] / best["floor"],
        "compact / gvpo": best["trl, compact head"] / best["gvpo"],
        "trl / gvpo": best["trl"] / best["gvpo"],
        "tokens per useful": report.tokens / report.useful_tokens,
        "trl tokens per useful": stock.tokens / CALLS * work.rows / PER_DEVICE / report.useful_tokens,
        "gradient vs floor": ((got - expected).norm() / expected.norm()).item(),
    }


def run(small: bool, repeats: int = 6) -> list[Row]:
    if small:
        return [compare(name, tiny(work), 1) for name, work in list(WORK.items())[:1]]
    return [compare(name, work, repeats) for name, work in WORK.items()]
