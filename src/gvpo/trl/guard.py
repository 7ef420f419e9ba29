"""Reward functions whose mistakes are reported in one sentence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gvpo.errors import InputError


def guard(reward: Any) -> Any:
    """A reward function whose own errors become one sentence with its name. Reward models pass."""
    if isinstance(reward, str | nn.Module) or not callable(reward):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)

    def explain(error: Exception) -> InputError:
        return InputError(f"Reward function {name} raised {type(error).__name__}: {error}")

    def checked(values: Any, expected: int) -> Any:
        try:
            count = len(values)
        except TypeError:
            raise InputError(
                f"Reward function {name} returned a {type(values).__name__}: return a list with one number "
                "(or None) per completion."
            ) from None
        if count != expected:
            raise InputError(
                f"Reward function {name} returned {count} rewards for {expected} completions: return one "
                "number (or None) per completion."
            )
        return values

    return _wrap(reward, explain, checked)


def _wrap(reward: Callable[..., Any], explain: Callable, checked: Callable) -> Callable[..., Any]:
    target = reward if inspect.isroutine(reward) else type(reward).__call__
    if inspect.iscoroutinefunction(target):

        @functools.wraps(reward)
        async def wrapped_async(*args: Any, **kwargs: Any) -> Any:
            try:
                values = await reward(*args, **kwargs)
            except Exception as error:
                raise explain(error) from error
            return checked(values, len(kwargs["completions"]))

        return wrapped_async

    @functools.wraps(reward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            values = reward(*args, **kwargs)
        except Exception as error:
            raise explain(error) from error
        return checked(values, len(kwargs["completions"]))

    return wrapped
