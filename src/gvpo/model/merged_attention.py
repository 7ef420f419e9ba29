"""Attention of rows to one copy of their prompt's keys and to their own, merged by log-sum-exp.

No key is copied for a row, and none is masked: a prompt's rows ask their queries together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_aten = torch.ops.aten


class MergedAttention(torch.autograd.Function):
    """Causal attention of rows to themselves and to their prompts, merged by log-sum-exp.

    Backward is that of each part, given the merged output and log-sum-exp: the softmax of all keys is then
    exp(score − log-sum-exp) in both (as in ring attention).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "rows heads width dim"],
        k: Float[Tensor, "rows kv_heads width dim"],
        v: Float[Tensor, "rows kv_heads width dim"],
        keys: Float[Tensor, "prompts kv_heads length dim"],
        values: Float[Tensor, "prompts kv_heads length dim"],
        rows: Any,  # the `gvpo.model.shared_prompts.Continuation`
        layer: int,
        scale: float,
    ) -> Float[Tensor, "rows heads width dim"]:
        groups = q.shape[1] // k.shape[1]
        out, lse, flash = _flash(q, _repeat(k, groups), _repeat(v, groups), True, scale)
        flashes = [flash]
        for start, end, prompt in rows.runs:
            part, length = slice(start, end), rows.cache.lengths[prompt]
            fold = _Fold(q[part], groups)
            its_k, its_v = keys[prompt : prompt + 1, :, :length], values[prompt : prompt + 1, :, :length]
            of_prompt, its_lse, flash = _flash(fold(q[part]), its_k, its_v, False, scale)
            flashes.append(flash)
            of_prompt, its_lse = fold.undo(of_prompt), fold.undo(its_lse)
            total = torch.logaddexp(lse[part], its_lse)
            share = (its_lse - total).exp()[..., None].to(out.dtype)
            out[part] = torch.lerp(out[part], of_prompt, share)
            lse[part] = total
        ctx.save_for_backward(q, k, v, keys, values, out, lse)
        ctx.rows, ctx.layer, ctx.scale, ctx.flashes = rows, layer, scale, flashes
        return out

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Any, ...]:
        q, k, v, keys, values, out, lse = ctx.saved_tensors
        rows, cache, groups = ctx.rows, ctx.rows.cache, q.shape[1] // k.shape[1]
        own, *flashes = ctx.flashes
        of_q, of_k, of_v = own(of_out, q, _repeat(k, groups), _repeat(v, groups), out, lse)
        needed = cache.kept[ctx.layer][0].requires_grad or cache.kept[ctx.layer][1].requires_grad
        for (start, end, prompt), flash in zip(rows.runs, flashes, strict=True):
            part, length = slice(start, end), cache.lengths[prompt]
            fold = _Fold(q[part], groups)
            one = (slice(prompt, prompt + 1), slice(None), slice(length))
            folded = [fold(x[part]) for x in (of_out, q, out, lse)]
            its_q, its_k, its_v = flash(*folded[:2], keys[one], values[one], *folded[2:])
            of_q[part] += fold.undo(its_q)
            if needed:
                for total, gradient in zip(cache.summed(ctx.layer), (its_k, its_v), strict=True):
                    total[one] += gradient
        of_prompts = cache.handed_over(ctx.layer, rows.last) if needed else (None, None)
        return of_q, _reduce(of_k, groups), _reduce(of_v, groups), *of_prompts, None, None, None


class _Fold:
    """Rows of one prompt as one row of queries, each key's heads together: (1, kv_heads, queries, …)."""

    def __init__(self, q: Float[Tensor, "rows heads width dim"], groups: int) -> None:
        self.shape = len(q), q.shape[1] // groups, groups, q.shape[2]

    def __call__(self, x: Float[Tensor, "rows heads width *dim"]) -> Float[Tensor, "1 kv_heads queries *dim"]:
        rows, kv_heads, groups, width = self.shape
        x = x.unflatten(1, (kv_heads, groups)).transpose(0, 1)
        return x.reshape(1, kv_heads, rows * groups * width, *x.shape[4:])

    def undo(self, x: Float[Tensor, "1 kv_heads queries *dim"]) -> Float[Tensor, "rows heads width *dim"]:
        rows, kv_heads, groups, width = self.shape
        x = x.view(kv_heads, rows, groups, width, *x.shape[3:]).transpose(0, 1)
        return x.reshape(rows, kv_heads * groups, width, *x.shape[4:])


def _flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Attention's output, its log-sum-exp, and its backward: (gradient, q, k, v, output, log-sum-exp) → …"""
    if not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return out, lse, lambda *x: backward(*x, 0.0, causal, scale=scale)
    out, lse, *state, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, scale=scale
    )
    on_gpu = _aten._scaled_dot_product_flash_attention_backward
    return out, lse, lambda *x: on_gpu(*x, *state, 0.0, causal, seed, offset, scale=scale)


def _repeat(
    x: Float[Tensor, "rows kv_heads width dim"], groups: int
) -> Float[Tensor, "rows heads width dim"]:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _reduce(
    x: Float[Tensor, "rows heads width dim"], groups: int
) -> Float[Tensor, "rows kv_heads width dim"]:
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)
