"""What reading a prompt once gives: the step that shares prompts against the same step on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Row, in_fresh_process, laps_of, minima, peak_of
from benchmarks.step import flat_gradient
from benchmarks.workloads import PER_DEVICE, Workload, micro_steps, trainer
from gvpo.batch import GroupBatch
from gvpo.step import GVPOStep, SequenceScorer, StepReport

ABOUT = (
    "CPU seconds and peak MiB of the gradient of one optimizer step, one thread, each prompt read once or by "
    "every row, at the same token budget (8 of the longest rows). free: the policy is its reference. three "
    "passes: reference, scoring, update. V32k: vocabulary 32,000, 256 wide, 4 layers; 135M: the shape of "
    "SmolLM2-135M, random weights. Completions: heavy tail or all alike. trl / shared: TRL 1.16's stock "
    "trainer, and the same forced to its compact head."
)


@dataclass(frozen=True)
class Case:
    """Work of prompts, completions and k responses each, on a model of some shape."""

    shape: str
    prompt: int
    completion: int
    k: int = 8
    rows: int = 64
    passes: str = "free"
    heavy_tail: bool = True
    trl: bool = False

    @property
    def work(self) -> Workload:
        width, vocabulary = (16, 97) if self.shape == "tiny" else (256, 32_000)
        return Workload(
            vocabulary=49_152 if self.shape == "135M" else vocabulary,
            hidden=width,
            layers=1 if self.shape == "tiny" else 4,
            rows=self.rows,
            heavy_tail=self.heavy_tail,
            prompt_length=self.prompt,
            mean_length=self.completion,
            max_length=4 * self.completion,
        )

    def model(self) -> LlamaForCausalLM:
        if self.shape != "135M":
            return self.work.model()
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49_152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
            )
        )

    def batch(self) -> GroupBatch:
        prompts = [[int(word) for word in prompt.split()] for prompt in self.work.prompts()]
        groups = [row // self.k for row in range(self.rows)]
        return GroupBatch.from_tokens(
            [prompts[group] for group in groups], self.work.completions(), self.work.rewards(), groups
        )

    def job(self, shared: bool) -> tuple[GVPOStep, Callable[[], list[float]]]:
        """The step, and what makes it once and returns its seconds in parts."""
        batch = self.batch()
        budget: dict[str, Any] = {"token_budget": PER_DEVICE * batch.input_ids.shape[1]}
        step = GVPOStep(self.model(), share_prompts=shared, **budget)
        reference = SequenceScorer(step.model, share_prompts=shared, **budget)
        for scorer in (step, reference):
            scorer._decide(batch)  # the checks of the first use

        def run() -> list[float]:
            step.model.zero_grad(set_to_none=True)
            laps = laps_of(step)
            if self.passes == "three passes":
                batch.reference_logps = reference.sequence_logps(batch) + 1
                laps()
            step.report = step(batch)
            laps()
            return laps.seconds

        return step, run


def peak(case: Case, shared: bool) -> float:
    _, run = case.job(shared)
    return peak_of(run)


def measure(case: Case, repeats: int, fresh: bool = True) -> Row:
    steps, jobs = {}, {}
    for name in ("whole", "shared"):
        steps[name], jobs[name] = case.job(name == "shared")
    seldom = {}
    if case.trl:
        for kind in ("trl", "trl, compact head"):
            made = trainer(kind, case.work)
            jobs[kind] = lambda made=made: micro_steps(made, 1)
            seldom[kind] = 0
    best = minima(jobs, repeats, seldom=seldom)
    reports: dict[str, StepReport] = {name: step.report for name, step in steps.items()}
    peaks = {
        name: in_fresh_process(peak, case, name == "shared") if fresh else peak(case, name == "shared")
        for name in steps
    }
    expected, got = (flat_gradient(steps[name].model) for name in ("whole", "shared"))
    row: Row = {
        "model": case.shape,
        "prompt": case.prompt,
        "completion": case.completion,
        "k": case.k,
        "passes": case.passes,
        "whole s": best["whole"],
        "shared s": best["shared"],
        "whole / shared": best["whole"] / best["shared"],
        "tokens": reports["whole"].tokens,
        "shared tokens": reports["shared"].tokens,
        "whole MiB": peaks["whole"],
        "shared MiB": peaks["shared"],
        "memory": peaks["shared"] / peaks["whole"],
        "gradient difference": ((got - expected).norm() / expected.norm()).item(),
        "trl / shared": best["trl"] / best["shared"] if case.trl else None,
        "compact / shared": best["trl, compact head"] / best["shared"] if case.trl else None,
    }
    return row


CASES = [
    Case("V32k", 16, 64),
    Case("V32k", 64, 64),
    Case("V32k", 256, 64, trl=True),
    Case("V32k", 1024, 64),
    Case("V32k", 256, 64, passes="three passes"),
    Case("V32k", 256, 64, k=16),
    Case("V32k", 256, 16),
    Case("V32k", 256, 256),
    Case("135M", 46, 12, heavy_tail=False),
    Case("135M", 46, 12, heavy_tail=False, passes="three passes"),
]


def run(small: bool, repeats: int = 1) -> list[Row]:
    if small:
        return [measure(Case("tiny", 24, 8, rows=16, trl=True), 1, fresh=False)]
    return [measure(case, repeats) for case in CASES]
