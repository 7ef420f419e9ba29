"""Reward functions that go wrong: what failed is found, counted, kept, and tolerated or not.

A call that raises, hangs or dies is made again for each prompt's group alone, and then for each completion of
the groups that fail, so that one odd completion costs itself only. A wrong number of values is a mistake in
the function, not in a completion, and always stops.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from gvpo.errors import InputError
from gvpo.rewards.worker import RewardFailure, RewardWorker

# What TRL passes besides columns: objects of this process, which a worker process can't be given.
_OF_THIS_PROCESS = ("trainer_state", "log_extra", "log_metric", "environments")


@dataclass
class Incidents:
    """What went wrong with the rewards of the rows at hand.

    Attributes:
        rows: the rows without a reward that can be trusted.
        first: the first failure in words, and its traceback.
        entries: one record for each failure.
    """

    rows: set[int] = field(default_factory=set)
    first: tuple[str, str] = ("", "")
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: int, function: str, why: str, trace: str, prompt: Any, completion: Any) -> None:
        if not self.rows:
            self.first = f"Reward function {function} {why}", trace
        self.rows.add(row)
        self.entries.append({"function": function, "why": why, "prompt": prompt, "completion": completion})

    def drain(self, path: Path, step: int) -> tuple[set[int], tuple[str, str]]:
        """Append the records to a file; return the rows and the first failure, and start anew."""
        if self.entries:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                for entry in self.entries:
                    file.write(json.dumps({"step": step, **entry}, default=str) + "\n")
        rows, first = self.rows, self.first
        self.rows, self.first, self.entries = set(), ("", ""), []
        return rows, first


def guard(
    reward: Any, incidents: Incidents, *, group: int, timeout: float | None = None, worker: bool = False
) -> Any:
    """A reward function whose failures go to `incidents`, with None as the reward. Reward models pass.

    Args:
        reward: a function by TRL's protocol, or a model.
        incidents: where failures go.
        group: rows that are tried together after a call on all of them failed.
        timeout: seconds for a call, in a worker process.
        worker: use a worker process without a limit of time, too.
    """
    if isinstance(reward, str | nn.Module) or not callable(reward):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)
    if inspect.iscoroutinefunction(reward if inspect.isroutine(reward) else type(reward).__call__):
        if worker or timeout:
            raise InputError(
                f"Reward function {name} is async, which a worker process cannot run: take one away."
            )
        return _guard_async(reward, name, incidents)
    call = _in_worker(reward, timeout) if worker or timeout else reward
    guarded = _Guarded(call, name, incidents, group)

    @functools.wraps(reward)
    def wrapped(*args: Any, **columns: Any) -> list[float | None]:
        return guarded(**columns)

    wrapped.__name__ = name
    return wrapped


def _in_worker(reward: Callable[..., Any], timeout: float | None) -> Callable[..., Any]:
    worker = RewardWorker(reward, timeout)

    def call(**columns: Any) -> Any:
        return worker(**{k: v for k, v in columns.items() if k not in _OF_THIS_PROCESS})

    return call


class _Guarded:
    def __init__(self, call: Callable[..., Any], name: str, incidents: Incidents, group: int) -> None:
        self.call, self.name, self.incidents, self.group = call, name, incidents, group

    def __call__(self, **columns: Any) -> list[float | None]:
        count = len(columns["completions"])
        values: list[float | None] = [None] * count
        self._fill(values, columns, range(count), (self.group, 1))
        return values

    def _fill(
        self, values: list[float | None], columns: dict[str, Any], rows: range, finer: tuple[int, ...]
    ) -> None:
        """Score `rows`, and on failure parts of them of the first of the `finer` sizes."""
        mine = columns if len(rows) == len(values) else _select(columns, rows, len(values))
        try:
            returned = self.call(**mine)
        except InputError:
            raise
        except Exception as error:
            sizes = [size for size in finer if size < len(rows)]
            if sizes:
                for start in range(rows.start, rows.stop, sizes[0]):
                    part = range(start, min(start + sizes[0], rows.stop))
                    self._fill(values, columns, part, tuple(sizes[1:]))
                return
            for row in rows:
                self._note(row, columns, error)
            return
        for row, value in zip(rows, counted(returned, len(rows), self.name), strict=True):
            values[row] = self._number(row, value, columns)

    def _number(self, row: int, value: Any, columns: dict[str, Any]) -> float | None:
        if value is None:
            return None
        try:
            number = float(value) if not isinstance(value, str) else None
        except (TypeError, ValueError):
            number = None
        if number is None or math.isinf(number):
            shown = repr(value)[:80]
            self._note(row, columns, RewardFailure(f"returned {shown}, which is no finite number"))
            return None
        return number

    def _note(self, row: int, columns: dict[str, Any], error: Exception) -> None:
        failure = isinstance(error, RewardFailure)
        why = str(error) if failure else f"raised {type(error).__name__}: {error}"
        trace = (
            error.trace if isinstance(error, RewardFailure) else "".join(traceback.format_exception(error))
        )
        prompts = columns.get("prompts") or [None] * (row + 1)
        self.incidents.add(row, self.name, why, trace, prompts[row], columns["completions"][row])


def _select(columns: dict[str, Any], rows: range, count: int) -> dict[str, Any]:
    """The columns of some rows; what has no value for each row is passed as it is."""
    return {
        key: value[rows.start : rows.stop] if isinstance(value, list) and len(value) == count else value
        for key, value in columns.items()
    }


def counted(values: Any, expected: int, name: str) -> Sequence[Any]:
    """`values`, if they are as many as there are completions.

    Raises:
        InputError: they are not.
    """
    if isinstance(values, str | bytes | Real) or not hasattr(values, "__len__"):
        raise InputError(
            f"Reward function {name} returned a {type(values).__name__}: return a list with one number (or "
            "None) per completion."
        )
    if len(values) != expected:
        raise InputError(
            f"Reward function {name} returned {len(values)} rewards for {expected} completions: return one "
            "number (or None) per completion."
        )
    return values  # type: ignore[no-any-return]


def _guard_async(reward: Callable[..., Any], name: str, incidents: Incidents) -> Callable[..., Any]:
    """An async function fails as a whole: trying parts of it again could ask a server for much."""

    @functools.wraps(reward)
    async def wrapped(*args: Any, **columns: Any) -> list[float | None]:
        count = len(columns["completions"])
        guarded = _Guarded(reward, name, incidents, count)
        try:
            returned = await reward(*args, **columns)
        except InputError:
            raise
        except Exception as error:
            for row in range(count):
                guarded._note(row, columns, error)
            return [None] * count
        return [guarded._number(i, value, columns) for i, value in enumerate(counted(returned, count, name))]

    return wrapped
