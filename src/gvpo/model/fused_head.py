"""The language model head fused with a weighted log-likelihood: no logits are kept.

GVPO's weights are known before the gradient pass (see `gvpo.objective`), so the head's gradients can be
made inside its forward, one tile of logits at a time: nothing of the size (tokens × vocabulary) outlives
its tile.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gvpo.model.vocabulary import VocabularyGradients

# What transformers' configurations call the factor, the divisor and the cap of the logits.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISOR = "logits_scaling"
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LOOKS_LIKE_ONE = re.compile("(logit|head|output|vocab).*(cap|scal|multipl|divi|temper)")
_NOT_OF_THE_HEAD = re.compile("attn|attention|router|init|altup|heads")


@dataclass(frozen=True)
class LogitTransform:
    """From the head's linear output z to logits: softcap · tanh(scale · z / softcap) / temperature."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any, temperature: float) -> LogitTransform:
        """Read the transform that a transformers configuration asks for, under its several names."""
        text = config.get_text_config()

        def first(names: tuple[str, ...]) -> float | None:
            return next((v for name in names if (v := getattr(text, name, None)) is not None), None)

        scale = first(_SCALES)
        if scale is None and (divisor := first((_DIVISOR,))) is not None:
            scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
        return cls(temperature, 1.0 if scale is None else scale, first(_SOFTCAPS))

    @staticmethod
    def unknown(config: Any) -> str | None:
        """A setting of the configuration that looks like a cap or a scale of logits and is not known here."""
        for name, value in vars(config.get_text_config()).items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)
            known = name in (*_SCALES, _DIVISOR, *_SOFTCAPS)
            if number and not known and _LOOKS_LIKE_ONE.search(name) and not _NOT_OF_THE_HEAD.search(name):
                return f"{name}={value}"
        return None

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Transform z in place; returns logits, and 1 − tanh² where the transform is not linear."""
        if self.softcap is None:
            return z.mul_(self.slope) if self.slope != 1.0 else z, None
        z.mul_(self.scale / self.softcap).tanh_()
        curvature = z.square().neg_().add_(1.0)
        return z.mul_(self.softcap / self.temperature), curvature

    @property
    def slope(self) -> float:
        return self.scale / self.temperature


@dataclass
class _HeadGrads:
    """Where the gradients of one call gather; None where no gradient is asked for."""

    hidden: Float[Tensor, "tokens dim"] | None
    weight: Float[Tensor, "vocab dim"] | None
    bias: Float[Tensor, "vocab"] | None


class WeightedNLL(torch.autograd.Function):
    """−Σ_t weight_t log p_t over tokens whose weights are known, with gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens dim"],
        weight: Float[Tensor, "vocab dim"],
        bias: Float[Tensor, "vocab"] | None,
        targets: Int[Tensor, "tokens"],
        token_weights: Float[Tensor, "tokens"],
        transform: LogitTransform,
        tile_rows: int,
        sums: VocabularyGradients | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute = _compute_dtype(hidden)
        exact = torch.promote_types(compute, torch.float32)
        w, token_weights = weight.to(compute), token_weights.to(exact)
        grads = _new_grads(ctx.needs_input_grad, hidden, weight, exact, sums)
        logps = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        entropy = torch.empty_like(logps)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), tile_rows):
                rows = slice(start, start + tile_rows)
                h, t, a = hidden[rows].to(compute), targets[rows], token_weights[rows]
                z, curvature = transform(_linear(h, w, bias, exact))
                target_logit, top = z.gather(1, t[:, None])[:, 0], z.amax(1)
                e = z.sub_(top[:, None]).exp_()
                total = e.sum(1)
                log_total = top + total.log()
                logps[rows] = target_logit - log_total
                if curvature is None:
                    expected = _add_linear_tile(grads, rows, e, total, h, w, bias, t, a, transform.slope)
                    entropy[rows] = log_total - expected
                else:
                    p = e.div_(total[:, None])
                    entropy[rows] = torch.special.entr(p).sum(1)
                    _add_curved_tile(grads, rows, p, curvature.mul_(transform.slope), h, w, t, a)
        if sums is not None and grads.weight is not None:
            grads.weight = sums.keep_head(grads.weight)
        ctx.grads, ctx.sums = grads, sums
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(logps, entropy)
        return -(logps * token_weights).sum(), logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The fused head's gradients were already taken: backward works once.")
        # Given away rather than saved, so that autograd can make the head's `.grad` of it without a copy.
        grads = [ctx.grads.hidden, ctx.grads.weight, ctx.grads.bias]
        ctx.grads = None
        if ctx.sums is not None:
            ctx.sums.loss_scale = grad_nll
        for i, dtype in enumerate(ctx.dtypes):
            if (grad := grads[i]) is not None:
                grads[i] = grad.mul_(grad_nll.to(grad.dtype)).to(dtype)
        del grad
        return (*grads, None, None, None, None, None)


def _new_grads(
    needed: tuple[bool, ...],
    hidden: Tensor,
    weight: Tensor,
    exact: torch.dtype,
    sums: VocabularyGradients | None,
) -> _HeadGrads:
    device = hidden.device
    buffer = sums.head if sums is not None and needed[1] else None
    if buffer is None and needed[1]:
        buffer = torch.zeros(weight.shape, dtype=exact, device=device)
    return _HeadGrads(
        torch.empty(hidden.shape, dtype=exact, device=device) if needed[0] else None,
        buffer,
        torch.zeros(len(weight), dtype=exact, device=device) if needed[2] else None,
    )


