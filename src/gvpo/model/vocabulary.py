"""Gradients of the head and of the input embedding, summed over the micro-batches of a step.

Both matrices are vocabulary × hidden, and autograd would write and add one of that size for every
micro-batch, although a micro-batch looks up few rows of the embedding. Here they gather in one buffer (one
for both where head and embedding are tied) that is handed to autograd in the last micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass
class VocabularyGradients:
    """The sums of one step. Exact as long as its micro-batches are scaled alike (see `loss_scale`).

    Attributes:
        last: whether the micro-batch that is run next is the step's last; set by the caller.
        with_embedding: whether the input embedding's gradient is summed too.
        head, embedding: the buffers; where `tied`, `head` holds both.
        loss_scale: by what the loss is scaled in the backward (as under float16).
        pending: lookups of the last backward (of its micro-batch, and of the prompts that it shares) still
            to come.
    """

    last: bool = False
    with_embedding: bool = True
    tied: bool = False
    head: Float[Tensor, "vocab dim"] | None = None
    embedding: Float[Tensor, "vocab dim"] | None = None
    loss_scale: Float[Tensor, ""] | None = None
    pending: int = 0

    def keep_head(self, total: Float[Tensor, "vocab dim"]) -> Float[Tensor, "vocab dim"] | None:
        """Keep the head's sum for the next micro-batch; returns it for autograd if it is complete."""
        if self.last and not self.tied:
            self.head = None
            return total
        self.head = total
        return None

    def add_embedding(
        self,
        weight: Float[Tensor, "vocab dim"],
        ids: Int[Tensor, "tokens"],
        gradient: Float[Tensor, "tokens dim"],
        last: bool,
    ) -> Float[Tensor, "vocab dim"] | None:
        """Add a micro-batch's gradient of the rows it looked up; returns the sum if it is complete."""
        if not self.tied:
            if self.embedding is None:  # frequent tokens would be lost in a sum in half precision
                wide = torch.promote_types(weight.dtype, torch.float32)
                self.embedding = torch.zeros_like(weight, dtype=wide)
            total = self.embedding.index_add_(0, ids, gradient.to(self.embedding.dtype))
            self.embedding = None if last else total
            return total.to(weight.dtype) if last else None
        assert self.head is not None  # the head's backward comes first
        assert self.loss_scale is not None
        # The head's part is summed unscaled.
        self.head.index_add_(0, ids, gradient.to(self.head.dtype) / self.loss_scale.to(self.head.dtype))
        if not last:
            return None
        total, self.head = self.head.mul_(self.loss_scale.to(self.head.dtype)), None
        return total.to(weight.dtype)


class _LookUp(torch.autograd.Function):
    """Rows of an embedding, whose gradient goes to `VocabularyGradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Float[Tensor, "vocab dim"],
        ids: Int[Tensor, "*tokens"],
        rows: Float[Tensor, "*tokens dim"],
        padding: int | None,
        sums: VocabularyGradients,
    ) -> Float[Tensor, "*tokens dim"]:
        ctx.save_for_backward(weight, ids)
        ctx.padding, ctx.sums, ctx.last = padding, sums, sums.last
        sums.pending += sums.last
        ctx.mark_dirty(rows)  # not a view, which the model could not scale in place
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, ids = ctx.saved_tensors
        ids, gradient = ids.flatten(), gradient.flatten(0, -2)
        if ctx.padding is not None:  # `nn.Embedding` makes no gradient there
            gradient = gradient.masked_fill((ids == ctx.padding)[:, None], 0)
        ctx.sums.pending -= ctx.last
        complete = ctx.last and not ctx.sums.pending
        return ctx.sums.add_embedding(weight, ids, gradient, complete), None, None, None, None


@contextmanager
def embedding_summed(model: Any, sums: VocabularyGradients | None) -> Iterator[None]:
    """While it is open, the gradient of the model's input embedding goes to `sums`, where that can be."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding and not (embedding.sparse or embedding.scale_grad_by_freq)
    if (
        sums is None
        or not sums.with_embedding
        or not plain
        or not embedding.weight.requires_grad
        or isinstance(embedding.weight, DTensor)
    ):
        yield
        return
    adapted = hasattr(head, "get_base_layer")  # its gradient is that of base and adapter together
    sums.tied = not adapted and getattr(head, "weight", None) is embedding.weight

    def sum_gradient(module: nn.Embedding, inputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        looked_up: Tensor = _LookUp.apply(  # type: ignore[no-untyped-call]
            module.weight, inputs[0], rows.detach(), module.padding_idx, sums
        )
        return looked_up

    handle = embedding.register_forward_hook(sum_gradient)
    try:
        yield
    finally:
        handle.remove()
