"""What each trick of the step gives: the step with one of them taken out at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from benchmarks.measure import Row, laps_of, minima
from benchmarks.step import WORK, flat_gradient, tiny
from benchmarks.workloads import PER_DEVICE, Workload
from gvpo.model.vocabulary import VocabularyGradients
from gvpo.packing import plan_micro_batches
from gvpo.step import GVPOStep

ABOUT = (
    "CPU seconds of GVPOStep on a free step, one thread, with one trick taken out at a time. zero rows kept: "
    "rows of weight 0 take part. in order: 8 rows a micro-batch as they come, trimmed to their longest. "
    "embedding by autograd, both by autograd: the gradients of the input embedding (and of the head) are "
    "added up by autograd in every micro-batch. own logits: the model's logits and log_softmax. Each row "
    "with its own prompt (see the prefix benchmark)."
)


def _all_rows(lengths: Sequence[int], rows: Sequence[int], *costs: Any) -> list[list[int]]:
    return plan_micro_batches(lengths, range(len(lengths)), *costs)


def _in_order(lengths: Sequence[int], rows: Sequence[int], *costs: Any) -> list[list[int]]:
    return [list(rows[i : i + PER_DEVICE]) for i in range(0, len(rows), PER_DEVICE)]


def _by_autograd(self: GVPOStep, micro: Any, weights: Any, sums: Any) -> Any:
    return _backward(self, micro, weights, None)


def _head_only(with_embedding: bool) -> VocabularyGradients:
    return VocabularyGradients(with_embedding=False)


_backward = GVPOStep._backward
WITHOUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing taken out": nullcontext,
    "zero rows kept": lambda: mock.patch("gvpo.scoring.plan_micro_batches", _all_rows),
    "in order": lambda: mock.patch("gvpo.scoring.plan_micro_batches", _in_order),
    "embedding by autograd": lambda: mock.patch("gvpo.step.VocabularyGradients", _head_only),
    "both by autograd": lambda: mock.patch.object(GVPOStep, "_backward", _by_autograd),
    "own logits": nullcontext,
}


def compare(name: str, work: Workload, repeats: int) -> list[Row]:
    batch = work.batch()
    jobs, steps = {}, {}
    for kind, patch in WITHOUT.items():
        budget = PER_DEVICE * batch.input_ids.shape[1]
        step = steps[kind] = GVPOStep(work.model(), token_budget=budget, share_prompts=False)
        if kind == "own logits":
            step.scorer.fused = False

        def job(step: GVPOStep = step, patch: Callable[[], Any] = patch) -> list[float]:
            step.model.zero_grad(set_to_none=True)
            laps = laps_of(step)
            with patch():
                step.report = step(batch)
            laps()
            return laps.seconds

        jobs[kind] = job
    best = minima(jobs, repeats)
    whole = best["nothing taken out"]
    expected = flat_gradient(steps["nothing taken out"].model)
    return [
        {
            "work": name,
            "taken out": kind,
            "s": seconds,
            "slower by": seconds / whole,
            "micro-batches": steps[kind].report.micro_batches,
            "tokens": steps[kind].report.tokens,
            "gradient difference": (
                (flat_gradient(steps[kind].model) - expected).norm() / expected.norm()
            ).item(),
        }
        for kind, seconds in best.items()
    ]


def run(small: bool, repeats: int = 6) -> list[Row]:
    names = ["V 32k, d 256, heavy tail, half zero", "V 152k, d 128, heavy tail, half zero"]
    if small:
        return compare("tiny", tiny(WORK[names[0]]), 1)
    return [row for name in names for row in compare(name, WORK[name], repeats)]
