"""Prompts read once: k responses of a group attend to one copy of their prompt's keys and values.

A row is cut before the last token of its prompt. What comes before is run through the model once for all rows
that begin with it, and each layer's keys and values K are kept. The rest of the row (the prompt's last token,
which predicts the completion's first, and the completion) attends to K and to itself. With L = Σ_m L_m over
micro-batches,

    dL/dθ = Σ_m ∂L_m/∂θ |_K  +  (Σ_m ∂L_m/∂K) · dK/dθ

so any micro-batches will do: they see K as given, their ∂L_m/∂K are summed, and the last one takes the sum on
through the prompts' own graph, in one backward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gvpo.images import Images
from gvpo.model.balance import Routing
from gvpo.model.merged_attention import MergedAttention
from gvpo.model.vocabulary import VocabularyGradients
from gvpo.packing import START_COST

_NAME = "gvpo_shared_prompts"


class PromptCache:
    """Keys and values of some prompts at every layer, and the sums of their gradients over micro-batches.

    Given to a model as a request (see `gvpo.model.logprobs.prepare_model`) with right-padded prompts, it
    reads them: its attention is the model's own, and keeps what it sees.

    Args:
        lengths: tokens of each prompt.
        original: the model's own attention implementation.
        merged: attend to prompt and own keys apart and merge by their log-sum-exp, without copying a key.
            Otherwise each row gets a copy of its prompt's keys, for the model's own attention. (Layers whose
            window or soft cap needs that get it anyway.)
        sums: of the vocabulary's gradients, in a gradient pass.
    """  # No dataclass, which FSDP2 would copy for every layer.

    def __init__(
        self, lengths: list[int], original: str, merged: bool = True, sums: VocabularyGradients | None = None
    ) -> None:
        self.lengths, self.original, self.merged, self.sums = lengths, original, merged, sums
        self.routing: Routing | None = None  # of a mixture of experts whose load is balanced
        self.images: Images | None = None  # of the prompts
        self.blocks: Tensor | None = None  # `Images.blocks` of them
        self.shifts = [0] * len(lengths)  # by which positions after a prompt are not its length
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of each layer
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden: Tensor | None = None  # what the forward ended with

    @property
    def shared_prompts(self) -> PromptCache:
        return self

    @property
    def masking(self) -> str:
        """The attention implementation for masks of any kind."""
        return "eager" if self.original == "eager" else "sdpa"

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        # Recomputed by gradient checkpointing, keys must stay those that the completions saw.
        self.kept.setdefault(layer.layer_idx, (k, v))
        window, mask = _window(layer, kwargs), None
        narrow = window is not None and window < q.shape[2]
        if self.blocks is not None or narrow or self.original == "eager":
            mask = _mask(q, q.new_zeros(len(q), dtype=torch.long), 0, window, self.blocks)
        implementation = self.original if self.blocks is None else self.masking
        return _own_attention(implementation, layer, q, k, v, mask, **kwargs)

    def score(self, output: Any, head: nn.Module) -> Tensor:
        shifts = getattr(output, "rope_deltas", None)
        if self.images is not None and shifts is not None:  # without images it is that of an earlier call
            self.shifts = shifts.flatten().tolist()
        hidden: Tensor = output.last_hidden_state
        return hidden

    def read(
        self, model: nn.Module, input_ids: Int[Tensor, "prompts length"], images: Images | None = None
    ) -> None:
        """Run the prompts through a model; attention must be that of `attention_shared`."""
        more = {} if images is None else images.arguments(range(len(input_ids)), input_ids)
        if images is not None and more:
            self.images, self.blocks = images, images.blocks(input_ids)
        self.hidden = model(input_ids=input_ids, gvpo=self, **more)

    def clear(self) -> None:
        """Let go of the memory, whoever still holds the cache."""
        self.kept.clear()
        self.gradients.clear()
        self.hidden = self.routing = self.images = self.blocks = None

    def summed(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where the gradients of a layer's keys and values add up: float32 or wider."""
        if layer not in self.gradients:
            k, v = self.kept[layer]
            wide = torch.promote_types(k.dtype, torch.float32)
            self.gradients[layer] = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        return self.gradients[layer]

    def handed_over(self, layer: int, last: bool) -> tuple[Tensor | None, Tensor | None]:
        """The sums of a layer, of which the prompts' graph is to make gradients in the last micro-batch."""
        if not last:
            return None, None
        (k, v), (of_k, of_v) = self.kept[layer], self.summed(layer)
        del self.gradients[layer]
        return of_k.to(k.dtype), of_v.to(v.dtype)


