"""Generation that reads each distinct prompt once, however many responses it gets.

The k responses of a group have the prompt in common. `model.generate` would run it k times; here it is run
once, and the cache is repeated. Everything else (sampling, stopping, processors) stays that of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gvpo.model.determinism import without_noise

_SHARED = {"input_ids", "attention_mask", "generation_config", "disable_compile"}


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
) -> DynamicCache | None:
    """The cache of all but the last token of left-padded prompts, each distinct one run once.

    Given to `model.generate` as `past_key_values`, it changes nothing but the time. None where it would save
    nothing (no prompt comes twice, or has one token), or the model's cache is not one of keys and values.
    """
    rows = torch.stack([input_ids.masked_fill(attention_mask == 0, -1), attention_mask], dim=1)
    distinct, where = torch.unique(rows, dim=0, return_inverse=True)
    if len(distinct) == len(rows) or input_ids.shape[1] < 2:
        return None
    cache = DynamicCache(config=model.config)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    mask = distinct[:, 1]
    # As `generate` counts positions: from the first token that is not padding.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with without_noise(model):
        model(
            input_ids=distinct[:, 0, :-1].clamp(min=0),
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    cache.batch_select_indices(where)
    return cache


@contextmanager
def shared_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Within this context `model.generate` prefills each distinct prompt once.

    It does so for plain sampling or greedy search from left-padded token ids; any other call, and calls with
    arguments that may act on the prompt's forward, are what they were. Not for ranks whose forwards are
    collective (FSDP, ZeRO-3): they must make equally many, and not all may hold a prompt twice.
    """
    instance, plain = vars(model), model.generate
    before = {name: instance[name] for name in ("generate",) if name in instance}

    def generate(*args: Any, **kwargs: Any) -> Any:
        if not args and _can_share(model, kwargs):
            cache = prefill(model, kwargs["input_ids"], kwargs["attention_mask"])
            if cache is not None:
                kwargs["past_key_values"] = cache
        return plain(*args, **kwargs)

    instance["generate"] = generate
    try:
        yield
    finally:
        del instance["generate"]
        instance.update(before)


def _can_share(model: Any, kwargs: dict[str, Any]) -> bool:
    given = {name for name, value in kwargs.items() if value is not None}
    if not {"input_ids", "attention_mask"} <= given <= _SHARED:
        return False
    config = kwargs.get("generation_config") or model.generation_config
    plain = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
    return (
        plain
        and config.use_cache is not False
        and config.cache_implementation is None
        and not config.prefill_chunk_size
        and not model.config.is_encoder_decoder
        and not hasattr(model.config, "vision_config")  # which may count positions in another way
    )
