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
from functools import partial
from pathlib import Path

from gvpo.errors import InputError
from gvpo.rewards import symbolic

Pair = tuple[str, str]

_CHUNK = 32
_START_SECONDS = 120.0
_MEGABYTES = 2048
_MAX_WORKERS = 8
_MAX_FAILURES = 3
_MIN_TOLERATED = 16


class _Worker:
    """One worker process. Not thread-safe: the pool hands it to one thread at a time."""

    def __init__(self) -> None:
        self.ready = False
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

    def compare(self, pairs: Sequence[Pair], seconds: float, verdicts: list[bool]) -> bool:
        """Append verdicts, up to the first pair that a child died on (unequal); say whether one did.

        Raises:
            OSError: the worker itself is gone.
        """
        if not self.ready:
            self._expect(_START_SECONDS)
            self.ready = True
        self.process.stdin.write(json.dumps([seconds, pairs]).encode() + b"\n")  # type: ignore[union-attr]
        for _ in pairs:
            # The worker limits itself; this deadline is for one that was stopped from outside.
            byte = self._expect(40 * seconds + 10)
            verdicts.append(byte == symbolic.EQUAL)
            if byte == symbolic.DIED:
                return True
        return False

    def _expect(self, seconds: float) -> bytes:
        readable, _, _ = select.select([self.process.stdout.fileno()], [], [], seconds)  # type: ignore[union-attr]
        byte: bytes = self.process.stdout.read(1) if readable else b""  # type: ignore[union-attr]
        if not byte:
            raise OSError("the worker process is gone")
        return byte

    def close(self) -> None:
        """End the process and its child, whatever they do, and wait for it."""
        self.process.terminate()  # it ends its child first, so that none is left for others to bury
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()  # type: ignore[union-attr]


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
        self.workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.seconds = seconds
        self._owner = os.getpid()
        self._workers: dict[_Worker, None] = {}
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # a place for a worker that has not been started
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
        while len(verdicts) < len(chunk):
            worker = self._idle.get()
            try:
                if worker is None:
                    worker = _Worker()
                    self._workers[worker] = None
                seconds = self.seconds if len(deaths) <= tolerated else self.seconds / 10
                if worker.compare(chunk[len(verdicts) :], seconds, verdicts):
                    deaths.append(chunk[len(verdicts) - 1])
            except BaseException as error:  # Ctrl-C too: the rest would be read as the next pair's answer
                self._end(worker)
                worker = None
                failures += 1
                if not isinstance(error, OSError):
                    raise
                if failures > _MAX_FAILURES:
                    message = "the verification workers keep dying: is the machine out of memory?"
                    raise RuntimeError(message) from error
            finally:
                self._idle.put(worker)
        return verdicts

    def _end(self, worker: _Worker | None) -> None:
        if worker is not None and self._workers.pop(worker, worker) is None:
            worker.close()

    def process_ids(self) -> list[int]:
        """The worker processes that run now; each leads a process group of its own."""
        return [worker.process.pid for worker in list(self._workers)]

    def close(self) -> None:
        """End every worker. The pool may be used again: it starts new ones."""
        if os.getpid() != self._owner:  # in a forked copy of the caller the workers are not ours
            return
        for worker in list(self._workers):
            self._end(worker)
        for _ in range(self._idle.qsize()):
            with suppress(queue.Empty):
                self._idle.get_nowait()
                self._idle.put(None)


_shared: dict[int, VerifierPool] = {}  # by process: a forked copy starts workers of its own


def shared_pool() -> VerifierPool:
    """This process's pool, made when first asked for and closed at exit."""
    process = os.getpid()
    return _shared.get(process) or _shared.setdefault(process, VerifierPool())


def close_shared_pool() -> None:
    """End the workers of this process's pool, if it has one."""
    pool = _shared.pop(os.getpid(), None)
    if pool is not None:
        pool.close()
