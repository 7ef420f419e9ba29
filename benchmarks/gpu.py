"""The head and the step on a GPU: `python -m benchmarks.gpu`. Not run on a GPU yet.

Random weights in bfloat16 at the shapes of Qwen2.5-0.5B and -7B. The fused head is compared with torch's
cross-entropy, and with Liger's and Apple's (cut-cross-entropy) kernels where they are installed; the step
with fine-tuning on the same tokens and with TRL's GRPO step. `--tiny` runs all of it on any device, with
sizes whose figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import RESULTS, Row, minima, show, write
from benchmarks.workloads import (
    GROUP,
    PER_DEVICE,
    Workload,
    floor,
    micro_steps,
    rollout,
    trainer,
    update,
)
from gvpo import gvpo_weights
from gvpo.batch import GroupBatch
from gvpo.model.fused_head import TILE_BYTES, LogitTransform, WeightedNLL

ABOUT = (
    "bfloat16, random weights. Seconds are minima on the wall with the device synchronised; peak GiB is "
    "torch's, over what model and inputs take. MFU counts 6 operations per useful token and parameter that "
    "multiplies (the input embedding does not), so padding, recomputation and zero weights lower it."
)

# Dense bfloat16 operations a second, from the vendor's data sheets.
PEAK_OPERATIONS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Shape(Workload):
    """A Qwen2 model's shape, and responses of reasoning length."""

    key_value_heads: int = 2
    heads: int = 14
    intermediate: int = 4864
    tied: bool = True
    device: str = "cuda"

    def model(self) -> Any:
        torch.manual_seed(self.seed)
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=4 * self.max_length,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            dtype=torch.bfloat16,
        )
        with torch.device(self.device):
            return Qwen2ForCausalLM(config).to(torch.bfloat16)


_LONG: dict[str, Any] = {"rows": 64, "mean_length": 512, "max_length": 2048, "zero_groups": 0.4}
SHAPES = {
    "0.5B": Shape(vocabulary=151_936, hidden=896, layers=24, **_LONG),
    "7B": Shape(
        vocabulary=152_064,
        hidden=3584,
        layers=28,
        heads=28,
        key_value_heads=4,
        intermediate=18_944,
        tied=False,
        **_LONG,
    ),
}


def tiny(shape: Shape, device: str) -> Shape:
    return replace(
        shape,
        vocabulary=97,
        hidden=16,
        layers=1,
        heads=2,
        key_value_heads=1,
        intermediate=32,
        rows=16,
        mean_length=8,
        max_length=24,
        device=device,
    )


