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
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
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

    def judge(
        self, failed: Bool[Tensor, "all_rows"], first: tuple[str, str], step: int, folder: Path
    ) -> None:
        """Raise an InputError if now more rows of a generation have failed than may, on all processes alike.

        `first` is this process's first failure, `folder` where failures are kept.
        """
        self.rounds.append(failed)
        count, rows = int(torch.cat(self.rounds).sum()), sum(map(len, self.rounds))
        if count > self.tolerated * rows:
            raise InputError(
                f"{first[0] or 'A reward function failed on another process'}: {count} of {rows} "
                f"completions of step {step}, where reward_error_tolerance={self.tolerated:g}; they are kept "
                f"in {folder}.",
                details=first[1],
            )

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
    name = called if environment is None else f"{environment}.get_reward"
    guarded = _Guarded(reward, name, incidents, group, apart=environment is not None)
    if inspect.iscoroutinefunction(inner if inspect.isroutine(inner) else type(inner).__call__):
        if worker or timeout:
            raise InputError(
                f"Reward function {name} is async, which a worker process cannot run: take one away."
            )

        @functools.wraps(reward)
        async def wrapped(**columns: Any) -> list[float | None]:
            return await guarded.awaited(columns)

    else:
        if worker or timeout:
            guarded.worker = RewardWorker(reward, timeout)

        @functools.wraps(reward)
        def wrapped(**columns: Any) -> list[float | None]:
            return guarded.called(columns)

    wrapped.__name__ = name
    return wrapped


@dataclass
class _Guarded:
    reward: Callable[..., Any]
    name: str
    incidents: Incidents
    group: int
    apart: bool  # each row has a call of its own
    worker: RewardWorker | None = None
    hung: float = 0.0  # seconds lost in this generation
    slowest: float = 0.0  # seconds of the longest call that ended

    def called(self, columns: dict[str, Any]) -> list[float | None]:
        values: list[float | None] = [None] * len(columns["completions"])
        self.hung = 0.0
        for rows in self._parts(len(values)):
            self._fill(values, columns, rows)
        return values

    async def awaited(self, columns: dict[str, Any]) -> list[float | None]:
        """Of an async function. A call fails as a whole: parts of it, again, could ask a server for much."""
        values: list[float | None] = [None] * len(columns["completions"])

        async def fill(rows: range) -> None:
            try:
                returned = await self.reward(**_select(columns, rows, len(values)))
            except InputError:
                raise
            except Exception as error:
                for row in rows:
                    self._note(row, columns, error)
            else:
                self._keep(values, columns, rows, returned)

        await asyncio.gather(*map(fill, self._parts(len(values))))
        return values

    def _parts(self, count: int) -> list[range]:
        return [range(i, i + 1) for i in range(count)] if self.apart else [range(count)]

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
        else:
            self._keep(values, columns, rows, returned)

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

    def _keep(self, values: list[float | None], columns: dict[str, Any], rows: range, returned: Any) -> None:
        """Put what the function returned for `rows` in their places, if it is one value each."""
        if isinstance(returned, str | bytes | Real) or not hasattr(returned, "__len__"):
            raise InputError(
                f"Reward function {self.name} returned a {type(returned).__name__}: return a list with one "
                "number (or None) per completion."
            )
        if len(returned) != len(rows):
            raise InputError(
                f"Reward function {self.name} returned {len(returned)} rewards for {len(rows)} completions: "
                "return one number (or None) per completion."
            )
        for row, value in zip(rows, returned, strict=True):
            try:
                number = None if value is None or isinstance(value, str) else float(value)
            except (TypeError, ValueError):
                number = None
            if number is not None and not math.isinf(number):
                values[row] = number
            elif value is not None:
                shown = repr(value)[:80]
                self._note(row, columns, RewardFailure(f"returned {shown}, which is no finite number"))

    def _note(self, row: int, columns: dict[str, Any], error: Exception) -> None:
        if not isinstance(error, RewardFailure):
            trace = "".join(traceback.format_exception(error))
            error = RewardFailure(f"raised {type(error).__name__}: {error}", trace)
        prompts = columns.get("prompts") or [None] * (row + 1)
        what, completion = _FUNCTION + self.name, columns["completions"][row]
        self.incidents.add(row, what, str(error), error.trace, prompts[row], completion)


def _select(columns: dict[str, Any], rows: range, count: int) -> dict[str, Any]:
    """The columns of some rows; what has no value for each row is passed as it is."""
    return {
        key: value[rows.start : rows.stop] if isinstance(value, list) and len(value) == count else value
        for key, value in columns.items()
    }
