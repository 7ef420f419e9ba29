"""Tables and pictures of what an experiment found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gvpo.run import save_figure

Row = Mapping[str, Any]
# Told apart without colour vision (Okabe and Ito), GVPO first.
COLOURS = (
    "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F", "#000000", "#8C564B",
    "#9467BD", "#17BECF", "#BCBD22",
)  # fmt: skip


def number(value: float | None) -> str:
    """Three significant digits where that is readable."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-12:
        return "<1e-12"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(cell: Mapping[str, Any] | float) -> str:
    """mean ± half of the 95 % interval; or the number, if it is one."""
    if not isinstance(cell, Mapping):
        return number(cell)
    if cell["mean"] is None or not math.isfinite(cell["mean"]):
        return "diverged"
    if abs(cell["mean"]) < 1e-12:
        return number(cell["mean"])
    if len(cell.get("seeds", ())) == 1:
        return number(cell["mean"])  # one run has no interval
    return f"{number(cell['mean'])} ±{number(cell['high'] - cell['mean'])}"


def by_condition(rows: Sequence[Row], metric: str, title: str, columns: int = 3) -> list[Table]:
    """Algorithms downwards, conditions sidewards, `columns` of them a table."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(row["label"], row["condition"]): interval(row[metric]) for row in rows}
    tables = []
    for first in range(0, len(conditions), columns):
        shown = conditions[first : first + columns]
        body = [[label, *(cells.get((label, condition), "") for condition in shown)] for label in labels]
        tables.append(_table(title, shown, body))
    return tables


def by_metric(rows: Sequence[Row], metrics: Mapping[str, str], title: str) -> Table:
    """Algorithms downwards, several metrics sidewards; for one condition."""
    body = [[row["label"], *(interval(row[name]) for name in metrics)] for row in rows]
    return _table(title, metrics.values(), body)


def _table(title: str, columns: Iterable[str], body: Iterable[Sequence[str]]) -> Table:
    table = Table("", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def save(figure: Any, path: Path, found: Mapping[str, Any]) -> None:
    """A picture with the fingerprint of the summary that it shows."""
    save_figure(figure, path, Source=fingerprint(found))


def fingerprint(found: Mapping[str, Any]) -> str:
    """Of a summary: tells whether a picture was drawn from it."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def dots(axis: Any, rows: Sequence[Row], metric: str, *, log: bool = False, floor: float = 1e-9) -> None:
    """Means with 95 % intervals: conditions along x, one colour an algorithm."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = 0.0 if conditions == labels else 0.7
    for index, label in enumerate(labels):
        points = [(conditions.index(row["condition"]), row[metric]) for row in rows if row["label"] == label]
        points = [(x, cell) for x, cell in points if cell["mean"] is not None]
        shift = width * ((index + 0.5) / len(labels) - 0.5)
        ys = [max(cell["mean"], floor) if log else cell["mean"] for _, cell in points]
        # An interval that reaches below 0 would fill a logarithmic axis.
        lows = [
            max(cell["low"], floor, y / 3) if log else cell["low"]
            for (_, cell), y in zip(points, ys, strict=True)
        ]
        errors = [
            [max(y - low, 0) for y, low in zip(ys, lows, strict=True)],
            [max(cell["high"] - y, 0) for (_, cell), y in zip(points, ys, strict=True)],
        ]
        axis.errorbar(
            [x + shift for x, _ in points], ys, yerr=errors, fmt="D" if index == 0 else "o",
            markersize=5 if index == 0 else 3.5, linewidth=1, label=label,
            color=COLOURS[index % len(COLOURS)],
        )  # fmt: skip
    axis.set_xticks(range(len(conditions)), conditions)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.5, len(conditions) - 0.5)
    if log:
        axis.set_yscale("log")


def legend_below(figure: Any, axis: Any, columns: int = 4) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
