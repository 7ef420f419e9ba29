"""One self-contained HTML page about runs: curves overlaid, summaries, settings, completions.

Curves are embedded SVG drawn by matplotlib: a few kilobytes each, sharp at any size, and no script to load.
The page is the Jinja template `report.html.jinja`.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from gvpo.data.sources import read_file
from gvpo.errors import InputError
from gvpo.run import METRICS, new_figure, points, read_metrics, replaced

# Title, the metric's names (the first that a run has counts), and the unit of the vertical axis.
PANELS = (
    ("Reward", ("reward", "critic/score/mean"), "mean per completion"),
    ("Accuracy", ("accuracy", "eval_accuracy", "rewards/accuracy/mean"), "share right"),
    ("Explained variance", ("gvpo/explained_variance",), "1: the optimum"),
    ("KL to the reference", ("gvpo/kl", "kl"), "nats"),
    ("Length", ("completions/mean_length", "response_length/mean"), "tokens"),
    ("Weight spread", ("gvpo/weight_abs_mean",), "mean |w|"),
    ("Entropy", ("entropy", "actor/entropy"), "nats per token"),
    ("Loss", ("loss", "gvpo/loss"), ""),
    ("Time per step", ("step_time", "timing_s/step"), "seconds"),
    ("Speed", ("tokens_per_second",), "tokens per second"),
    ("Memory", ("memory/peak_gib", "perf/max_memory_reserved_gb"), "GiB at the peak so far"),
    ("Tokens", ("num_tokens",), "so far"),
)
# What a step's seconds went to: names of ours and of verl, where an update's time has its scoring in it.
SPLIT = {
    "generation": ("profiling/generation", "timing_s/gen"),
    "rewards": ("profiling/rewards", "timing_s/reward"),
    "reference": ("profiling/reference", "timing_s/ref"),
    "scoring": ("profiling/scoring", "timing_s/old_log_prob", "timing_s/gvpo_score"),
    "update": ("profiling/update", "timing_s/update_actor"),
}
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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced(output) as aside:
            aside.write_bytes(page)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another.") from error
    return len(page)


# --- Reading ------------------------------------------------------------------------------------------------


def load_run(path: Path, name: str) -> Run:
    """Read a run directory.

    Raises:
        InputError: it holds neither metrics nor a summary, or a file of it cannot be read.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a run directory: give the folder that a gvpo command wrote.")
    if not (path / METRICS).is_file() and not (path / "summary.json").is_file():
        raise InputError(f"{path} holds neither {METRICS} nor summary.json: give a finished or running run.")
    summary, config = (_load(path / file, dict) or {} for file in ("summary.json", "config.yaml"))
    return Run(name, read_metrics(path / METRICS), summary, config, _samples(path))


def _load(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be parsed: remove or repair it.") from error
    if not isinstance(value, kind | None):
        raise InputError(f"{path} does not hold what it should ({kind.__name__}): remove or repair it.")
    return value


def _samples(path: Path) -> list[dict[str, Any]]:
    rows = _load(path / "samples.json", list)
    if rows is not None:
        return [row for row in rows if isinstance(row, dict)][:_SAMPLES_SHOWN]
    samples = path / "samples.parquet"
    return list(islice(read_file(samples), _SAMPLES_SHOWN)) if samples.is_file() else []


# --- The page -----------------------------------------------------------------------------------------------


def render(runs: Sequence[Run], title: str) -> str:
    """The page's HTML. Everything that comes from a run is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("gvpo.evaluate", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    evaluated = [run for run in runs if isinstance(run.summary.get("metrics"), dict)]
    settings = [_flat(run.config) for run in runs]
    if len(runs) > 1:  # those in which they differ
        keys = {
            key for one in settings for key in one if len({str(other.get(key, "")) for other in settings}) > 1
        }
        settings = [{key: value for key, value in one.items() if key in keys} for one in settings]
    return environment.get_template("report.html.jinja").render(
        title=title,
        runs=runs,
        colours=_COLOURS,
        panels=_panels(runs),
        evaluated=[(run.name, run.summary["metrics"]) for run in evaluated],
        summaries=[(run.name, _plain(run.summary)) for run in runs],
        settings=[(run.name, one) for run, one in zip(runs, settings, strict=True)],
        shown=("prompt", "before", "after", "completion", "answer"),
        mark=_mark,
    )


def _plain(summary: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("_", " "): v for key, v in summary.items() if not isinstance(v, dict | list)}


def _cell(value: Any, name: str) -> str:
    """A number, a text, or a figure of an evaluation with its interval."""
    from markupsafe import Markup

    if isinstance(value, dict):
        style = "{:.1f}" if name == "tokens" else "{:.1%}"
        parts = [style.format(value[key]) for key in ("mean", "low", "high") if key in value]
        return Markup('{} <span class="muted">{} – {}</span>').format(*parts) if len(parts) == 3 else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        flat |= inner
    return flat


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
    return "right" if right else "wrong"


# --- Curves -------------------------------------------------------------------------------------------------


def _panels(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Title and drawing of every metric that a run has."""
    panels = []
    for title, names, unit in PANELS:
        curves = [
            (index, *next((found for name in names if (found := points(run.metrics, name))[0]), ([], [])))
            for index, run in enumerate(runs)
        ]
        if any(steps for _, steps, _ in curves):
            with_values = [curve for curve in curves if curve[1]]
            panels.append((title, _drawing(title, unit, partial(_overlaid, with_values))))
    for run in runs:
        if steps := split_of(run.metrics):
            title = "Where the time goes" + f": {run.name}" * (len(runs) > 1)
            panels.append((title, _drawing(title, "seconds a step", partial(_stacked, steps))))
    return panels


def split_of(metrics: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
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


def _overlaid(curves: Sequence[tuple[int, list[float], list[float]]], axis: Any) -> None:
    for index, steps, values in curves:
        marker = "o" if len(steps) < 40 else None
        axis.plot(steps, values, color=_COLOURS[index % len(_COLOURS)], lw=1.6, marker=marker, ms=3)


def _stacked(split: Sequence[tuple[float, dict[str, float]]], axis: Any) -> None:
    steps, seconds = [step for step, _ in split], [parts for _, parts in split]
    if len(steps) == 1:  # as a block, or nothing would be seen
        steps, seconds = [steps[0] - 0.5, steps[0] + 0.5], seconds * 2
    layers = [[one[part] for one in seconds] for part in seconds[0]]
    axis.stackplot(steps, layers, labels=list(seconds[0]), colors=_COLOURS, lw=0)
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _drawing(title: str, unit: str, draw: Callable[[Any], None]) -> str:
    import matplotlib
    from markupsafe import Markup

    # Text as text keeps it small and selectable; the fixed salt makes the same runs give the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure, (axis,) = new_figure(width=4.6, height=3.0)
        draw(axis)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylabel(unit, fontsize=9)
        axis.tick_params(labelsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    return Markup(drawing[drawing.index("<svg") :])
