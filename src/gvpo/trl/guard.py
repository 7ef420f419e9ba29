"""Reward functions that go wrong: what failed is found, counted, kept, and tolerated or not.

A call that fails is made again for each half of its prompts, down to one group and then one completion, so
that an odd completion costs itself only. Where that loses a worker process, which takes time to start again,
groups and then completions are tried at once; calls that hang cost a few time limits in all. Where more rows
have failed than the run tolerates nothing is tried any more. A wrong number of values is a mistake in the
function, not in a completion, and always stops.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gvpo.errors import InputError
from gvpo.rewards.worker import RewardFailure, RewardTimeout, RewardWorker

# What TRL passes besides columns: objects of this process, which a worker process can't be given.
_OF_THIS_PROCESS = ("trainer_state", "log_extra", "log_metric", "environments")
# Time limits that calls which hang may cost a generation in all, and the share of one that a part gets.
_LIMITS = 4.0
_PART = 1 / 8
_FUNCTION = "Reward function "
_LEAST_SECONDS = 1.0  # a busy machine needs so long for nothing


@dataclass
class Incidents:
    """What went wrong with the rewards of the rows at hand.

    Attributes:
        rows: the rows without a reward that can be trusted.
        first: the first failure in words, and its traceback.
        entries: one record for each failure.
        tolerated: the share of all processes' rows that may fail before the run stops.
        processes: how many there are, each with as many rows.
        rounds: which rows of all processes failed in each round of this generation (`gvpo.trl.dynamic`).
    """

    tolerated: float = 1.0
    processes: int = 1
    rows: set[int] = field(default_factory=set)
    first: tuple[str, str] = ("", "")
    entries: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[Tensor] = field(default_factory=list)

    def add(self, row: int, what: str, why: str, trace: str, prompt: Any, completion: Any) -> None:
        if not self.rows:
            self.first = f"{what} {why}", trace
        self.rows.add(row)
        function = what.removeprefix(_FUNCTION)
        self.entries.append({"function": function, "why": why, "prompt": prompt, "completion": completion})

    def beyond(self, rows: int) -> bool:
        """Whether so many of this process's `rows` failed that the run stops, whatever the others do."""
        return len(self.rows) > self.tolerated * (rows * self.processes + sum(map(len, self.rounds)))

    def drain(self, path: Path, step: int) -> tuple[set[int], tuple[str, str]]:
        """Append the records to a file; return the rows and the first failure, and start anew."""
        lines = [json.dumps({"step": step, **entry}, default=str) + "\n" for entry in self.entries]
        if lines:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:  # of two evils the smaller
                warnings.warn(f"Failures of reward functions cannot be kept ({error}).", stacklevel=2)
        rows, first = self.rows, self.first
        self.rows, self.first, self.entries = set(), ("", ""), []
        return rows, first


def guard(
    reward: Any,
    incidents: Incidents,
    *,
    group: int,
    timeout: float | None = None,
    worker: bool = False,
    environment: str | None = None,
) -> Any:
    """A reward function whose failures go to `incidents`, with None as the reward. Reward models pass.

    Args:
        reward: a function by TRL's protocol, or a model.
        incidents: where failures go.
        group: rows that are tried together after a call on all of them failed.
        timeout: seconds for a call, in a worker process.
        worker: use a worker process without a limit of time, too.
        environment: the kind whose own reward this is. Each is asked once, on its own, async ones at once.
    """
    if isinstance(reward, str | nn.Module) or not callable(reward):
        return reward
    inner = reward
    while isinstance(inner, functools.partial):
        inner = inner.func
    called = getattr(inner, "__name__", type(inner).__name__)
    name, apart = (called, False) if environment is None else (f"{environment}.get_reward", True)
    if inspect.iscoroutinefunction(inner if inspect.isroutine(inner) else type(inner).__call__):
        if worker or timeout:
            raise InputError(
                f"Reward function {name} is async, which a worker process cannot run: take one away."
            )
        return _guard_async(reward, name, incidents, apart)
    guarded = _Guarded(reward, name, incidents, group)
    guarded.apart = apart
    if worker or timeout:
        guarded.worker = RewardWorker(reward, timeout)

    @functools.wraps(reward)
    def wrapped(*args: Any, **columns: Any) -> list[float | None]:
        return guarded(**columns)

    wrapped.__name__ = name
    return wrapped


