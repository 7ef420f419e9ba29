"""One self-contained HTML page about runs: curves overlaid, summaries, settings, completions.

Curves are embedded SVG drawn by matplotlib: a few kilobytes each, sharp at any size, and no script to load.
"""

import html
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gvpo.errors import InputError

# Title, the metric's names (the first that a run has counts), and the unit of the vertical axis.
PANELS = (
    ("Reward", ("reward",), "mean per completion"),
    ("Accuracy", ("accuracy", "eval_accuracy", "rewards/accuracy/mean"), "share right"),
    ("Explained variance", ("gvpo/explained_variance",), "1: the optimum"),
    ("KL to the reference", ("gvpo/kl", "kl"), "nats"),
    ("Length", ("completions/mean_length",), "tokens"),
    ("Weight spread", ("gvpo/weight_abs_mean",), "mean |w|"),
    ("Entropy", ("entropy",), "nats per token"),
    ("Loss", ("loss",), ""),
    ("Time per step", ("step_time",), "seconds"),
    ("Tokens", ("num_tokens",), "so far"),
)
_COLOURS = ("#1f5fa8", "#c8553d", "#2f8f5b", "#8a5bb0", "#b8860b", "#3f8c9b", "#a3485e", "#5a6570")
_SAMPLES_SHOWN = 20


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: as shown; unique on the page.
        metrics: the lines of `metrics.jsonl`.
        summary, config: of the files of these names.
        samples: `prompt`, `before`, `after` and `answer` each, or `prompt`, `completion`, `answer`, `reward`.
    """

    name: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    samples: list[dict[str, Any]]


def write_report(paths: Sequence[Path], output: Path, *, title: str = "GVPO runs") -> int:
    """Write the page.

    Args:
        paths: run directories of training or evaluation.
        output: the file; replaced whole or not at all.
        title: its heading.

    Returns:
        The page's size in bytes.

    Raises:
        InputError: a path is no run directory, a file in it cannot be read, or the page cannot be written.
    """
    names = [path.resolve().name for path in paths]
    runs = [
        load_run(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]
    page = render(runs, title).encode("utf-8")
    aside = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(page)
        os.replace(aside, output)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror}): choose another --output."
        ) from error
    return len(page)


# --- Reading ------------------------------------------------------------------------------------------------


def load_run(path: Path, name: str) -> Run:
    """Read a run directory.

    Raises:
        InputError: it holds neither metrics nor a summary, or a file of it cannot be read.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a run directory: give the folder that a gvpo command wrote.")
    if not (path / "metrics.jsonl").is_file() and not (path / "summary.json").is_file():
        raise InputError(
            f"{path} holds neither metrics.jsonl nor summary.json: give a finished or running run."
        )
    metrics = []
    lines = _text(path / "metrics.jsonl").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # a running or killed run may be in the middle of its last line
                break
            raise InputError(f"{path / 'metrics.jsonl'}, row {number} is not JSON: remove it.") from error
    return Run(
        name,
        [line for line in metrics if isinstance(line, dict)],
        _load(path / "summary.json", dict) or {},
        _load(path / "config.yaml", dict) or {},
        _samples(path),
    )


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove or repair it.") from error


def _load(path: Path, kind: type) -> Any:
    text = _text(path)
    if not text:
        return None
    try:
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be parsed: remove or repair it.") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} does not hold what it should ({kind.__name__}): remove or repair it.")
    return value


def _samples(path: Path) -> list[dict[str, Any]]:
    rows = _load(path / "samples.json", list)
    if rows is not None:
        return [row for row in rows if isinstance(row, dict)]
    if not (path / "samples.parquet").is_file():
        return []
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path / "samples.parquet") as file:
            batch = next(file.iter_batches(batch_size=_SAMPLES_SHOWN), None)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path / 'samples.parquet'} cannot be read: remove or repair it.") from error
    return [] if batch is None else batch.to_pylist()


# --- Curves -------------------------------------------------------------------------------------------------


