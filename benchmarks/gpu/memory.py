"""What `gvpo train --plan` says an update takes, against what it takes."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.gpu import Part
from benchmarks.gpu.shapes import Shape, shapes
from benchmarks.measure import Row
from gvpo.step import Backend, GVPOStep
from gvpo.trl.arguments import parse_arguments
from gvpo.trl.plan import make_plan

ABOUT = (
    "Peak GiB of two optimizer steps (16 responses of 1,024 tokens, micro-batches of 8), parameters and "
    "optimizer included, random weights, against the plan of `gvpo train --plan` for the same micro-"
    "batches."
)


@dataclass(frozen=True)
class Setting:
    shape: str
    dtype: str = "bfloat16"
    autocast: bool = False
    checkpointing: bool = False
    lora: bool = False
    optim: str = "adamw_torch_fused"


# AdamW's state for 7B in bfloat16 would fit 80 GB only just (4 × 15 GB).
SETTINGS = {
    "0.5B, bfloat16": Setting("0.5B"),
    "0.5B, bfloat16, checkpointed": Setting("0.5B", checkpointing=True),
    "0.5B, float32 under autocast": Setting("0.5B", dtype="float32", autocast=True),
    "0.5B, LoRA": Setting("0.5B", lora=True),
    "7B, bfloat16, SGD, checkpointed": Setting("7B", checkpointing=True, optim="sgd"),
    "7B, LoRA, checkpointed": Setting("7B", lora=True, checkpointing=True),
}


class Autocast(Backend):
    def __init__(self, device: str, enabled: bool) -> None:
        super().__init__()
        self.device, self.enabled = device, enabled

    def forward_context(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if self.enabled else nullcontext()


def planned(setting: Setting, shape: Shape, tokens: int) -> float:
    """GiB of the update according to the plan."""
    flags = {
        "dtype": setting.dtype,
        "bf16": str(setting.autocast).lower(),
        "gradient_checkpointing": str(setting.checkpointing).lower(),
        "optim": setting.optim,
        "use_cpu": str(shape.device == "cpu").lower(),
        **({"use_peft": "true", "lora_target_modules": "all-linear"} if setting.lora else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        shape.config().save_pretrained(folder)
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        plan = make_plan(parse_arguments(["--model_name_or_path", folder, *words]))
    return (plan.fixed + tokens * plan.activation) / 2**30


def measured(part: Part, setting: Setting, shape: Shape) -> Row:
    batch = shape.work()
    model: Any = replace(shape, checkpointing=setting.checkpointing).model(getattr(torch, setting.dtype))
    if setting.lora:
        if setting.checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    make = torch.optim.SGD if setting.optim == "sgd" else torch.optim.AdamW
    optimizer = make(trained, lr=1e-6, **({} if setting.optim == "sgd" else {"fused": True}))
    tokens = 8 * batch.input_ids.shape[1]
    step = GVPOStep(
        model, token_budget=tokens, backend=Autocast(shape.device, setting.autocast), share_prompts=False
    )
    if part.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        step(batch)
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() / 2**30 if part.device == "cuda" else None
    plan = planned(setting, shape, tokens)
    return {"planned GiB": plan, "measured GiB": peak, "planned / measured": peak and plan / peak}


def run(part: Part) -> None:
    known = shapes(part.device, part.tiny)
    for name, setting in SETTINGS.items():
        shape, length = known[setting.shape], 16 if part.tiny else 1024
        shape = replace(
            shape, rows=16, prompt_length=length // 2, mean_length=length // 2, max_length=length // 2,
            heavy_tail=False, zero_groups=0.0,
        )  # fmt: skip
        part.attempt({"setting": name}, lambda setting=setting, shape=shape: measured(part, setting, shape))
