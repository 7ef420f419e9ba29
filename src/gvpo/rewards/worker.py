"""A reward function in a process of its own, so that it may hang, crash or leak, and training goes on.

The process is started afresh (no copy of the trainer's memory, threads or CUDA state) and gets the function
as dill writes it, so that lambdas and functions of notebooks work too.
"""

from __future__ import annotations

import atexit
import traceback
from collections.abc import Callable
from typing import Any

import multiprocess

_START_SECONDS = 120.0


class RewardFailure(Exception):
    """A reward function failed: the message says how; `trace` is its own traceback where there is one."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace or message


class RewardTimeout(RewardFailure):
    """It took longer than its limit."""


class RewardWorker:
    """Calls a function in a worker process, with a limit of time.

    Args:
        function: the reward function.
        timeout: seconds for a call; None for no limit. Starting the process is not counted.
    """

    def __init__(self, function: Callable[..., Any], timeout: float | None) -> None:
        self.function, self.timeout = function, timeout
        self._process: Any = None
        self._pipe: Any = None
        atexit.register(self.close)

    def __call__(self, columns: dict[str, Any], timeout: float | None = None) -> Any:
        """What the function returns for `columns`, within `timeout` seconds where it's given.

        Raises:
            RewardTimeout: it took too long.
            RewardFailure: it raised, or its process died. The next call starts a new process.
        """
        if not self.alive:
            self._start()
        try:
            self._pipe.send(columns)
            limit = timeout or self.timeout
            if not self._pipe.poll(limit):
                self.close()
                raise RewardTimeout(f"took longer than {limit:g} s")
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.exitcode if self._process is not None else None
            self.close()
            raise RewardFailure(f"its process died (exit code {code})") from error
        if kind == "raised":
            raise RewardFailure(*value)
        return value

    @property
    def alive(self) -> bool:
        """Whether there is a process that the next call can use."""
        return self._process is not None and self._process.is_alive()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        self.close()
        context = multiprocess.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self.function, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(_START_SECONDS):
                raise EOFError
            self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise RewardFailure("its process could not be started") from error


def _serve(function: Callable[..., Any], pipe: Any) -> None:
    pipe.send("ready")
    while True:
        try:
            columns = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("value", function(**columns))
        except Exception as error:
            answer = ("raised", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        try:
            pipe.send(answer)
        except Exception as error:  # a value that no pipe takes
            pipe.send(("raised", (f"its values cannot be sent ({error})", "")))
