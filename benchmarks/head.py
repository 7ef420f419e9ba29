"""The head alone: log-likelihood of given tokens and its gradients, in every way at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from trl.kernels import ChunkedLogProbFunction

from benchmarks.measure import Row, in_fresh_process, minima, peak_of, timed
from gvpo.model.fused_head import LogitTransform, WeightedNLL, chunked_logps, tile_bytes, tile_rows

ABOUT = (
    "CPU seconds and MiB above the inputs of a weighted log-likelihood with its gradients to hidden "
    "states and head (float32, one thread). products: the three bare matrix products, which all but nothing "
    "can be faster than. scoring: our log-probabilities without gradient."
)

SHAPES = [(1024, 256, 32_000), (512, 128, 152_000)]


def heads(tokens: int, hidden: int, vocabulary: int) -> dict[str, Callable[[], object]]:
    """What is compared, on the same random inputs."""
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, requires_grad=True)
    w = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_()
    targets, weights = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    rows = tile_rows(tokens, vocabulary, tile_bytes(h.device))

    def gradients(nll: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(nll, (h, w))

    def products() -> None:
        with torch.no_grad():
            z = h @ w.t()
            z @ w
            z.t() @ h

    def ours() -> object:
        arguments = (targets, weights, LogitTransform(), rows, None)
        return gradients(WeightedNLL.apply(h, w, None, *arguments)[0])

    def chunked(outputs: tuple[str, ...]) -> object:
        logps = ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32_768, None, 1.0, outputs)[0]
        return gradients(-(logps * weights).sum())

    def cross_entropy() -> object:
        nll = F.cross_entropy(h @ w.t(), targets, reduction="none")
        return gradients((nll * weights).sum())

    jobs: dict[str, Callable[[], object]] = {
        "products": products,
        "gvpo": ours,
        "torch cross_entropy": cross_entropy,
        "trl chunked head": lambda: chunked(("log_probs",)),
        "trl chunked head, entropy": lambda: chunked(("log_probs", "entropy")),
        "gvpo, scoring": lambda: chunked_logps(h, w, None, targets, LogitTransform(), rows),
    }
    if hasattr(F, "linear_cross_entropy"):
        jobs["torch linear_cross_entropy"] = lambda: gradients(
            (F.linear_cross_entropy(h, w, targets, reduction="none") * weights).sum()
        )
    return jobs


def _peak(shape: tuple[int, int, int], name: str) -> float:
    return peak_of(heads(*shape)[name])


def run(small: bool, repeats: int = 10) -> list[Row]:
    rows: list[Row] = []
    for shape in [(32, 8, 97)] if small else SHAPES:
        jobs = {name: timed(job) for name, job in heads(*shape).items()}
        best = minima(jobs, 1 if small else repeats, seldom={"torch linear_cross_entropy": 3})
        rows += [
            {
                "tokens × hidden × vocabulary": " × ".join(map(str, shape)),
                "head": name,
                "s": seconds,
                "/ products": seconds / best["products"],
                "peak MiB": _peak(shape, name) if small else in_fresh_process(_peak, shape, name),
            }
            for name, seconds in best.items()
        ]
    return rows