class _Guarded:
    worker: RewardWorker | None = None
    apart = False

    def __init__(self, reward: Callable[..., Any], name: str, incidents: Incidents, group: int) -> None:
        self.reward, self.name, self.incidents, self.group = reward, name, incidents, group
        self.hung = self.slowest = 0.0  # seconds: lost in this generation, and of the longest call that ended

    def __call__(self, **columns: Any) -> list[float | None]:
        count = len(columns["completions"])
        values: list[float | None] = [None] * count
        self.hung = 0.0
        for rows in _parts(count, self.apart):
            self._fill(values, columns, rows)
        return values

    def _call(self, columns: dict[str, Any], part: bool) -> Any:
        if self.worker is None:
            return self.reward(**columns)
        limit = whole = self.worker.timeout or math.inf
        if part:
            limit = min(whole, max(_PART * whole, _LEAST_SECONDS, 2 * self.slowest))
        if self.hung + limit > _LIMITS * whole:
            raise RewardFailure(f"hung for {self.hung:.3g} s in this generation, and was not tried again")
        started = time.monotonic()
        try:
            columns = {key: value for key, value in columns.items() if key not in _OF_THIS_PROCESS}
            returned = self.worker(columns, limit if self.worker.timeout else None)
        except RewardTimeout:
            self.hung += limit
            raise
        self.slowest = max(self.slowest, time.monotonic() - started)
        return returned

    def _fill(self, values: list[float | None], columns: dict[str, Any], rows: range) -> None:
        """Score `rows`, and on failure parts of them, until more have failed than are tolerated."""
        if self.incidents.beyond(len(values)):
            return
        part = len(rows) < len(values)
        try:
            returned = self._call(_select(columns, rows, len(values)) if part else columns, part)
        except InputError:
            raise
        except Exception as error:
            if len(rows) == 1:
                self._note(rows[0], columns, error)
                return
            unit = self.group if len(rows) > self.group else 1
            lost = self.worker is not None and not self.worker.alive
            size = unit if lost else unit * math.ceil(len(rows) / unit / 2)
            for start in range(rows.start, rows.stop, size):
                self._fill(values, columns, range(start, min(start + size, rows.stop)))
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
        self.incidents.add(row, _FUNCTION + self.name, why, trace, prompts[row], columns["completions"][row])


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


def _parts(count: int, apart: bool) -> list[range]:
    return [range(i, i + 1) for i in range(count)] if apart else [range(count)]


def _guard_async(
    reward: Callable[..., Any], name: str, incidents: Incidents, apart: bool
) -> Callable[..., Any]:
    """A call of an async function fails as a whole: trying parts of it again could ask a server for much."""

    @functools.wraps(reward)
    async def wrapped(*args: Any, **columns: Any) -> list[float | None]:
        count = len(columns["completions"])
        guarded = _Guarded(reward, name, incidents, count)

        async def part(rows: range) -> list[float | None]:
            try:
                returned = await reward(*args, **_select(columns, rows, count))
            except InputError:
                raise
            except Exception as error:
                for row in rows:
                    guarded._note(row, columns, error)
                return [None] * len(rows)
            values = zip(rows, counted(returned, len(rows), name), strict=True)
            return [guarded._number(row, value, columns) for row, value in values]

        parts = await asyncio.gather(*map(part, _parts(count, apart)))
        return [value for values in parts for value in values]

    wrapped.__name__ = name
    return wrapped
