"""Tools, environments and rollout functions that hang, raise, or return what does not fit together."""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

from gvpo.errors import InputError


class _Overdue(BaseException):
    """Ends a call; not an `Exception`, which the call might take for its own."""


def limited(call: Callable[..., Any], seconds: float | None) -> Callable[..., Any]:
    """`call`, which raises a TimeoutError after `seconds`; a coroutine function stays one.

    A plain function is interrupted by a signal: that ends what waits and what runs in Python, but not a
    computation in C that never comes back to Python.

    Raises:
        InputError: no signal can be had here: not the main thread, or not Unix.
    """
    if seconds is None:
        return call
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        raise InputError(
            f"tool_timeout={seconds:g} needs the main thread of a Unix process: leave it out here, and give "
            "the tools limits of their own."
        )
    late = f"{getattr(call, '__name__', 'the tool')} took longer than {seconds:g} s"

    if inspect.iscoroutinefunction(call):

        @functools.wraps(call)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            try:
                return await asyncio.wait_for(call(*args, **kwargs), seconds)
            except TimeoutError:
                raise TimeoutError(late) from None

        return awaited

    @functools.wraps(call)
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        running = True

        def stop(*_: Any) -> None:
            if running:
                raise _Overdue

        handler = signal.signal(signal.SIGALRM, stop)
        timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            try:
                return call(*args, **kwargs)
            finally:
                running = False
        except _Overdue:
            raise TimeoutError(late) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)

    return interrupted


class Environments:
    """Makes the instances of environment classes: methods within a limit of time, resets watched.

    TRL lists an environment's methods by its class and calls those of the instance, which are replaced here.
    An environment that cannot be reset costs its own episode, not the run.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._failed: dict[int, Exception] = {}  # by instance, which TRL keeps and uses again

    def made_by(self, factory: Any) -> Any:
        """TRL's `environment_factory` (a callable, or several by name) whose instances are looked after."""
        if isinstance(factory, dict):
            return {name: self.made_by(one) for name, one in factory.items()}

        def make() -> Any:
            environment = factory()
            for name, function in inspect.getmembers(type(environment), inspect.isfunction):
                if not name.startswith("_"):
                    call = limited(function, self.seconds)
                    if name == "reset":
                        call = self._watched(environment, call)
                    # Bound, as TRL 1.10 wants it; by object, for the class may be frozen or pydantic's.
                    object.__setattr__(environment, name, types.MethodType(call, environment))
            return environment

        return make

    def _watched(self, environment: Any, reset: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(reset)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._failed.pop(id(environment), None)
            try:
                return reset(*args, **kwargs)
            except Exception as error:
                self._failed[id(environment)] = error
                return None

        return watched

    def failure(self, environment: Any) -> Exception | None:
        """Why the last reset failed, if it did."""
        return self._failed.get(id(environment))


def check_rollout(out: Mapping[str, Any], rows: int, *, tools: bool) -> None:
    """Raise an InputError if what a `rollout_func` returned for `rows` prompts does not fit together.

    A mask that is too short would be filled up with ones, and the environment's tokens would be learnt.
    """
    missing = {"prompt_ids", "completion_ids", "logprobs"} - out.keys()
    if missing:
        raise InputError(
            f"rollout_func returned no {' and no '.join(sorted(missing))}: return each, for all."
        )
    columns = {name: out.get(name) for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")}
    for name, column in columns.items():
        if column is not None and len(column) != rows:
            raise InputError(
                f"rollout_func returned {len(column)} {name} for {rows} prompts: return one each, in order."
            )
    if columns["env_mask"] is None:
        return
    if tools:
        raise InputError(
            "rollout_func returned env_mask, which TRL does not look at beside tools or environment_factory: "
            "call the tools in rollout_func, or leave env_mask out."
        )
    for row, (mask, ids) in enumerate(zip(out["env_mask"], out["completion_ids"], strict=True)):
        if len(mask) != len(ids):
            raise InputError(
                f"rollout_func returned an env_mask of {len(mask)} values for the {len(ids)} tokens of "
                f"completion {row}: give 1 for each token of the model and 0 for each of the environment."
            )
