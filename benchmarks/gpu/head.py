"""The head alone at full size: gradients of a weighted log-likelihood, in every way at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from benchmarks.gpu import Part
from benchmarks.gpu.shapes import Shape, shapes, used
from benchmarks.measure import Row
from gvpo.model.fused_head import LogitTransform, WeightedNLL, chunked_logps, tile_bytes, tile_rows

ABOUT = (
    "Weighted log-likelihood of 8,192 tokens with its gradients to hidden states and head, bfloat16. "
    "products: the three bare matrix products, which no exact way does without. Least seconds on the wall"
    " of up to five runs; peak GiB over the inputs. error: of both gradients, relative, against float32. "
    "Liger averages, without weights, so that its error is not comparable."
)
TOKENS = 8192
Job = Callable[[], Any]


class Inputs:
    """Hidden states, head, targets and weights of a shape."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": shape.device}
        torch.manual_seed(0)
        self.h = torch.randn(tokens, shape.hidden, **options).requires_grad_()
        self.w = (torch.randn(shape.vocabulary, shape.hidden, **options) * 0.02).requires_grad_()
        self.targets = torch.randint(shape.vocabulary, (tokens,), device=shape.device)
        self.weights = torch.randn(tokens, device=shape.device)

    def gradients(self, nll: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nll, (self.h, self.w))

    def ours(self, size: int) -> tuple[Tensor, ...]:
        rows = tile_rows(len(self.h), len(self.w), size)
        plain = LogitTransform()
        return self.gradients(
            WeightedNLL.apply(self.h, self.w, None, self.targets, self.weights, plain, rows, None)[0]
        )

    def exact(self, rows: int = 1024) -> tuple[Tensor, Tensor]:
        """Both gradients in float32, a few rows at a time."""
        h, w = self.h.detach().float(), self.w.detach().float()
        of_h, of_w = torch.empty_like(h), torch.zeros_like(w)
        for part in torch.arange(len(h), device=h.device).split(rows):
            g = (h[part] @ w.t()).softmax(-1)
            g[torch.arange(len(part), device=g.device), self.targets[part]] -= 1
            g *= self.weights[part, None]
            of_h[part] = g @ w
            of_w.addmm_(g.t(), h[part])
        return of_h, of_w


def jobs(inputs: Inputs, device: str) -> dict[str, Job]:
    """What is compared; those that are not installed are left out."""
    h, w, targets, weights = inputs.h, inputs.w, inputs.targets, inputs.weights
    usual = tile_bytes(h.device)

    def products() -> None:
        with torch.no_grad():
            z = h @ w.t()
            z @ w
            z.t() @ h

    def trl() -> Any:
        outputs = ("log_probs",)
        logps = ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32_768, None, 1.0, outputs)[0]
        return inputs.gradients(-(logps * weights).sum())

    def cross_entropy() -> Any:
        return inputs.gradients(
            (F.cross_entropy((h @ w.t()).float(), targets, reduction="none") * weights).sum()
        )

    found: dict[str, Job] = {
        "products": products,
        "gvpo": lambda: inputs.ours(usual),
        **{
            f"gvpo, tiles of {size} MiB": lambda size=size: inputs.ours(size << 20)
            for size in (48, 384, 3072)
        },
        "gvpo, scoring": lambda: chunked_logps(
            h, w, None, targets, LogitTransform(), tile_rows(len(h), len(w), usual)
        ),
        "torch cross_entropy": cross_entropy,
        "trl chunked head": trl,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = lambda: inputs.gradients(
            (F.linear_cross_entropy(h, w, targets, reduction="none") * weights).sum()
        )
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda: inputs.gradients(
            (linear_cross_entropy(h, w, targets, reduction="none") * weights).sum()
        )
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        if device == "cuda":
            liger = LigerFusedLinearCrossEntropyLoss()
            found["liger (mean, no weights)"] = lambda: inputs.gradients(liger(w, h, targets))
    except ImportError:
        pass
    return found


def measured(part: Part, inputs: Inputs, exact: tuple[Tensor, Tensor], kind: str, job: Job) -> Row:
    found, tokens = part.seconds(job), len(inputs.h)
    row: Row = {**found, "tokens/s": tokens / found["s"], "MFU": None, "error": None}
    if kind != "gvpo, scoring":
        row["MFU"] = used(6 * tokens * inputs.w.numel(), found["s"])
    got = job()
    if isinstance(got, tuple) and "mean" not in kind:
        apart = sum((g.float() - e).square().sum() for g, e in zip(got, exact, strict=True))
        row["error"] = float((apart / sum(e.square().sum() for e in exact)) ** 0.5)
    return row


def compare(part: Part, name: str, shape: Shape) -> None:
    inputs = Inputs(shape, 32 if part.tiny else TOKENS)
    exact = inputs.exact()
    for kind, job in jobs(inputs, part.device).items():
        row = {"shape": name, "head": kind}
        part.attempt(row, functools.partial(measured, part, inputs, exact, kind, job))


def run(part: Part) -> None:
    for name, shape in shapes(part.device, part.tiny).items():
        with part.surviving({"shape": name}):
            compare(part, name, shape)
