"""What looks on while a trainer trains: rules on metrics, signals, the run directory, trackers."""

from __future__ import annotations

import functools
import math
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gvpo.progress import Ticker
from gvpo.run import Rule, RunDirectory
from gvpo.samples import SAMPLES, Recorder, Sample, read_samples, text_of

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch(TrainerCallback):
    """Applies `warn_when` and `stop_when` to what the trainer logs."""

    def __init__(self, warn_when: list[str], stop_when: list[str]) -> None:
        self.warn_when = [Rule.parse(text) for text in warn_when]
        self.stop_when = [Rule.parse(text) for text in stop_when]
        self.stopped_by: Rule | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for rule in [rule for rule in self.warn_when if rule.holds(logs or {})]:
            self.warn_when.remove(rule)  # once is enough
            warnings.warn(
                f"Step {state.global_step}: {rule.metric} is {logs[rule.metric]:.4g}, and {rule} is a sign "
                "of divergence (warn_when).",
                stacklevel=2,
            )
        for rule in self.stop_when:
            if rule.holds(logs or {}) and self.stopped_by is None:
                self.stopped_by = rule
                control.should_save = True
                control.should_training_stop = True
                warnings.warn(
                    f"Training stops at step {state.global_step}: {rule.metric} is "
                    f"{logs[rule.metric]:.4g}, and stop_when has {rule}.",
                    stacklevel=2,
                )


def tolerate_loggers(callbacks: list[TrainerCallback]) -> None:
    """Let trackers (tensorboard, wandb, …) fail without stopping training: each is warned about once."""
    for callback in callbacks:
        if not type(callback).__module__.startswith("transformers.integrations"):
            continue
        for name in dir(callback):
            if name.startswith("on_"):
                setattr(callback, name, _tolerant(callback, getattr(callback, name)))


def _tolerant(callback: TrainerCallback, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # whatever a tracker's client raises when its server or disk is away
            if not getattr(callback, "gvpo_warned", False):
                callback.gvpo_warned = True
                warnings.warn(
                    f"{type(callback).__name__} failed ({type(error).__name__}: {error}): training goes on "
                    "without what it would have recorded.",
                    stacklevel=2,
                )
            return None

    return call


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


class RunCallback(TrainerCallback):
    """On the main process: the run's records, and its progress in place of transformers' printing.

    Args:
        run: the run's directory; `metrics.jsonl` and `samples.jsonl` are written there.
        console: where progress goes.
        extra: called after an optimizer step with the number of steps made; what it returns joins that
            step's line of metrics (say, the accuracy on held-out prompts).
    """

    def __init__(
        self, run: RunDirectory, console: Console, extra: Callable[[int], dict[str, float]] | None = None
    ) -> None:
        self.run, self.console, self.extra = run, console, extra
        self._pending: dict[str, float] = {}
        self._ticker: Ticker | None = None  # on the main process, while it trains
        self._recorder = Recorder()
        self._step = 0
        self._shown = ExitStack()

    def attach(self, trainer: Any) -> None:
        """Add this callback to a trainer and take its own printing away."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)
        trainer.on_generation = self.on_generation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._step = state.global_step
            before = read_samples(self.run.path) if self._step else []
            lines = [line for line in before if line["step"] < self._step + line["held_out"]]
            self.run.write_lines(SAMPLES, lines)
            self._recorder = Recorder(lines)
            self._ticker = Ticker(self.console, "GVPO", state.max_steps)
            for entry in self.run.metrics():
                self._ticker.remember(entry)
            self._ticker.advance(state.global_step)
            self._shown.enter_context(self._ticker.running())

    def on_generation(
        self, prompts: list[Any], completions: list[Any], rewards: list[float], training: bool
    ) -> None:
        """Record what prompts were answered; see `GVPOTrainer.on_generation`."""
        if self._ticker is None:
            return
        generation = [
            Sample(text_of(prompt), text_of(completion), None if math.isnan(reward) else round(reward, 6))
            for prompt, completion, reward in zip(prompts, completions, rewards[-len(prompts) :], strict=True)
        ]
        self.run.log(self._recorder.line(self._step, generation, held_out=not training), SAMPLES)
        self._ticker.sample = generation[-1]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        if state.is_world_process_zero and self.extra is not None:
            self._pending.update(self.extra(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, **logs, **self._pending}
        self._pending = {}
        if self._ticker is not None and "step_time" in entry:
            entry["seconds_left"] = self._ticker.seconds_left(state.global_step)
        self.run.log(entry)
        if self._ticker is not None:
            self._ticker.advance(state.global_step, metrics=entry)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when training was interrupted."""
        self._shown.close()
