"""Stopping a run politely: SIGTERM and SIGINT save a checkpoint at the end of the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal came, on all processes together.

    A second signal ends the process at once, as if this callback were not there.

    Attributes:
        received: the signal that any process got, once all have agreed on stopping.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._mine = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = self._mine
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shared = torch.tensor(number, device=args.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            number = int(shared.item())
        if number:
            self.received = signal.Signals(number)
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whom they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._mine:
            self.restore()
            signal.raise_signal(number)
        self._mine = number