class Continuation:
    """Rows that go on after prompts of a cache.

    Args:
        cache: of the prompts.
        prompt_of: each row's prompt in the cache, None for rows that have none; rows of one prompt adjacent.
        last: whether no other rows of the cache follow: these carry the prompts' graph.
    """

    def __init__(self, cache: PromptCache, prompt_of: list[int | None], last: bool) -> None:
        self.cache, self.prompt_of, self.last = cache, prompt_of, last
        self.runs: list[tuple[int, int, int]] = []  # rows from, to, and their prompt
        self._copied: dict[int | None, tuple[Tensor, int, Tensor]] = {}
        end = 0
        for prompt, same in groupby(prompt_of):
            start, end = end, end + len(list(same))
            if prompt is not None:
                self.runs.append((start, end, prompt))

    def lengths(self, device: torch.device) -> Int[Tensor, "rows"]:
        return torch.tensor(
            [0 if p is None else self.cache.lengths[p] for p in self.prompt_of], device=device
        )

    def positions(self, input_ids: Int[Tensor, "rows width"]) -> Int[Tensor, "rows width"]:
        device = input_ids.device
        shifts = [0 if p is None else self.cache.shifts[p] for p in self.prompt_of]
        begin = self.lengths(device) + torch.tensor(shifts, device=device)
        return begin[:, None] + torch.arange(input_ids.shape[1], device=device)

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        index, window = layer.layer_idx, _window(layer, kwargs)
        keys, values = self.cache.kept[index]
        if not self.last:  # only the last micro-batch goes on through their graph
            keys, values = keys.detach(), values.detach()
        plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None and not kwargs.get("dropout")
        fits = window is None or window >= max(self.cache.lengths) + q.shape[2]
        if self.cache.merged and plain and fits and q.shape[-1] == v.shape[-1]:
            scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
            attended: Tensor = MergedAttention.apply(q, k, v, keys, values, self, index, scale)  # type: ignore[no-untyped-call]
            return attended.transpose(1, 2)
        k, v, keys, values = _Summed.apply(k, v, keys, values, self, index)  # type: ignore[no-untyped-call]
        if window not in self._copied:  # once for all layers that have this window
            lengths = self.lengths(q.device)
            longest = int(lengths.max())
            rows = torch.tensor([p or 0 for p in self.prompt_of], device=q.device)
            self._copied[window] = rows, longest, _mask(q, lengths, longest, window)
        rows, longest, mask = self._copied[window]
        k = torch.cat([keys[rows, :, :longest], k], 2)
        v = torch.cat([values[rows, :, :longest], v], 2)
        return _own_attention(self.cache.masking, layer, q, k, v, mask, **kwargs)


class _Summed(torch.autograd.Function):
    """Keys and values as they are; the gradients of those of prompts are summed in their cache."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Continuation, layer: int
    ) -> tuple[Tensor, ...]:
        ctx.rows, ctx.layer = rows, layer
        return k.view_as(k), v.view_as(v), keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(ctx: Any, of_k: Tensor, of_v: Tensor, *of_prompts: Tensor) -> tuple[Any, ...]:
        cache = ctx.rows.cache
        for total, part in zip(cache.summed(ctx.layer), of_prompts, strict=True):
            total += part
        return of_k, of_v, *cache.handed_over(ctx.layer, ctx.rows.last), None, None


def _mask(
    q: Tensor,
    lengths: Int[Tensor, "rows"],
    prefix: int,
    window: int | None,
    blocks: Int[Tensor, "rows width"] | None = None,
) -> Float[Tensor, "rows 1 width keys"]:
    """0 where a row's own tokens may look, −∞ elsewhere; keys are `prefix` padded ones and then its own.

    Tokens of one block (of `blocks`, from 0 on) see each other, later ones too.
    """
    own = torch.arange(q.shape[2], device=q.device)
    before = torch.arange(prefix, device=q.device).expand(len(lengths), -1)
    position = lengths[:, None] + own
    keys = torch.cat([before.masked_fill(before >= lengths[:, None], sys.maxsize), position], 1)
    distance = position[:, :, None] - keys[:, None]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if blocks is not None:
        seen = seen | ((blocks[:, :, None] == blocks[:, None]) & (blocks >= 0)[:, None])
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, torch.finfo(q.dtype).min)[:, None]


def _window(layer: Any, kwargs: dict[str, Any]) -> int | None:
    window = kwargs.get("sliding_window")
    kinds = getattr(layer.config, "layer_types", None)
    if window is None and kinds is not None and kinds[layer.layer_idx] == "sliding_attention":
        window = layer.config.sliding_window
    return window


def _own_attention(implementation: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the model would have called."""
    if implementation == "eager":
        attention = sys.modules[type(layer).__module__].eager_attention_forward
    else:
        attention = _registry()[implementation]
    out: Tensor = attention(layer, *args, **kwargs)[0]
    return out


def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: PromptCache | Continuation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if shared_prompts is None:
        raise RuntimeError(f"{type(layer).__name__} does not hand its arguments on to its attention")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as it would for scaled_dot_product_attention
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    return shared_prompts.attend(layer, query, key, value, **kwargs), None


def _registry() -> Any:
    # Imported here because a step without a model of transformers needs none.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    return ALL_ATTENTION_FUNCTIONS


def token_weight(model: Any) -> float:
    """Memory that a shared token takes in a gradient pass, in tokens of a row.

    More than one by the gradients of its keys and values. With gradient checkpointing, little else is kept
    of a token but what goes into each layer.
    """
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    groups: float = heads / (getattr(config, "num_key_value_heads", None) or heads)
    return 1 + 4 / groups if model.is_gradient_checkpointing else 1 + 0.1 / groups


def prompt_cost(model: Any) -> float:
    """What attending to one more prompt costs a micro-batch, in tokens of work.

    They are calls, as many for any width: on a CPU 50 tokens' work under a model of width 64; on an H100
    5,000 to 5,300 tokens' under one of width 896 (`docs/gpu.md`), where that grows with the width squared.
    """
    width = float(model.config.get_text_config().hidden_size)
    return 4.2e9 / width**2 if next(model.parameters()).is_cuda else 3200 / width


def start_cost(model: Any) -> float:
    """What one more micro-batch costs, in tokens of work: on a GPU calls again, 3.4 ms a layer seen."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    width = getattr(text, "hidden_size", None)
    if width is None or not next(model.parameters()).is_cuda:
        return START_COST
    return 9e9 / float(width) ** 2


@contextmanager
def attention_shared(model: Any) -> Iterator[str]:
    """While it is open (backward included), attention is that of `PromptCache` and `Continuation`.

    Yields the name of the model's own implementation.
    """
    _registry()
    config = model.config.get_text_config()  # vision has attention of its own
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield before
    finally:
        config._attn_implementation = before
