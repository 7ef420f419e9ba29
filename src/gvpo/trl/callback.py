"""Writes a trainer's logs into a run directory and shows its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gvpo.run import RunDirectory, Ticker


class RunCallback(TrainerCallback):
    """On the main process: `metrics.jsonl`, and a progress bar in place of transformers' printing.

    Args:
        run: the run's directory.
        console: where progress goes.
        extra: called after an optimizer step with the number of steps made; what it returns joins that
            step's line of metrics (say, the accuracy on held-out prompts).
    """

    def __init__(
        self, run: RunDirectory, console: Console, extra: Callable[[int], dict[str, float]] | None = None
    ) -> None:
        self.run, self.console, self.extra = run, console, extra
        self._pending: dict[str, float] = {}
        self._ticker: Ticker | None = None
        self._shown: Any = None

    def attach(self, trainer: Any) -> None:
        """Add this callback to a trainer and take its own printing away."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._ticker = Ticker(self.console, "GVPO", state.max_steps)
            self._ticker.advance(state.global_step)
            self._shown = self._ticker.running()
            self._shown.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.extra is not None:
            self._pending.update(self.extra(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, **logs, **self._pending}
        self._pending = {}
        self.run.log(entry)
        shown = (
            ("reward", "reward", ".2f"),
            ("accuracy", "accuracy", ".1%"),
            ("gvpo/explained_variance", "explained", ".2f"),
            ("gvpo/kl", "KL", ".2f"),
        )
        note = "  ".join(
            f"{label} {entry[key]:{form}}" for key, label, form in shown if isinstance(entry.get(key), float)
        )
        if self._ticker is not None:
            self._ticker.advance(state.global_step, note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when training was interrupted."""
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None
