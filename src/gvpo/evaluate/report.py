"""One self-contained HTML page about runs: curves overlaid, summaries, settings, completions.

Curves are embedded SVG drawn by matplotlib: a few kilobytes each, sharp at any size, and no script to load.
The page is the Jinja template `report.html.jinja`.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from gvpo.data.sources import read_file
from gvpo.errors import InputError, refused
from gvpo.progress import split_of
from gvpo.rewards.comparison import compare
from gvpo.rewards.extraction import extract_answer
from gvpo.run import METRICS, new_figure, points, read_metrics, replaced
from gvpo.samples import Line, Recorder, Sample, by_difficulty, read_samples, stories

# Title, the metric's names (the first that a run has counts), and the unit of the vertical axis.
PANELS = (
    ("Reward", ("reward", "critic/score/mean"), "mean per completion"),
    ("Reward, held out", ("eval_reward",), "mean per completion"),
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
    ("Age of the rollouts", ("staleness/age_mean",), "updates, mean"),
    ("Age of the oldest rollout", ("staleness/age_max",), "updates"),
    ("Groups of several versions", ("staleness/mixed_groups",), "share"),
    ("Responses of several versions", ("staleness/spanning_rows",), "share"),
    ("Age of the reference", ("staleness/reference_age",), "updates"),
)
DIFFICULTY = "Reward by difficulty"
_COLOURS = ("#1f5fa8", "#c8553d", "#2f8f5b", "#8a5bb0", "#b8860b", "#3f8c9b", "#a3485e", "#5a6570")
_ON_DARK = ("#6fa8e8", "#f08a72", "#66c793", "#bd93e0", "#dfb54a", "#71bfcd", "#e08aa0", "#a3aeb9")
_SAID = ("Creator", "Date", "Format", "Type")  # by matplotlib in a drawing, of itself
_SAMPLES_SHOWN = 20
Curves = dict[str, tuple[list[float], list[float]]]  # steps and values by title
Card = tuple[str, list[tuple[str, str, str]]]  # a prompt; labels, texts and how they are marked


@dataclass(frozen=True)
class Run:
    """What a run directory holds, under a name that is unique on the page.

    Attributes:
        samples: `prompt`, `before`, `after` and `answer` each, or `prompt`, `completion`, `answer`, `reward`.
        lines: of `gvpo.samples`; of an evaluation one.
    """

    name: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    samples: list[dict[str, Any]]
    lines: list[Line]


def write_report(paths: Sequence[Path], output: Path, *, title: str = "GVPO runs") -> int:
    """Write the page of some run directories, whole or not at all; its size in bytes.

    Raises:
        InputError: a path is no run directory, a file in it cannot be read, or the page cannot be written.
    """
    names = [path.resolve().name for path in paths]
    runs = [
        load_run(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]
    page = render(runs, title).encode("utf-8")
    with refused(f"{output} cannot be written", "choose another", OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced(output) as aside:
            aside.write_bytes(page)
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
    samples, lines = _samples(path)
    return Run(name, read_metrics(path / METRICS), summary, config, samples, [*read_samples(path), *lines])


def _load(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    kinds = (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError)
    with refused(f"{path} cannot be parsed", "remove or repair it", kinds):
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    if not isinstance(value, kind | None):
        raise InputError(f"{path} does not hold what it should ({kind.__name__}): remove or repair it.")
    return value


def _samples(path: Path) -> tuple[list[dict[str, Any]], list[Line]]:
    """Rows to show, and of an evaluation what all of its prompts got."""
    rows = _load(path / "samples.json", list)
    if rows is not None:
        return [row for row in rows if isinstance(row, dict)][:_SAMPLES_SHOWN], []
    if not (path / "samples.parquet").is_file():
        return [], []
    rows = list(read_file(path / "samples.parquet"))
    graded = [Sample(str(row["prompt"]), "", row["reward"]) for row in rows if "reward" in row]
    return rows[:_SAMPLES_SHOWN], [Recorder().line(0, graded, held_out=True) | {"samples": []}]


# --- The page -----------------------------------------------------------------------------------------------


def render(runs: Sequence[Run], title: str) -> str:
    """The page's HTML. Everything that comes from a run is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("gvpo.evaluate", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    evaluated = [run for run in runs if isinstance(run.summary.get("metrics"), dict)]
    curves = [_curves(run) for run in runs]
    panels = _panels(runs, curves)
    settings = [_flat(run.config) for run in runs]
    if len(runs) > 1:  # those in which they differ
        keys = {
            key for one in settings for key in one if len({str(other.get(key, "")) for other in settings}) > 1
        }
        settings = [{key: value for key, value in one.items() if key in keys} for one in settings]
    return environment.get_template("report.html.jinja").render(
        title=title,
        runs=runs,
        colours=list(zip(_COLOURS, _ON_DARK, strict=True)),
        panels=panels,
        by_difficulty=any(heading.startswith(DIFFICULTY) for heading, _ in panels),
        ends=_ends([run.name for run in runs], curves),
        evaluated=[(run.name, run.summary["metrics"]) for run in evaluated],
        summaries=[(run.name, _plain(run.summary)) for run in runs],
        settings=[(run.name, one) for run, one in zip(runs, settings, strict=True)],
        samples=[(run.name, cards) for run in runs if (cards := _cards(run))],
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
    return f"{value:,}" if isinstance(value, int) else _number(value)


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.{3 if sign else 4}g}"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        flat |= inner
    return flat


