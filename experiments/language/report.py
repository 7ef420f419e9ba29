"""What the jobs found: intervals over seeds, curves along the training, distances from the best there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison import TUNING_SEED, Interval, Record
from experiments.report import COLOURS, by_condition, by_metric, legend_below, save

# Labels of arms, in tables and pictures; {} stands for the strength.
LABELS = {
    "gvpo": "GVPO, initial reference, β {}",
    "gvpo_rollout": "GVPO, rollout reference",
    "rloo": "RLOO, KL in the reward, β {}",
    "grpo_k3": "GRPO + corrected k3, β {}",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "gspo": "GSPO",
    "rft": "rejection-sampling SFT",
    "grpo_weighted": "GRPO, ratio to the sampler",
}
SOURCES = {
    "policy": "own",
    "stale": "own, stale",
    "logs": "another model's logs",
    "demonstrations": "a quarter demonstrations",
}


def records(outcomes: Sequence[Mapping[str, Any]]) -> list[Record]:
    """One for every evaluation of every job, and the start's: `start`, and `optimum` for each β."""
    found = []
    for outcome in outcomes:
        job, points = outcome["job"], outcome.get("points", [])
        source = job.get("source", "policy")
        if job["method"] == "logger":
            continue
        if job["method"] == "start":
            found.append(Record("start", job["task"], {"updates": 0}, job["seed"], points[0]))
            found += [
                Record("optimum", job["task"], {"beta": best.pop("beta")}, job["seed"], best)
                for best in map(dict, outcome["optimum"])
            ]
            continue
        for point in map(dict, points):
            setting = {
                "beta": job["strength"],
                "lr": outcome["rate"],
                "updates": point.pop("updates"),
                "source": source,
            }
            spent = {"seconds": outcome["seconds"]}
            found.append(Record(job["method"], job["task"], setting, job["seed"], point | spent))
    return found


def summary(found: Sequence[Record], seeds: Sequence[int]) -> dict[str, Any]:
    """For each task with its start and runs of these seeds: the start, π* for each β, and a row for each arm.

    Besides what was measured, rows say `gap`, by how much their reward is below that of π* at their KL, and
    `kept`, their number of different right answers as a share of that of π* at their reward. `off_policy`, if
    there was any: rows for each source of completions, and those of the same arms on their own.
    `tuning`, and `off_policy_tuning`: what each rate came to on the tuning seed.
    """
    seeds = list(seeds) or [TUNING_SEED]
    tasks = [record.condition for record in found if record.arm == "start"]
    by_task = {task: _summary([r for r in found if r.condition == task], seeds) for task in tasks}
    return {task: found for task, found in by_task.items() if found["rows"]}


def _summary(found: Sequence[Record], seeds: Sequence[int]) -> dict[str, Any]:
    best = [{**r.setting, **r.metrics} for r in found if r.arm == "optimum"]
    start = next(dict(r.metrics) for r in found if r.arm == "start")
    runs = sorted((r for r in found if r.arm in LABELS), key=_place)
    by_source = {source: [r for r in runs if r.setting["source"] == source] for source in SOURCES}
    rows = {source: _rows(runs, seeds, best) for source, runs in by_source.items()}
    betas = {row["setting"]["beta"] for row in rows["policy"] if row["arm"].startswith("gvpo ")}
    targets = [{"label": f"π* of β {p['beta']:g}", "condition": "", **p} for p in best if p["beta"] in betas]
    arms = {row["arm"] for source in SOURCES if source != "policy" for row in rows[source]}
    off_policy = [
        {**row, "condition": label}
        for source, label in SOURCES.items()
        for row in rows[source]
        if row["arm"] in arms
    ]
    found_off_policy = {
        "off_policy": off_policy,
        "off_policy_tuning": [
            {**row, "condition": f"{label}, {row['condition']}"}
            for source, label in SOURCES.items()
            if source != "policy"
            for row in _tuning(by_source[source])
        ],
    }
    return {
        "start": start,
        "optimum": best,
        "targets": targets,
        "rows": rows["policy"],
        "tuning": _tuning(by_source["policy"]),
    } | (found_off_policy if arms else {})


def _tuning(runs: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "arm": f"{run.arm} {run.setting['beta']:g}",
            "label": LABELS[run.arm].format(f"{run.setting['beta']:g}"),
            "condition": f"rate {run.setting['lr']:g}",
            **run.metrics,
        }
        for run in runs
        if run.seed == TUNING_SEED
    ]


def _place(run: Record) -> tuple[int, float, float]:
    return list(LABELS).index(run.arm), run.setting["beta"], run.setting["lr"]


