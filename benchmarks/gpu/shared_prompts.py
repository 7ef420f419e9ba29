"""A prompt read once for its k responses, against whole rows, at full size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.gpu import Part
from benchmarks.gpu.shapes import Shape, shapes
from benchmarks.measure import Row
from benchmarks.workloads import GROUP, PER_DEVICE
from gvpo.batch import GroupBatch
from gvpo.model.shared_prompts import prompt_cost
from gvpo.step import GVPOStep
from tests.models import relative_error

ABOUT = (
    "Seconds on the wall and peak GiB over model and inputs of the gradient of one optimizer step, groups"
    " of 8, prompts alike and completions of 256 tokens, bfloat16, random weights, each prompt read once "
    "or by every row; 7B with gradient checkpointing. planned: whether the planner shares by itself. "
    "difference: relative, of the two gradients (their rounding). one more prompt: what a micro-batch "
    "that attends to one more prompt takes longer, in tokens of work, and what the planner reckons with."
)
# Tokens of the prompts, and rows.
CASES = {"0.5B": [(128, 64), (512, 64), (2048, 64)], "7B": [(512, 32), (2048, 16)]}


def of_length(shape: Shape, prompt: int, rows: int, tiny: bool, completion: int = 256) -> Shape:
    completion, prompt, rows = (8, min(prompt, 48), 16) if tiny else (completion, prompt, rows)
    return replace(
        shape, prompt_length=prompt, rows=rows, mean_length=completion, max_length=completion,
        heavy_tail=False, zero_groups=0.0,
    )  # fmt: skip


def runner(model: Any, batch: GroupBatch, share: bool) -> tuple[GVPOStep, Callable[[], Any]]:
    """A step that shares prompts always or never, and what makes it."""
    step = GVPOStep(model, token_budget=PER_DEVICE * batch.input_ids.shape[1], share_prompts=share)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with patch("gvpo.scoring.prompt_cost", lambda model: 0.0):
            step(batch)

    return step, run


def compare(part: Part, model: Any, shape: Shape) -> Row:
    batch = shape.work()
    _, make = runner(model, batch, False)
    whole, expected = part.seconds(make, 2), gradients_of(model)
    step, make = runner(model, batch, True)
    shared = part.seconds(make, 2)
    difference = relative_error(gradients_of(model), expected)
    model.zero_grad(set_to_none=True)
    by_itself = step(batch).shared_prompts > 0
    model.zero_grad(set_to_none=True)
    return {
        "way": step._way,
        "whole s": whole["s"],
        "shared s": shared["s"],
        "whole / shared": whole["s"] / shared["s"],
        "planned": by_itself,
        "whole GiB": whole["peak GiB"],
        "shared GiB": shared["peak GiB"],
        "difference": difference,
        "µs a token": whole["s"] / int(batch.lengths.sum()) * 1e6,
    }


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_more(part: Part, model: Any, shape: Shape) -> Row:
    """Of the same rows in one micro-batch: a prompt for each, against one for all."""
    rows, length = shape.rows, shape.prompt_length or 0
    completions, seconds = shape.completions(), {}
    for distinct in (1, rows):
        prompts = [[4 + row % distinct] * length for row in range(rows)]
        rewards, groups = [row / rows for row in range(rows)], [row // GROUP for row in range(rows)]
        batch = GroupBatch.from_tokens(prompts, completions, rewards, groups, device=shape.device)
        step, make = runner(model, batch, True)
        step.token_budget = 1 << 30
        seconds[distinct] = part.seconds(make, 3)["s"]
    a_token = part.rows[-1]["µs a token"] / 1e6
    tokens = (seconds[rows] - seconds[1]) / (rows - 1) / a_token - (length - 1)
    return {"one more prompt": tokens, "reckoned with": prompt_cost(model)}


def compare_all(part: Part, name: str, shape: Shape) -> None:
    model = shape.model()
    for prompt, rows in CASES[name]:
        work = of_length(shape, prompt, rows, part.tiny)
        row = {"shape": name, "prompt": work.prompt_length, "rows": work.rows}
        part.attempt(row, functools.partial(compare, part, model, work))
    work = of_length(shape, 64, 16, part.tiny, completion=512)
    part.attempt({"shape": name}, lambda: one_more(part, model, work))


def run(part: Part) -> None:
    for name, shape in shapes(part.device, part.tiny).items():
        with part.surviving({"shape": name}):
            compare_all(part, name, shape)
