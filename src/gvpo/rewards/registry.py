"""Reward functions by name, by import path, and in weighted sums."""

import functools
import inspect
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo.errors import InputError, refused
from gvpo.rewards import functions
from gvpo.rewards.functions import RewardFunction

REWARDS: dict[str, RewardFunction] = {
    name: getattr(functions, name) for name in ("accuracy", "exact", "format", "length", "reasoning_gym")
}
_SIGNED = r"\s*([+-]%s)\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?([^\s+*-][^\s+*]*)\s*"
_TERM = re.compile(_SIGNED % "?")
_SUM = re.compile(f"{_SIGNED % '?'}(?:{_SIGNED % ''})*")


def load_reward(spec: str) -> RewardFunction:
    """A reward function from its description.

    Args:
        spec: a name (`accuracy` or `accuracy:sentence`, `exact`, `format`, `length` or `length:512`,
            `reasoning_gym`), a function of your own as `module:function`, or a weighted sum of these,
            `accuracy + 0.2*format`.

    Raises:
        InputError: there is no such name, module or function.
    """
    if not _SUM.fullmatch(spec):
        raise InputError(f"{spec!r} describes no reward: write a name, or a sum: 'accuracy + 0.2*format'.")
    signs, weights, names = zip(*_TERM.findall(spec), strict=True)
    factors = [float(sign + (weight or "1")) for sign, weight in zip(signs, weights, strict=True)]
    rewards = [_load_one(name) for name in names]
    return rewards[0] if factors == [1.0] else combine(rewards, factors)


def needs_answers(spec: str) -> bool:
    """Whether a reward by this description reads ground truths."""
    return re.search(r"\b(accuracy|exact)\b", spec) is not None


def combine(rewards: Sequence[RewardFunction], weights: Sequence[float]) -> RewardFunction:
    """The weighted sum of reward functions; None for a completion that any of them cannot score.

    Raises:
        InputError: the numbers of functions and weights differ, or there are none.
    """
    if not rewards or len(rewards) != len(weights):
        raise InputError(f"there are {len(rewards)} rewards and {len(weights)} weights: give one each.")

    def weighted(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        scores = [reward(prompts=prompts, completions=completions, **columns) for reward in rewards]
        return [
            None if None in row else sum(weight * score for weight, score in zip(weights, row, strict=True))  # type: ignore[operator]
            for row in zip(*scores, strict=True)
        ]

    names = (getattr(reward, "__name__", type(reward).__name__) for reward in rewards)
    weighted.__name__ = "_".join(names)
    return weighted


def _load_one(name: str) -> RewardFunction:
    known, _, argument = name.partition(":")
    if name == "accuracy:sentence":
        return _with(functions.accuracy, closing="sentence")
    if known == "length" and argument:
        if not argument.isdigit() or int(argument) == 0:
            raise InputError(f"{name!r} has no length: write for example length:512.")
        return _with(functions.length, max_length=int(argument))
    if argument:
        return load_function(name)
    if known not in REWARDS:
        names = ", ".join(sorted(REWARDS))
        raise InputError(f"there is no reward {name!r}: choose one of {names}, or your own module:function.")
    return REWARDS[known]


def _with(reward: RewardFunction, **settings: Any) -> RewardFunction:
    return functools.update_wrapper(functools.partial(reward, **settings), reward)


def load_function(spec: str, what: str = "reward") -> Any:
    """What `module:function` names; for an `environment` a class will do.

    Raises:
        InputError: it cannot be imported, or cannot be called.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a user's own module lies beside their data, not in an installed package
    try:
        with refused(f"the {what} {spec!r} cannot be imported", "check its names"):
            function = pkgutil.resolve_name(spec)
    finally:
        sys.path.remove(here)
    if (inspect.isclass(function) and what != "environment") or not callable(function):
        raise InputError(f"the {what} {spec!r} is no function: give a function, or an instance of a class.")
    return function
