"""The language model head: whether it is a linear map, its matrix, and what the model makes of its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# The largest logits of the probes: soft caps bend only large ones, and an untrained head makes small ones.
_SIZES = (8.0, 64.0)


def is_linear(head: Any) -> bool:
    """Whether `head` is an `nn.Linear`, bare or with plain LoRA: no variant (DoRA), no bias, not merged.

    What else adapts a head may be the identity at first and show in no comparison.
    """
    if hasattr(head, "modules_to_save"):  # peft's copy of a head that is trained whole
        adapted = head.active_adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if adapted else head.original_module
    if not hasattr(head, "get_base_layer"):
        return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    plain = hasattr(head, "lora_A") and not head.merged and is_linear(head.get_base_layer())
    return plain and all(_is_plain_lora(head, name) for name in _adapters(head))


def _adapters(head: Any) -> list[str]:
    return [] if head.disable_adapters else [n for n in head.active_adapters if n in head.lora_A]


def _is_plain_lora(head: Any, name: str) -> bool:
    odd = (getattr(head, kind, {}).get(name) for kind in ("lora_variant", "use_dora", "lora_bias"))
    return isinstance(head.lora_A[name], nn.Linear) and not any(odd)


def head_parameters(head: Any) -> tuple[Float[Tensor, "vocab dim"], Float[Tensor, "vocab"] | None]:
    """Weight and bias of a head that `is_linear`, with its LoRA adapters merged, differentiably."""
    if not hasattr(head, "get_base_layer"):
        return head.weight, getattr(head, "bias", None)
    base = head.get_base_layer()
    weight = base.weight
    for name in _adapters(head):
        low_rank = head.lora_B[name].weight @ head.lora_A[name].weight
        weight = weight + low_rank.to(weight.dtype) * head.scaling[name]
    return weight, base.bias


@contextmanager
def probed(head: nn.Module, *, precise: bool) -> Iterator[list[Float[Tensor, "*rows length vocab"]]]:
    """While it is open, the head gets its input at several sizes too, as further rows of the batch.

    What the linear map makes of each call's input is gathered in what is given out; what the model makes of
    it follows in its logits. `precise`: the head is run in float32 at least, outside autocast.
    """
    linear: list[Tensor] = []
    held: list[tuple[nn.Parameter, Tensor]] = []
    autocast: list[tuple[str, bool]] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, kind = inputs[0], inputs[0].device.type
        if precise:
            autocast.append((kind, torch.is_autocast_enabled(kind)))
            torch.set_autocast_enabled(kind, False)
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            for parameter in module.parameters():
                held.append((parameter, parameter.data))
                parameter.data = parameter.data.to(hidden.dtype)
        weight, bias = head_parameters(module)
        top = F.linear(hidden, weight, bias).abs().amax().clamp(min=torch.finfo(hidden.dtype).tiny)
        hidden = torch.cat([hidden, *(hidden[:1] * (size / top) for size in _SIZES)])
        linear.append(F.linear(hidden, weight, bias))
        return (hidden, *inputs[1:])

    def restore(*_: Any) -> None:
        for parameter, data in held:
            parameter.data = data
        for kind, enabled in autocast:
            torch.set_autocast_enabled(kind, enabled)
        held.clear()
        autocast.clear()

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(restore, always_call=True)]
    try:
        yield linear
    finally:
        restore()
        for handle in handles:
            handle.remove()
