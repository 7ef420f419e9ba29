"""The policy is the model as it samples: without dropout, jitter or any other noise of training.

θ = θ' after a rollout, and S is the same in scoring and updating, only if a forward is a function of the
weights and the tokens alone. Evaluation mode makes it so, whatever a model calls its noise; what is random
even there is found here by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_NOISE = re.compile("drop|jitter|noise")


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Forwards and backwards as in evaluation mode; every module's own mode comes back afterwards.

    Modules that checkpoint gradients do so in train mode only and stay in it: their own noise, in attributes
    and in their configuration, is zeroed instead.
    """
    modes = [(module, module.training) for module in model.modules()]
    zeroed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, training in modes:
            module.training = training and bool(getattr(module, "gradient_checkpointing", False))
            if module.training:
                for owner in (module, getattr(module, "config", module)):
                    values: dict[str, Any] = owner if isinstance(owner, dict) else vars(owner)
                    noise = [n for n, v in values.items() if isinstance(v, float) and _NOISE.search(n)]
                    zeroed += [(values, name, values[name]) for name in noise]
                    values.update(dict.fromkeys(noise, 0.0))
        yield
    finally:
        for values, name, value in reversed(zeroed):
            values[name] = value
        for module, training in modes:
            module.training = training


def is_reentrant(model: nn.Module) -> bool:
    """Whether gradients are checkpointed so that nothing inside of a layer has a graph."""
    return any(
        getattr(m, "gradient_checkpointing", False)
        and getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        for m in model.modules()
    )


@torch.no_grad()
def random_module(model: nn.Module, run: Callable[[], object]) -> str:
    """The innermost module that gave two outputs for the same input in two calls of `run`, by name."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    calls: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, _tensors((args, kwargs)), _tensors(output)))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in names]
    try:
        run()
        first, calls = calls, []
        run()
    finally:
        for handle in handles:
            handle.remove()
    for (module, inputs, outputs), (_, inputs_again, outputs_again) in zip(first, calls, strict=False):
        if _same(inputs, inputs_again) and not _same(outputs, outputs_again):
            return f"{names[module]} ({type(module).__name__})"
    return "something outside its modules' outputs"


def apart(a: Float[Tensor, "tokens"], b: Float[Tensor, "tokens"]) -> float:
    """Mean |a − b| in nats a token. Where a is not finite there is nothing to compare: the step says so."""
    difference = (a - b)[a.isfinite()].abs()
    return float(difference.mean()) if difference.numel() else 0.0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
