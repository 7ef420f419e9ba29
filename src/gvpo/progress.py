"""What long work shows of itself: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gvpo.samples import Sample

# Label, the metric's names in TRL and in verl (the first that is there counts), and how it is written.
SHOWN = (
    ("reward", ("reward", "critic/score/mean"), ".3g"),
    ("held out", ("eval_reward",), ".3g"),
    ("accuracy", ("accuracy", "accuracy_200"), ".1%"),
    ("explained", ("gvpo/explained_variance",), ".3g"),
    ("KL", ("gvpo/kl",), ".3g"),
    ("length", ("completions/mean_length", "response_length/mean"), ".3g"),
)
# What a step's seconds went to: names of ours and of verl, where an update's time has its scoring in it.
SPLIT = {
    "generation": ("profiling/generation", "timing_s/gen"),
    "rewards": ("profiling/rewards", "timing_s/reward"),
    "reference": ("profiling/reference", "timing_s/ref"),
    "scoring": ("profiling/scoring", "timing_s/old_log_prob", "timing_s/gvpo_score"),
    "update": ("profiling/update", "timing_s/update_actor"),
}
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_NARROW, _TOO_NARROW = 64, 36  # columns below which ranges, and then curves, are left out


class Ticker:
    """Progress of a long piece of work, and how long it will take yet.

    On a terminal a bar, below it the metrics' last values and curves and the last sample; elsewhere a plain
    line for every record of metrics, or now and then.

    Attributes:
        sample: the last one; set it when there is another.
    """

    def __init__(self, console: Console, label: str, total: int) -> None:
        self.console, self.label, self.total, self.done = console, label, total, 0
        self.sample: Sample | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
            get_time=time.monotonic,
        )
        self._task = self._bar.add_task(label, total=total)
        self._curves: dict[str, list[float]] = {}
        self._left = self._words = ""
        self._began: tuple[float, int] | None = None  # when, and how much was done already
        self._drawn = console.is_terminal and not console.is_dumb_terminal

    def running(self) -> AbstractContextManager[Any]:
        """Shows the progress while the work is done."""
        self._began = (time.monotonic(), self.done)
        if not self._drawn:
            return nullcontext()
        return Live(get_renderable=self.__rich__, console=self.console, refresh_per_second=2)

    def seconds_left(self, done: int) -> float | None:
        """With `done` of the total done, at the mean pace since `running`; None before anything was."""
        if self._began is None or done <= self._began[1]:
            return None
        began, first = self._began
        return (time.monotonic() - began) / (done - first) * (self.total - done)

    def remember(self, metrics: Mapping[str, Any]) -> None:
        """Let the curves have what was logged, also before this process began."""
        for label, _, value in _numbers(metrics):
            self._curves.setdefault(label, []).append(value)

    def advance(self, to: int, note: str = "", metrics: Mapping[str, Any] | None = None) -> None:
        """Tell that `to` of the total is done, and what was measured on the way."""
        before, self.done = self.done, to
        metrics = metrics or {}
        self.remember(metrics)
        left = None if to >= self.total else self.seconds_left(to)
        remaining = "" if left is None else f"{duration(left)} left"
        if self._drawn:
            self._bar.update(self._task, completed=to)
            self._left = remaining
            self._words = "  ".join(filter(None, (note, speed(metrics)))) or self._words
            return
        numbers = [f"{label} {value:{form}}" for label, form, value in _numbers(metrics)]
        words = [part for part in (note, *numbers, speed(metrics)) if part]
        if words or (to > before and to >= self.total) or to * 4 // self.total > before * 4 // self.total:
            line = [f"{self.label} {to}/{self.total}", *words, *filter(None, [remaining])]
            self.console.print("  ".join(line), highlight=False, markup=False, soft_wrap=True)

    # --- The table --------------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar, self._measured()]
        if below := "  ".join(filter(None, (self._left, self._words))):
            parts.append(Text(below, "dim"))
        if self.sample is not None:
            parts.append(self._sampled(self.sample))
        return Group(*parts)

    def _measured(self) -> Table:
        width = self.console.width
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        levels = _ASCII if self.console.options.ascii_only else _BLOCKS
        for label, _, form in SHOWN:
            if values := self._curves.get(label):
                row = [Text(label, "dim"), Text(f"{values[-1]:{form}}", "bold")]
                if width >= _TOO_NARROW:
                    room = min(60, width - (44 if width >= _NARROW else 22))
                    row.append(Text(sparkline(values, room, levels), "cyan"))
                if width >= _NARROW:
                    row.append(Text(f"{min(values):{form}} to {max(values):{form}}", "dim"))
                table.add_row(*row)
        return table

    def _sampled(self, sample: Sample) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        room = max(10, self.console.width - 14)
        table.add_row("prompt", Text(shortened(sample.prompt, room)))
        table.add_row("completion", Text(shortened(sample.completion, 3 * room), "italic"))
        table.add_row("its reward", "none" if sample.reward is None else f"{sample.reward:.3g}")
        return table


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What is shown of a record of metrics: label, form and value."""
    found = []
    for label, names, form in SHOWN:
        values = [float(metrics[name]) for name in names if isinstance(metrics.get(name), int | float)]
        found += [(label, form, value) for value in values[:1] if math.isfinite(value)]
    return found


def sparkline(values: Sequence[float], width: int, levels: str = _BLOCKS) -> str:
    """A curve of at most `width` characters, from its lowest value to its highest."""
    n = min(width, len(values))
    cuts = [i * len(values) // n for i in range(n + 1)]
    means = [fmean(values[a:b]) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    step = (high - low) / (len(levels) - 1) or 1.0  # of a flat line all are the lowest
    return "".join(levels[round((mean - low) / step)] for mean in means)


def shortened(text: str, most: int) -> str:
    """On one line, without what a terminal would obey; of what is too long the beginning and the end."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= most:
        return line
    head = (most - 3) // 2
    return f"{line[:head]} … {line[len(line) - (most - 3 - head) :]}"


def split_of(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Steps and their seconds by part; the parts add up to the step."""
    found = []
    for entry in metrics:
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        whole = numbers.get("step_time", numbers.get("timing_s/step"))
        seconds = {part: sum(numbers.get(name, 0.0) for name in names) for part, names in SPLIT.items()}
        if whole and any(seconds.values()) and "step" in numbers:
            seconds["update"] -= numbers.get("timing_s/gvpo_score", 0.0)
            seconds["other"] = max(0.0, whole - sum(seconds.values()))
            found.append((numbers["step"], seconds))
    return found


def speed(entry: Mapping[str, Any]) -> str:
    """Time and memory of a line of metrics, in words; parts of less than a twentieth are left out."""
    if not (split := split_of([entry])):
        return ""
    ((_, seconds),) = split
    whole = sum(seconds.values())
    parts = ", ".join(f"{part} {value / whole:.0%}" for part, value in seconds.items() if value >= whole / 20)
    words = [f"{whole:.3g} s a step ({parts})"]
    if tokens := entry.get("tokens_per_second"):
        words.append(f"{tokens:,.0f} tokens/s")
    if memory := entry.get("memory/peak_gib"):
        words.append(f"{memory:.1f} GiB ({entry['memory/peak_fraction']:.0%})")
    return "  ".join(words)


def duration(seconds: float) -> str:
    """A time in words, to two figures or so: 42 s, 7 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
