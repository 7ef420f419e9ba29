"""One optimizer step's gradient: ours, fine-tuning on the same tokens, and TRL's GRPO."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import Part
from benchmarks.gpu.shapes import Shape, shapes, used
from benchmarks.measure import Row
from benchmarks.workloads import PER_DEVICE, floor, trainer
from gvpo import gvpo_weights
from gvpo.step import GVPOStep

ABOUT = (
    "Seconds on the wall and peak GiB over model and inputs of the gradient of one optimizer step: 64 "
    "responses of 8 prompts, log-normal lengths (mean 512, up to 2,048 tokens), equal rewards in 40 % of "
    "the groups; bfloat16, random weights; 7B with gradient checkpointing. Without generation, rewards "
    "and optimizer. floor: weighted fine-tuning with torch's cross-entropy on exactly the tokens that "
    "have weight, packed alike. gvpo, scored: with the scoring pass of an off-policy step. trl: "
    "GRPOTrainer, 8 times a micro-step of 8 rows, which are all padded alike. tokens/s and MFU count only"
    " tokens of rows that have weight, 6 operations each and weight that multiplies, so that padding, "
    "recomputation and rows of weight 0 lower them."
)


class Comparison:
    """Measures ways to make a shape's step, one after the other, and counts useful tokens alike for all."""

    def __init__(self, part: Part, name: str, shape: Shape) -> None:
        self.part, self.name, self.shape = part, name, shape
        self.operations, self.useful = 0.0, 0

    def measure(self, kind: str, make: Callable[[], Callable[[], Any]], times: int = 1) -> None:
        def measured() -> Row:
            row = self.part.seconds(make(), 3)
            row["s"] *= times
            return {**row, "tokens/s": self.useful / row["s"], "MFU": used(self.operations, row["s"])}

        self.part.attempt({"shape": self.name, "step": kind}, measured)

    def ours(self) -> None:
        model, batch = self.shape.model(), self.shape.work()
        zeros = torch.zeros(len(batch), dtype=torch.float64, device=batch.rewards.device)
        weights = gvpo_weights(zeros, zeros, batch.rewards, batch.group_ids)
        self.useful = int(batch.lengths[weights != 0].sum())
        self.operations = 6 * multiplying(model) * self.useful
        step = GVPOStep(model, token_budget=PER_DEVICE * batch.input_ids.shape[1])

        def run() -> None:
            model.zero_grad(set_to_none=True)
            step(batch)

        def floor_run() -> Callable[[], Any]:
            model.zero_grad(set_to_none=True)
            return floor(model, batch, weights.float(), step.token_budget)

        def ours() -> Callable[[], Any]:
            model.zero_grad(set_to_none=True)
            return run

        self.measure("gvpo", ours)
        self.measure("floor", floor_run)
        batch.reference_logps = zeros - 1
        self.measure("gvpo, scored", ours)

    def trl(self, kind: str, **options: Any) -> None:
        """TRL's own micro-step, as many times as it makes one."""

        def make() -> Callable[[], Any]:
            on_cpu = self.shape.device == "cpu"
            made = trainer(
                "trl", self.shape, use_cpu=on_cpu, gradient_checkpointing=self.shape.checkpointing, **options
            )
            made.model.train()
            inputs = made._prepare_inputs(made.batch)

            def run() -> None:
                made.model.zero_grad(set_to_none=True)
                made.accelerator.backward(made.compute_loss(made.model, inputs))

            return run

        self.measure(kind, make, self.shape.rows // PER_DEVICE)


def multiplying(model: Any) -> int:
    """Weights that multiply: all but an input embedding of its own."""
    embedding, head = (e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()))
    return sum(p.numel() for p in model.parameters()) - (0 if embedding is head else embedding.numel())


def run(part: Part) -> None:
    for name, shape in shapes(part.device, part.tiny).items():
        comparison = Comparison(part, name, shape)
        with part.surviving({"shape": name}):
            comparison.ours()
        comparison.trl("trl")
        if part.device == "cuda" and name == "0.5B" and importlib.util.find_spec("liger_kernel"):
            comparison.trl("trl, with Liger's loss", use_liger_kernel=True)
