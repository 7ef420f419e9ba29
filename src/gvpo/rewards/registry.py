"""Reward functions by name, by import path, and in weighted sums."""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo.errors import InputError
from gvpo.rewards import functions
from gvpo.rewards.functions import RewardFunction

REWARDS: dict[str, RewardFunction] = {
    "accuracy": functions.accuracy,
    "exact": functions.exact,
    "format": functions.format,
    "length": functions.length,
    "reasoning_gym": functions.reasoning_gym,
}
_TERM = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?(?P<name>[^\s+*-][^\s+*]*)\s*"
)


def load_reward(spec: str) -> RewardFunction:
    """A reward function from its description.

    Args:
        spec: a name (`accuracy` or `accuracy:sentence`, `exact`, `format`, `length` or `length:512`,
            `reasoning_gym`), a function of
            your own as `module:function`, or a weighted sum of these, `accuracy + 0.2*format`.

    Raises:
        InputError: there is no such name, module or function.
    """
    terms = _terms(spec)
    if len(terms) == 1 and terms[0][0] == 1.0:
        return _load_one(terms[0][1])
    return combine([_load_one(name) for _, name in terms], [weight for weight, _ in terms])


def combine(rewards: Sequence[RewardFunction], weights: Sequence[float]) -> RewardFunction:
    """The weighted sum of reward functions; None for a completion that any of them cannot score.

    Raises:
        InputError: the numbers of functions and weights differ, or there are none.
    """
    if not rewards or len(rewards) != len(weights):
        raise InputError(
            f"there are {len(rewards)} rewards and {len(weights)} weights: give one weight each."
        )

    def weighted(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        scores = [reward(prompts=prompts, completions=completions, **columns) for reward in rewards]
        totals: list[float | None] = []
        for row in zip(*scores, strict=True):
            known = [score for score in row if score is not None]
            whole = len(known) == len(row)
            totals.append(sum(w * s for w, s in zip(weights, known, strict=True)) if whole else None)
        return totals

    weighted.__name__ = "_".join(_name_of(reward) for reward in rewards)
    return weighted


def _name_of(reward: RewardFunction) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))


def _terms(spec: str) -> list[tuple[float, str]]:
    terms: list[tuple[float, str]] = []
    position = 0
    while position < len(spec):
        found = _TERM.match(spec, position)
        if not found or (terms and not found["sign"]):
            break
        weight = float(found["weight"] or 1.0)
        terms.append((-weight if found["sign"] == "-" else weight, found["name"]))
        position = found.end()
    if not terms or position < len(spec):
        raise InputError(
            f"{spec!r} describes no reward: write a name, or a sum such as 'accuracy + 0.2*format'."
        )
    return terms


def _load_one(name: str) -> RewardFunction:
    known, _, argument = name.partition(":")
    if name == "accuracy:sentence":
        return _with(functions.accuracy, closing="sentence")
    if known == "length" and argument:
        if not argument.isdigit() or int(argument) == 0:
            raise InputError(f"{name!r} has no length: write for example length:512.")
        return _with(functions.length, max_length=int(argument))
    if not argument:
        if known in REWARDS:
            return REWARDS[known]
        raise InputError(
            f"there is no reward {name!r}: choose one of {', '.join(sorted(REWARDS))}, or give your own "
            "function as module:function."
        )
    return _import(known, argument, name)


def _with(reward: RewardFunction, **settings: Any) -> RewardFunction:
    return functools.update_wrapper(functools.partial(reward, **settings), reward)


def _import(module_name: str, function_name: str, spec: str) -> RewardFunction:
    # A user's own module lies beside their data, not in an installed package.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"the reward {spec!r} cannot be imported ({error}): check the module's name."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"the module {module_name} has no function {function_name!r}: check the reward {spec!r}."
        )
    if inspect.isclass(function):
        raise InputError(f"the reward {spec!r} is a class: give a function, or an instance of the class.")
    return function
