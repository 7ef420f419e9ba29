"""Worker processes for comparisons that need computer algebra, each comparison with a limit of its own.

A worker is a plain subprocess that imports no torch and is not a copy of the caller, so it is safe beside
CUDA, threads and forked data loaders. It ends when the caller does, since its standard input then closes.
"""

import atexit
import importlib.util
import json
import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from gvpo.errors import InputError
from gvpo.machine import usable_cores
from gvpo.rewards import symbolic

Pair = tuple[str, str]

_CHUNK = 32
_START_SECONDS = 120.0
_MEGABYTES = 2048
_MAX_WORKERS = 8
_MAX_FAILURES = 3
_MIN_TOLERATED = 16


class _Worker:
    """A process that starts when first needed. Not thread-safe: the pool hands it to one thread at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def compare(self, pairs: Sequence[Pair], seconds: float, verdicts: list[bool]) -> bool:
        """Append verdicts, up to the first pair that a child died on (unequal); say whether one did.

        Raises:
            OSError: the process itself is gone; the next call starts another.
        """
        try:
            process = self.process or self._start()
            process.stdin.write(json.dumps([seconds, pairs]).encode() + b"\n")  # type: ignore[union-attr]
            for _ in pairs:
                # The worker limits itself; this deadline is for one that was stopped from outside.
                byte = _read(process, 40 * seconds + 10)
                verdicts.append(byte == symbolic.EQUAL)
                if byte == symbolic.DIED:
                    return True
        except BaseException:  # Ctrl-C too: the rest would be read as the next pair's answer
            self.close()
            raise
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps this package's folder off the worker's import path. A session of its own keeps Ctrl-C away
        # and lets one signal end the worker with its child.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(symbolic.__file__)), str(_MEGABYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        _read(self.process, _START_SECONDS)
        return self.process

    def close(self) -> None:
        """End the process and its child, whatever they do, and wait for it."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()  # it ends its child first, so that none is left for others to bury
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout):
            stream.close()  # type: ignore[union-attr]


def _read(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    readable, _, _ = select.select([process.stdout.fileno()], [], [], seconds)  # type: ignore[union-attr]
    byte: bytes = process.stdout.read(1) if readable else b""  # type: ignore[union-attr]
    if not byte:
        raise OSError("the worker process is gone")
    return byte


class VerifierPool:
    """Compares answers by Math-Verify in worker processes; safe to share between threads.

    Args:
        workers: how many processes at most; they start when first needed. None for one per available core,
            up to 8.
        seconds: processor time that one comparison may take; one that takes longer counts as unequal. A call
            in which many do is under attack: what is left of it gets a tenth of that.

    Raises:
        InputError: Math-Verify is not installed.
    """

    def __init__(self, workers: int | None = None, seconds: float = 1.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError("Math-Verify is not installed: pip install 'math-verify[antlr4_9_3]'.")
        self.workers = workers or min(_MAX_WORKERS, usable_cores())
        self.seconds = seconds
        self._owner = os.getpid()
        self._processes = [_Worker() for _ in range(self.workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # those that run already are taken first
        for worker in self._processes:
            self._idle.put(worker)
        atexit.register(self.close)

    def compare(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the second of each pair, an answer, equals the first, a ground truth.

        Pairs that are too complex to have been written as an answer count as unequal at once.
        """
        distinct = list(dict.fromkeys(pair for pair in pairs if not any(map(symbolic.too_complex, pair))))
        chunks = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
        deaths: list[Pair] = []
        compare = partial(
            self._compare_chunk, deaths=deaths, tolerated=max(_MIN_TOLERATED, len(distinct) // 100)
        )
        if len(chunks) > 1 and self.workers > 1:
            with ThreadPoolExecutor(self.workers) as threads:
                verdicts = [verdict for chunk in threads.map(compare, chunks) for verdict in chunk]
        else:
            verdicts = [verdict for chunk in chunks for verdict in compare(chunk)]
        equal = dict(zip(distinct, verdicts, strict=True))
        return [equal.get(pair, False) for pair in pairs]

    def _compare_chunk(self, chunk: Sequence[Pair], deaths: list[Pair], tolerated: int) -> list[bool]:
        verdicts: list[bool] = []
        failures = 0
        worker = self._idle.get()
        try:
            while len(verdicts) < len(chunk):
                seconds = self.seconds if len(deaths) <= tolerated else self.seconds / 10
                try:
                    if worker.compare(chunk[len(verdicts) :], seconds, verdicts):
                        deaths.append(chunk[len(verdicts) - 1])
                except OSError as error:
                    failures += 1
                    if failures > _MAX_FAILURES:
                        message = "the verification workers keep dying: is the machine out of memory?"
                        raise RuntimeError(message) from error
        finally:
            self._idle.put(worker)
        return verdicts

    def process_ids(self) -> list[int]:
        """The worker processes that run now; each leads a process group of its own."""
        return [process.pid for worker in self._processes if (process := worker.process) is not None]

    def close(self) -> None:
        """End every worker. The pool may be used again: it starts new ones."""
        if os.getpid() == self._owner:  # in a forked copy of the caller the workers are not ours
            for worker in self._processes:
                worker.close()


@cache
def _pool_of(process: int) -> VerifierPool:
    return VerifierPool()


def shared_pool() -> VerifierPool:
    """This process's pool (a forked copy has one of its own), made when first asked for, closed at exit."""
    return _pool_of(os.getpid())