def _ends(names: Sequence[str], curves: Sequence[Curves]) -> list[tuple[str, dict[str, str]]]:
    """Each run's last values, with their differences from the first run's."""
    ends = [{title: fmean(ys[-max(1, len(ys) // 10) :]) for title, (_, ys) in one.items()} for one in curves]
    titles = [title for title, _, _ in PANELS if any(title in end for end in ends)]

    def told(end: dict[str, float], title: str) -> str:
        last, first = end.get(title), ends[0].get(title)
        if last is None:
            return ""
        apart = "" if end is ends[0] or first is None else f" ({_number(last - first, '+')})"
        return _number(last) + apart

    return [
        (name, {title: told(end, title) for title in titles}) for name, end in zip(names, ends, strict=True)
    ]


# --- Completions --------------------------------------------------------------------------------------------


def _cards(run: Run) -> list[Card]:
    """Prompts and what was answered: early, in the middle and late, and before and after."""
    cards: list[Card] = []
    for story in stories(run.lines):
        marks = []
        for step, one in story.answers:
            told = "no reward" if one.reward is None else f"reward {_number(one.reward)}"
            marks.append((f"step {step}: {told}", one.completion, _mark_reward(one.reward)))
        cards.append((story.prompt + " (held out)" * story.held_out, marks))
    for row in run.samples:
        texts = {key: str(row[key]) for key in ("before", "after", "completion", "answer") if key in row}
        marks = [("right answer" if k == "answer" else k, text, _mark(row, k)) for k, text in texts.items()]
        cards.append((str(row.get("prompt", "")), marks))
    return cards


def _mark_reward(reward: Any) -> str:
    """Green for a reward of 1 or more, red for 0 or less."""
    if not isinstance(reward, int | float):
        return ""
    return "right" if reward >= 1 else "wrong" if reward <= 0 else ""


def _mark(row: dict[str, Any], key: str) -> str:
    """Green for an answer that is right, red for one that is not."""
    if key == "completion":
        return _mark_reward(row.get("reward"))
    if key not in ("before", "after") or "answer" not in row:
        return ""
    found = extract_answer(str(row[key]))
    return _mark_reward(int(found is not None and compare(str(row["answer"]), found.text) is True))


# --- Curves -------------------------------------------------------------------------------------------------


def _curves(run: Run) -> Curves:
    """The metrics that a run has, each by the first of its names that was logged."""
    found = {}
    for title, names, _ in PANELS:
        for curve in [curve for name in names if (curve := points(run.metrics, name))[0]][:1]:
            found[title] = curve
    return found


def _panels(runs: Sequence[Run], curves: Sequence[Curves]) -> list[tuple[str, str]]:
    """Title and drawing of every metric that a run has, and of what its steps and its prompts tell."""
    panels: dict[str, str] = {}

    def draw(title: str, unit: str, how: Callable[..., None], what: Any, x: str = "optimizer step") -> None:
        if what:
            panels[title] = _drawing(title, unit, partial(how, what), x)

    for title, _, unit in PANELS:
        draw(title, unit, _overlaid, [(i, *one[title]) for i, one in enumerate(curves) if title in one])
    names = [f": {run.name}" * (len(runs) > 1) for run in runs]
    for name, run in zip(names, runs, strict=True):
        draw(f"Where the time goes{name}", "seconds a step", _stacked, split_of(run.metrics))
    for held_out, which in ((False, ""), (True, ", held out")):
        for name, run in zip(names, runs, strict=True):
            thirds = by_difficulty(run.lines, held_out=held_out)
            draw(f"{DIFFICULTY}{which}{name}", "mean reward", _labelled, thirds, "visit of the prompt")
    exams = [line for run in runs if "metrics" in run.summary for line in run.lines]
    thirds = by_difficulty(exams, held_out=True)
    draw(f"{DIFFICULTY}, by evaluations", "mean reward", _labelled, thirds, "evaluation")
    return list(panels.items())


def _overlaid(curves: Sequence[tuple[int, list[float], list[float]]], axis: Any) -> None:
    for index, steps, values in curves:
        marker = "o" if len(steps) < 40 else None
        axis.plot(steps, values, color=_COLOURS[index % len(_COLOURS)], lw=1.6, marker=marker, ms=3)


def _labelled(curves: Sequence[tuple[str, list[float]]], axis: Any) -> None:
    for (label, values), colour in zip(curves, _COLOURS, strict=False):
        axis.plot(range(1, len(values) + 1), values, color=colour, lw=1.6, marker="o", ms=3, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7, frameon=False, title="first reward", title_fontsize=7)


def _stacked(split: Sequence[tuple[float, dict[str, float]]], axis: Any) -> None:
    steps, seconds = [step for step, _ in split], [parts for _, parts in split]
    if len(steps) == 1:  # as a block, or nothing would be seen
        steps, seconds = [steps[0] - 0.5, steps[0] + 0.5], seconds * 2
    layers = [[one[part] for one in seconds] for part in seconds[0]]
    axis.stackplot(steps, layers, labels=list(seconds[0]), colors=_COLOURS, lw=0)
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a tenth of a point, on one line."""
    line = attribute[0].replace("\n", "")
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", line)


def _drawing(title: str, unit: str, draw: Callable[[Any], None], x: str = "optimizer step") -> str:
    import matplotlib
    from markupsafe import Markup

    # Text as text keeps it small and selectable; the fixed salt makes the same runs give the same page.
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(style):
        figure, (axis,) = new_figure(width=4.6, height=3.0)
        draw(axis)
        axis.set_xlabel(x, fontsize=9)
        axis.set_ylabel(unit, fontsize=9)
        axis.tick_params(labelsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_SAID))
    drawing = buffer.getvalue().replace("#000000", "currentColor")
    drawing = re.sub(r'"[^"]*"', _rounded, re.sub(r">\s+<", "><", drawing))
    for number, colour in enumerate(_COLOURS):  # by number, as a dark page has others
        drawing = drawing.replace(colour, f"var(--c{number})")
    return Markup(drawing[drawing.index("<svg") :])
