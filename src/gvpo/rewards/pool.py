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
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from gvpo.errors import InputError
from gvpo.rewards import symbolic

Pair = tuple[str, str]

DEFAULT_SECONDS = 1.0
_CHUNK = 32
_START_SECONDS = 120.0
_END_SECONDS = 5.0
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
        """Append verdicts, up to the first pair that a child died on (which counts as unequal).

        Returns:
            Whether a child died.

        Raises:
            OSError: the worker itself is gone.
        """
        if not self.ready:
            self._expect(_START_SECONDS)
            self.ready = True
        payload = json.dumps([seconds, pairs]).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(struct.pack(">I", len(payload)) + payload)
        for _ in pairs:
            # The worker limits itself; this deadline is for one that was stopped from outside.
            byte = self._expect(40 * seconds + 10)
            verdicts.append(byte == symbolic.EQUAL)
            if byte == symbolic.DIED:
                return True
        return False

    def _expect(self, seconds: float) -> bytes:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        byte = self.process.stdout.read(1) if readable else b""
        if not byte:
            raise OSError("the worker process is gone")
        return byte

    def close(self) -> None:
        """End the process and its child, whatever they do, and wait for it."""
        self.process.terminate()  # it ends its child first, so that none is left for others to bury
        try:
            self.process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close our ends of the pipes only: in a forked copy of the caller the worker is not ours."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


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

    def __init__(self, workers: int | None = None, seconds: float = DEFAULT_SECONDS) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError("Math-Verify is not installed: pip install 'math-verify[antlr4_9_3]'.")
        self.workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.seconds = seconds
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # a place for a worker that has not been started
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()

    def compare(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the second of each pair, an answer, equals the first, a ground truth.

        Pairs that are too complex to have been written as an answer count as unequal at once.
        """
        distinct = list(dict.fromkeys(pair for pair in pairs if not any(map(symbolic.too_complex, pair))))
        chunks = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
        deaths: list[Pair] = []
        run = partial(self._compare_chunk, deaths=deaths, tolerated=max(_MIN_TOLERATED, len(distinct) // 100))
        if len(chunks) > 1 and self.workers > 1:
            with ThreadPoolExecutor(min(self.workers, len(chunks))) as threads:
                results = list(threads.map(run, chunks))
        else:
            results = [run(chunk) for chunk in chunks]
        verdicts = dict(zip(distinct, (v for result in results for v in result), strict=True))
        return [verdicts.get(pair, False) for pair in pairs]

    def _compare_chunk(self, chunk: Sequence[Pair], deaths: list[Pair], tolerated: int) -> list[bool]:
        verdicts: list[bool] = []
        failures = 0
        while len(verdicts) < len(chunk):
            worker = self._idle.get()
            try:
                if worker is None:
                    worker = _Worker()
                    with self._lock:
                        self._all.add(worker)
                seconds = self.seconds if len(deaths) <= tolerated else self.seconds / 10
                if worker.compare(chunk[len(verdicts) :], seconds, verdicts):
                    deaths.append(chunk[len(verdicts) - 1])
            except OSError as error:
                self._discard(worker)
                worker = None
                failures += 1
                if failures > _MAX_FAILURES:
                    raise RuntimeError(
                        "the verification workers keep dying: is the machine out of memory?"
                    ) from error
            except BaseException:
                # Ctrl-C in the middle of an answer: the rest would be read as the next one's.
                self._discard(worker)
                worker = None
                raise
            finally:
                self._idle.put(worker)
        return verdicts

    def _discard(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.close()
            with self._lock:
                self._all.discard(worker)

    def process_ids(self) -> list[int]:
        """The worker processes that run now; each leads a process group of its own."""
        with self._lock:
            return [worker.process.pid for worker in self._all]

    def close(self) -> None:
        """End every worker. The pool may be used again: it starts new ones."""
        with self._lock:
            workers, self._all = self._all, set()
        places = self._idle.qsize()
        for _ in range(places):
            with suppress(queue.Empty):
                self._idle.get_nowait()
                self._idle.put(None)
        for worker in workers:
            worker.close()

    def forget(self) -> None:
        """Let go of the workers without ending them, after a fork."""
        for worker in self._all:
            worker.forget()


_shared: VerifierPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> VerifierPool:
    """This process's pool, made when first asked for and closed at exit."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = VerifierPool()
        return _shared


def close_shared_pool() -> None:
    """End the workers of this process's pool, if it has one."""
    global _shared
    with _shared_lock:
        pool, _shared = _shared, None
    if pool is not None:
        pool.close()


def _after_fork_in_child() -> None:
    global _shared, _shared_lock
    _shared_lock = threading.Lock()
    if _shared is not None:
        _shared.forget()
        _shared = None


atexit.register(close_shared_pool)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