def _add_linear_tile(
    grads: _HeadGrads,
    rows: slice,
    e: Float[Tensor, "tile vocab"],
    total: Float[Tensor, "tile"],
    h: Float[Tensor, "tile dim"],
    w: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, "vocab"] | None,
    targets: Int[Tensor, "tile"],
    a: Float[Tensor, "tile"],
    slope: float,
) -> Float[Tensor, "tile"]:
    """Gradients a (p − onehot) slope of a tile whose logits are linear in h; returns Σ_v p_v logit_v.

    With p = e / total, the dense part goes through matrix products of the unnormalised tile, and the
    one-hot part is added in `dim` columns instead of `vocab`: no further pass over the tile.
    """
    exact = a.dtype
    e, wide_h = e.to(h.dtype), h.to(exact)
    summed_w = _product(e, w, exact)  # Σ_v e_v w_v, which gives Σ_v e_v logit_v for free
    expected = (summed_w * wide_h).sum(1)
    if bias is not None:
        expected += torch.mv(e.to(exact), bias.to(exact))
    per_row = a * slope / total
    if grads.hidden is not None:
        grads.hidden[rows] = summed_w * per_row[:, None] - w[targets].to(exact) * (a * slope)[:, None]
    if grads.weight is not None:
        _add_product(grads.weight, e, wide_h * per_row[:, None])
        grads.weight.index_add_(0, targets, wide_h * (-a * slope)[:, None])
    if grads.bias is not None:
        grads.bias += torch.mv(e.to(exact).t(), per_row)
        grads.bias.index_add_(0, targets, -a * slope)
    return expected * slope / total


def _add_curved_tile(
    grads: _HeadGrads,
    rows: slice,
    p: Float[Tensor, "tile vocab"],
    slopes: Float[Tensor, "tile vocab"],
    h: Float[Tensor, "tile dim"],
    w: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "tile"],
    a: Float[Tensor, "tile"],
) -> None:
    """Gradients a (p − onehot) slope_v of a tile of soft-capped logits."""
    g = p.mul_(a[:, None])
    g[torch.arange(len(targets), device=g.device), targets] -= a
    g.mul_(slopes)
    if grads.bias is not None:
        grads.bias += g.sum(0)
    g = g.to(h.dtype)
    if grads.hidden is not None:
        grads.hidden[rows] = _product(g, w, a.dtype)
    if grads.weight is not None:
        _add_product(grads.weight, g, h.to(a.dtype))


@torch.no_grad()
def chunked_logps(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, "vocab"] | None,
    targets: Int[Tensor, "tokens"],
    transform: LogitTransform,
    tile_rows: int,
) -> Float[Tensor, "tokens"]:
    """log p of the targets in nats, one tile of logits at a time, without gradient."""
    compute = _compute_dtype(hidden)
    exact = torch.promote_types(compute, torch.float32)
    w = weight.to(compute)
    logps = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), tile_rows):
            rows = slice(start, start + tile_rows)
            z, _ = transform(_linear(hidden[rows].to(compute), w, bias, exact))
            target_logit = z.gather(1, targets[rows, None])[:, 0]
            top = z.amax(1)
            logps[rows] = target_logit - top - z.sub_(top[:, None]).exp_().sum(1).log()
    return logps


def tile_bytes(device: torch.device) -> int:
    """Bytes of a tile's float32 logits that suit a device.

    A CPU keeps a small tile in its cache; on a GPU the sum of the head's gradient, read and written once a
    tile, takes longer than the tile's products unless there are about a thousand rows.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 64
    return 48 << 20


def tile_rows(tokens: int, vocabulary: int, size: int) -> int:
    """Rows of a tile whose float32 logits take `size` bytes."""
    return max(16, min(tokens, size // (4 * vocabulary)))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _linear(h: Tensor, w: Tensor, bias: Tensor | None, exact: torch.dtype) -> Tensor:
    z = _product(h, w.t(), exact)
    return z if bias is None else z.add_(bias.to(exact))


@functools.cache
def widens(device: torch.device, dtype: torch.dtype, adding: bool = False) -> bool:
    """Whether products in half precision can be had (and added up) in float32: CUDA, torch 2.8 or newer."""
    if device.type != "cuda" or dtype.itemsize >= 4:
        return False
    x = torch.ones(16, 32, dtype=dtype, device=device)
    try:
        total = torch.mm(x.t(), x, out_dtype=torch.float32)
        if adding:
            torch.addmm(total, x.t(), x, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == (32 if adding else 16)).all())


def _product(left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """left right in `exact`, rounded to a narrower dtype only where it must be."""
    if widens(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=exact)
    return torch.mm(left, right).to(exact)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, with factors in low precision only where the machine multiplies those faster."""
    if left.dtype == total.dtype or not total.is_cuda:
        total.addmm_(left.to(total.dtype).t(), right)
        return
    left, right = left.t(), right.to(left.dtype)
    if widens(left.device, left.dtype, adding=True):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += _product(left, right, total.dtype)
