"""Notices within seconds that a Ray actor has died, also where verl would wait for it for ever."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from gvpo.errors import InputError

_GRACE = 60.0  # seconds for the main thread to end by itself
_LAST_LOOKS = 10  # of a second each, for Ray to learn of a death that has already made something fail


class WorkerDied(RuntimeError):
    """A Ray actor that the run cannot do without has died."""


class Watch:
    """Asks every actor, over and over, for a sign of life.

    A dead actor fails whatever call is pending with it at once; a busy one answers when it is done, so that
    long work is never mistaken for death. `seconds` pass between two rounds.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._actors: list[tuple[str, Any]] = []
        self._pending: dict[Any, int] = {}
        self._stop = threading.Event()
        self._reason = ""

    def add(self, kind: str, actors: Sequence[Any]) -> None:
        """Watch these actors, called `kind` in messages."""
        self._actors += [(kind, actor) for actor in actors]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, a death raises WorkerDied in the main thread, wherever that waits; enter it there."""
        previous = signal.signal(signal.SIGUSR1, self._interrupt)
        thread = threading.Thread(target=self._run, name="gvpo-watch", daemon=True)
        thread.start()
        try:
            yield
        except (WorkerDied, InputError):
            raise
        except Exception as error:
            # Something failed before the watch looked; if a death is behind it, that is what to tell.
            self._stop.set()
            thread.join()
            for _ in range(_LAST_LOOKS):
                self._look(timeout=1.0)
                if self._reason:
                    raise WorkerDied(self._reason) from error
            raise
        finally:
            self._stop.set()
            thread.join()
            signal.signal(signal.SIGUSR1, previous)

    def _interrupt(self, *_: Any) -> None:
        raise WorkerDied(self._reason)

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            self._look(timeout=0)
            if not self._reason:
                continue
            print(f"gvpo: {self._reason}", file=sys.stderr, flush=True)
            if not self._stop.is_set():
                os.kill(os.getpid(), signal.SIGUSR1)
                if not self._stop.wait(_GRACE):
                    os._exit(1)
            return

    def _look(self, timeout: float) -> None:
        """Collect answers, and ask those again who have given theirs."""
        waiting = set(self._pending.values())
        for i, (_, actor) in enumerate(self._actors):
            if i not in waiting:
                self._pending[actor.__ray_ready__.remote()] = i
        done, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=timeout)
        for answer in done:
            kind = self._actors[self._pending.pop(answer)][0]
            try:
                ray.get(answer)
            except RayActorError as error:
                said = " ".join(str(error).split())
                self._reason = f"{kind} died, and the run ends here. Ray says: {said}"
            except RayError:
                pass