def curve(run: Run, names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Steps and values of the first of the metrics that a run has; both empty when it has none."""
    for name in names:
        points = [
            (float(line["step"]), float(line[name]))
            for line in run.metrics
            if isinstance(line.get("step"), int | float) and isinstance(line.get(name), int | float)
        ]
        if points:
            return [step for step, _ in points], [value for _, value in points]
    return [], []


def _panel(title: str, unit: str, curves: Sequence[tuple[int, list[float], list[float]]]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text as text keeps it small and selectable; the fixed salt makes the same runs give the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        for index, steps, values in curves:
            few = len(steps) < 40
            axis.plot(
                steps,
                values,
                color=_COLOURS[index % len(_COLOURS)],
                lw=1.6,
                marker="o" if few else None,
                ms=3,
            )
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylabel(unit, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    label = _safe(title)
    return f'<figure role="img" aria-label="{label}"><figcaption>{label}</figcaption>{drawing}</figure>'


# --- The page -----------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #20242a; background: #f6f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 32px 0 12px; }
.legend span { display: inline-block; margin-right: 18px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px; }
figure, .card { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; margin: 0; padding: 12px; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
.card { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid #eceef2; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14em; overflow-y: auto; }
.right { color: #1d7a46; } .wrong { color: #b03a2e; } .muted { color: #69717d; }
"""


def render(runs: Sequence[Run], title: str) -> str:
    """The page's HTML. Everything that comes from a run is escaped."""
    legend = "".join(
        f'<span><i style="background:{_COLOURS[index % len(_COLOURS)]}"></i>{_safe(run.name)}</span>'
        for index, run in enumerate(runs)
    )
    sections = [_curves(runs), _metrics(runs), _summaries(runs), _settings(runs), *map(_completions, runs)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{_STYLE}</style></head><body><main><h1>{_safe(title)}</h1><p class="legend">{legend}</p>'
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _safe(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _curves(runs: Sequence[Run]) -> str:
    panels = []
    for title, names, unit in PANELS:
        curves = [(index, *curve(run, names)) for index, run in enumerate(runs)]
        if any(steps for _, steps, _ in curves):
            panels.append(_panel(title, unit, [one for one in curves if one[1]]))
    return f'<h2>Training</h2><div class="curves">{"".join(panels)}</div>' if panels else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th{' class=number' if i else ''}>{_safe(h)}</th>" for i, h in enumerate(headings))
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if i else ''}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table><tr>{head}</tr>{body}</table></div>'


def _metrics(runs: Sequence[Run]) -> str:
    """The figures of evaluations with their intervals."""
    evaluated = [run for run in runs if isinstance(run.summary.get("metrics"), dict)]
    names = list(dict.fromkeys(name for run in evaluated for name in run.summary["metrics"]))

    def cell(run: Run, name: str) -> str:
        figure = run.summary["metrics"].get(name)
        if not isinstance(figure, dict) or not {"mean", "low", "high"} <= set(figure):
            return ""
        style = "{:.1f}" if name == "tokens" else "{:.1%}"
        mean, low, high = (style.format(figure[key]) for key in ("mean", "low", "high"))
        return f'{mean} <span class="muted">{low} – {high}</span>'

    rows = [[_safe(name), *(cell(run, name) for run in evaluated)] for name in names]
    note = '<p class="muted">Mean and 95 % bootstrap interval over prompts.</p>'
    return f"<h2>Evaluation</h2>{_table(['', *(r.name for r in evaluated)], rows)}{note}" if rows else ""


def _summaries(runs: Sequence[Run]) -> str:
    simple = [
        {key: value for key, value in run.summary.items() if not isinstance(value, dict | list)}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for summary in simple for key in summary))
    rows = [
        [_safe(key.replace("_", " ")), *(_number(s[key]) if key in s else "" for s in simple)] for key in keys
    ]
    return f"<h2>Summary</h2>{_table(['', *(run.name for run in runs)], rows)}" if rows else ""


def _settings(runs: Sequence[Run]) -> str:
    """All settings of one run; of several, those in which they differ."""
    flat = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    if len(runs) > 1:
        keys = [key for key in keys if len({str(config.get(key, "")) for config in flat}) > 1]
    rows = [[_safe(key), *(_number(config.get(key, "")) for config in flat)] for key in keys]
    heading = "Settings" if len(runs) == 1 else "Settings that differ"
    return f"<h2>{heading}</h2>{_table(['', *(run.name for run in runs)], rows)}" if rows else ""


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _completions(run: Run) -> str:
    rows = run.samples[:_SAMPLES_SHOWN]
    columns = [
        key for key in ("prompt", "before", "after", "completion", "answer") if any(key in r for r in rows)
    ]
    if not rows:
        return ""
    head = "".join(f"<th>{_safe('right answer' if key == 'answer' else key)}</th>" for key in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td><pre{_mark(row, key)}>{_safe(row.get(key, ''))}</pre></td>" for key in columns)
        + "</tr>"
        for row in rows
    )
    return (
        f'<h2>Completions: {_safe(run.name)}</h2><div class="card"><table><tr>{head}</tr>{body}</table></div>'
    )


def _mark(row: dict[str, Any], key: str) -> str:
    """Green for a completion that is right, red for one that is not."""
    if key == "completion" and isinstance(row.get("reward"), int | float):
        right = row["reward"] >= 1.0
    elif key in ("before", "after") and "answer" in row:
        from gvpo.rewards.comparison import compare
        from gvpo.rewards.extraction import extract_answer

        found = extract_answer(str(row.get(key, "")))
        right = found is not None and compare(str(row["answer"]), found.text) is True
    else:
        return ""
    return ' class="right"' if right else ' class="wrong"'
