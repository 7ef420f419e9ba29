"""A run's directory (`config.yaml`, `metrics.jsonl`, `summary.json`, pictures)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from gvpo.errors import InputError, refused

METRICS = "metrics.jsonl"
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_RULE = re.compile(rf"\s*(?P<metric>[^\s<>]+)\s*(?P<sign>[<>])\s*(?P<limit>{_NUMBER})\s*")


@dataclass(frozen=True)
class Rule:
    """A limit on a logged metric."""

    metric: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From "metric > limit" or "metric < limit".

        Raises:
            InputError: it has another form.
        """
        found = _RULE.fullmatch(text)
        if found is None:
            raise InputError(f"The rule {text!r} is not METRIC > NUMBER or METRIC < NUMBER.")
        return cls(found["metric"], found["sign"], float(found["limit"]))

    def holds(self, logs: dict[str, Any]) -> bool:
        """Whether the metric was logged and is beyond the limit."""
        value = logs.get(self.metric)
        if not isinstance(value, int | float):
            return False
        return value > self.limit if self.sign == ">" else value < self.limit

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.limit:g}"


def check_writable(path: str | Path) -> None:
    """Whether a run directory could be made there, without making it.

    Raises:
        InputError: it could not.
    """
    path = Path(path)
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    with _writing(path):
        if not nearest.is_dir():
            raise OSError(f"{nearest} is a file")
        TemporaryFile(dir=nearest).close()


def _writing(path: Path) -> AbstractContextManager[None]:
    return refused(f"The output directory {path} cannot be written to", "choose another", OSError)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes that place once all went well, and is removed otherwise."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class RunDirectory:
    """Creates the directory (or takes it over) and writes a run's records into it.

    Raises:
        InputError: the directory cannot be made or written to; nothing was written then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.path).close()

    def start(self, config: Mapping[str, Any], *, resumed_at: int | None = None) -> None:
        """Write `config.yaml` and drop earlier records; of a run that goes on, those after its step."""
        self._write("config.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))
        for name in ("summary.json", *(["samples.jsonl"] if resumed_at is None else [])):
            (self.path / name).unlink(missing_ok=True)
        kept = [] if resumed_at is None else [m for m in self.metrics() if m.get("step", 0) <= resumed_at]
        if kept:
            self.write_lines(METRICS, kept)
        else:
            (self.path / METRICS).unlink(missing_ok=True)

    def log(self, entry: Mapping[str, Any], name: str = METRICS) -> None:
        """Append one line to `metrics.jsonl`, or to another such file."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(entry)) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json`, whole or not at all; what it holds."""
        plain: dict[str, Any] = _plain(summary)
        self._write("summary.json", json.dumps(plain, indent=2) + "\n")
        return plain

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; see `read_metrics`."""
        return read_metrics(self.path / METRICS)

    def curve(self, *names: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, or of several that are one, where they were logged."""
        return points(self.metrics(), *names)

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a .jsonl file of its own."""
        self._write(name, "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows))

    def _write(self, name: str, text: str) -> None:
        with replaced(self.path / name) as aside:
            aside.write_text(text, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, but for a last one that was torn by a kill or is being written.

    Raises:
        InputError: the file cannot be read, or another line is damaged.
    """
    with refused(f"{path} cannot be read", "remove or repair it", OSError):
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    entries = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step", 0), int | float):
            raise InputError(f"{path}, line {number}, is no record of metrics: remove the line or the file.")
        data = entry.pop("data", None)  # verl's file logger has the numbers in there
        entries.append(entry | data if isinstance(data, dict) else entry)
    return entries


def points(entries: Iterable[Mapping[str, Any]], *names: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, or of several that are one, in lines of metrics."""
    found = [
        (float(entry["step"]), float(entry[name]))
        for entry in entries
        for name in names
        if isinstance(entry.get(name), int | float) and "step" in entry
    ]
    return [step for step, _ in found], [value for _, value in found]


def _plain(value: Any) -> Any:
    """Values that JSON and YAML hold: no NaN, no infinity, no objects."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)


Curve = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def new_figure(panels: int = 1, width: float = 6.4, height: float = 3.8) -> tuple[Any, Sequence[Any]]:
    """A matplotlib figure and its axes, side by side, without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path, **metadata: str) -> None:
    """Write a PNG, whole or not at all."""
    with replaced(path) as aside:
        figure.savefig(aside, format="png", metadata=metadata)


def plot_curves(path: Path, panels: Sequence[tuple[str, Sequence[Curve]]], *, title: str, x: str) -> None:
    """Write a PNG with one panel beside the other; a panel is a y label and its curves."""
    figure, axes = new_figure(len(panels), 3.5 * len(panels), 3.4)
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for name, xs, ys in curves:
            axis.plot(xs, ys, label=name or None, marker="o" if len(xs) < 30 else None, markersize=3)
        axis.set_xlabel(x)
        axis.set_ylabel(label)
        if any(name for name, _, _ in curves):
            axis.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)