def _rows(
    found: Sequence[Record], seeds: Sequence[int], best: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    shown = [r for r in found if r.seed in seeds]
    rates = {
        arm: {r.setting["lr"] for r in found if r.arm == arm and r.seed == TUNING_SEED} for arm in LABELS
    }
    rows = []
    for arm, beta, rate in dict.fromkeys((r.arm, r.setting["beta"], r.setting["lr"]) for r in shown):
        mine = [r for r in shown if (r.arm, r.setting["beta"], r.setting["lr"]) == (arm, beta, rate)]
        updates = sorted({r.setting["updates"] for r in mine})
        course = [
            {"updates": at, **_intervals([r for r in mine if r.setting["updates"] == at], best)}
            for at in updates
        ]
        # On the tuning seed alone, all rates are shown.
        chosen = "" if seeds != [TUNING_SEED] else f", rate {rate:g}"
        rows.append(
            {
                "arm": f"{arm} {beta:g}" + chosen,
                "label": LABELS[arm].format(f"{beta:g}") + chosen,
                "condition": mine[0].condition,
                "setting": {"lr": rate, "beta": beta},
                "tried": len(rates[arm]),
                "rate": rate,
                **course[-1],
                "course": course,
            }
        )
    return rows


def _intervals(runs: Sequence[Record], best: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    every = [dict(run.metrics) | _beside(run.metrics, best) for run in sorted(runs, key=lambda run: run.seed)]
    return {name: vars(Interval.of([metrics[name] for metrics in every])) for name in every[0]}


def _beside(metrics: Mapping[str, float], best: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`gap` and `kept`, by linear interpolation between the β."""
    by_kl = sorted(best, key=lambda point: point["kl"])
    by_reward = sorted(best, key=lambda point: point["reward"])
    reward = np.interp(metrics["kl"], [p["kl"] for p in by_kl], [p["reward"] for p in by_kl])
    distinct = np.interp(
        metrics["reward"], [p["reward"] for p in by_reward], [p["distinct"] for p in by_reward]
    )
    return {
        "gap": float(reward) - metrics["reward"],
        "kept": metrics["distinct"] / float(distinct) if distinct else float("nan"),
    }


_COLUMNS = {
    "reward": "reward",
    "kl": "KL, nats",
    "gap": "below π*",
    "entropy": "entropy",
    "distinct": "different right",
    "kept": "of π*'s",
    "pass@8": "pass@8",
    "seconds": "seconds",
    "rate": "rate",
}


def tables(found: Mapping[str, Any]) -> list[Any]:
    """Of each task, in pieces that a terminal can show."""
    made = []
    for task in found["tasks"]:
        rows = found[task]["rows"]
        columns = [(name, label) for name, label in _COLUMNS.items() if name in rows[0]]
        for at in range(0, len(columns), 5):
            made.append(by_metric(rows, dict(columns[at : at + 5]), f"{task}: held out, at the end"))
        for name in ("reward", "kl", "distinct"):
            if rows := found[task].get("off_policy"):
                title = f"{task}, by whose completions are trained on: {_COLUMNS[name]}"
                made += by_condition(rows, name, title, columns=4)
    return made


def draw(found: Mapping[str, Any], path: Path) -> None:
    """For each task reward against KL, and what is kept at a reward: along the training, and by strength."""
    from matplotlib.figure import Figure

    tasks, many = found["tasks"], found["problem"]["samples"]
    figure = Figure(figsize=(9.2, 3.6 * len(tasks) + 1.1), dpi=160, layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for task, (left, right) in zip(tasks, grid, strict=True):
        here = found[task]
        kept, label = "distinct", f"different right answers among {many}"
        if max(point["distinct"] for point in here["optimum"]) <= 1:  # one right answer: is it still found?
            kept = f"pass@{8 if many < 64 else 64}"
            label = kept
        for axis, x, y in ((left, "kl", "reward"), (right, "reward", kept)):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.plot(*_points(here["optimum"], x, y), color="black", linewidth=1, label="π* for each β")
            axis.plot(here["start"][x], here["start"][y], "s", color="black", markersize=4, label="start")
            _draw_arms(axis, here, x, y)
        left.set(
            xlabel=r"KL(π‖start), nats a completion", ylabel="reward", title=f"{task}: reward against KL"
        )
        right.set(xlabel="reward", ylabel=label, title=f"{task}: what is kept")
    legend_below(figure, grid[0, 0], columns=3)
    save(figure, path, found)


def _points(points: Sequence[Mapping[str, Any]], *names: str) -> list[list[float]]:
    return [[p[name]["mean"] if isinstance(p[name], Mapping) else p[name] for p in points] for name in names]


def _draw_arms(axis: Any, here: Mapping[str, Any], x: str, y: str) -> None:
    """Arms of several strengths: their ends joined. The others: their courses from the start."""
    families = dict.fromkeys(row["arm"].split()[0] for row in here["rows"])
    colours = [colour for colour in COLOURS if colour != "#000000"]  # π* is black
    for colour, family in zip(colours, families, strict=False):
        rows = [row for row in here["rows"] if row["arm"].split()[0] == family]
        label = LABELS[family].removesuffix(", β {}")
        if len({row["setting"]["beta"] for row in rows}) > 1:
            order = sorted(rows, key=lambda row: row["setting"]["beta"])
            axis.plot(
                *_points(order, x, y), "D-", color=colour, markersize=4, linewidth=1, label=f"{label} (β)"
            )
            continue
        for i, row in enumerate(rows):
            course = _points([here["start"], *row["course"]], x, y)
            named = label if i == 0 else None
            axis.plot(*course, "o:", color=colour, markersize=3, linewidth=0.8, label=named)