def synchronised(job: Callable[[], Any], device: str) -> Callable[[], float]:
    """Seconds of a job on the wall, until the device is done."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run() -> float:
        wait()
        started = time.perf_counter()
        job()
        wait()
        return time.perf_counter() - started

    return run


def peak_gib(job: Callable[[], Any], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def peak_operations() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAK_OPERATIONS.items() if known in name), None)


def heads(shape: Shape, tokens: int) -> dict[str, Callable[[], Any]]:
    """Weighted log-likelihood with its gradients; Liger's has no weights and averages instead."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": shape.device}
    torch.manual_seed(0)
    h = torch.randn(tokens, shape.hidden, **options).requires_grad_()
    w = (torch.randn(shape.vocabulary, shape.hidden, **options) * 0.02).requires_grad_()
    targets = torch.randint(shape.vocabulary, (tokens,), device=shape.device)
    weights = torch.randn(tokens, device=shape.device)
    tile_rows = max(16, min(tokens, TILE_BYTES // (4 * shape.vocabulary)))

    def ours() -> Any:
        arguments = (targets, weights, LogitTransform(), tile_rows, None)
        return torch.autograd.grad(WeightedNLL.apply(h, w, None, *arguments)[0], (h, w))

    def cross_entropy() -> Any:
        nll = F.cross_entropy((h @ w.t()).float(), targets, reduction="none")
        return torch.autograd.grad((nll * weights).sum(), (h, w))

    jobs: dict[str, Callable[[], Any]] = {"gvpo": ours, "torch cross_entropy": cross_entropy}
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        jobs["cut-cross-entropy"] = lambda: torch.autograd.grad(
            (linear_cross_entropy(h, w, targets, reduction="none") * weights).sum(), (h, w)
        )
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearCrossEntropyLoss()
        jobs["liger (mean, no weights)"] = lambda: torch.autograd.grad(liger(w, h, targets), (h, w))
    return jobs


def compare_heads(name: str, shape: Shape, tokens: int, repeats: int) -> list[Row]:
    rows = []
    jobs = heads(shape, tokens)
    best = minima({kind: synchronised(job, shape.device) for kind, job in jobs.items()}, repeats)
    peak = peak_operations()
    for kind, job in jobs.items():
        operations = 6 * tokens * shape.hidden * shape.vocabulary
        rows.append(
            {
                "shape": name,
                "what": f"head: {kind}",
                "s": best[kind],
                "tokens/s": tokens / best[kind],
                "MFU": peak and operations / best[kind] / peak,
                "peak GiB": peak_gib(job, shape.device),
            }
        )
    return rows


def compare_steps(name: str, shape: Shape, repeats: int) -> list[Row]:
    """One kind after the other, since two copies of a large model may not fit."""
    rows: list[Row] = []
    useful = 0
    for kind in ("gvpo", "floor", "trl"):
        made = trainer("trl" if kind == "trl" else "gvpo", shape, use_cpu=shape.device == "cpu")
        if kind == "gvpo":
            batch = rollout(made)
            weights = _weights(batch)
            useful = int(batch.lengths[weights != 0].sum())
        jobs: dict[str, Callable[[], Any]] = {
            "gvpo": lambda made=made: update(made),
            "floor": floor(made.model, batch, weights, PER_DEVICE * batch.input_ids.shape[1]),
            "trl": lambda made=made: micro_steps(made),
        }
        multiplying = sum(p.numel() for p in made.model.parameters())
        if not shape.tied:
            multiplying -= made.model.get_input_embeddings().weight.numel()
        seconds = minima({kind: synchronised(jobs[kind], shape.device)}, repeats)[kind]
        peak = peak_operations()
        rows.append(
            {
                "shape": name,
                "what": f"step: {kind}",
                "s": seconds,
                "tokens/s": useful / seconds,
                "MFU": peak and 6 * multiplying * useful / seconds / peak,
                "peak GiB": peak_gib(jobs[kind], shape.device),
            }
        )
        del made, jobs
    return rows


def _weights(batch: GroupBatch) -> torch.Tensor:
    zeros = torch.zeros(len(batch), dtype=torch.float64, device=batch.rewards.device)
    return gvpo_weights(zeros, zeros, batch.rewards, batch.group_ids)


def main(
    shapes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SHAPES)}; both if none.")] = None,
    tiny_sizes: Annotated[bool, typer.Option("--tiny", help="Any device; figures mean nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for gpu.json.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure the head and the step on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny_sizes:
        raise typer.BadParameter("there is no GPU here; --tiny shows that everything runs")
    if tiny_sizes and output is None:
        raise typer.BadParameter("--tiny needs --output: its figures mean nothing and must replace none")
    rows: list[Row] = []
    for name in shapes or SHAPES:
        if name not in SHAPES:
            raise typer.BadParameter(f"there is no shape {name}; there are {', '.join(SHAPES)}")
        shape = tiny(SHAPES[name], device) if tiny_sizes else SHAPES[name]
        rows += compare_heads(name, shape, 4 * GROUP if tiny_sizes else 8192, repeats)
        rows += compare_steps(name, shape, repeats)
    show(Console(width=160), f"gpu: {ABOUT}", rows)
    write(output or RESULTS, "gpu", ABOUT, rows)


if __name__ == "__main__":
    typer.run(main)
