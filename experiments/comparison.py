"""How algorithms are compared: as many settings for each, chosen on one seed, reported on others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.losses import Loss
from gvpo.errors import InputError

Setting = dict[str, float]
TUNING_SEED = 900
FIRST_SEED = 20

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True)
class Scale:
    """How much to run.

    Attributes:
        seeds: what is reported is over these.
        quick: fewer steps and settings: to see that it works, not to conclude from.
    """

    seeds: tuple[int, ...]
    quick: bool

    @classmethod
    def of(cls, seeds: int, quick: bool) -> Scale:
        """`seeds` seeds, none of which is the one that settings are chosen on."""
        if seeds < 2:
            raise InputError(f"--seeds {seeds}: an interval needs at least 2.")
        return cls(tuple(range(FIRST_SEED, FIRST_SEED + seeds)), quick)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return (TUNING_SEED, *self.seeds)

    def cut(self, *values: float) -> tuple[float, ...]:
        """The first of these alone in a quick run."""
        return values[:1] if self.quick else values


@dataclass(frozen=True)
class Arm:
    """An algorithm and the settings that it may choose from.

    Attributes:
        name, label: in JSON, and in tables and pictures.
        loss: from a setting without its learning rate.
        grid: settings; each has an "lr", the learning rate.
        one_setting: choose one for all conditions together, rather than one for each.
    """

    name: str
    label: str
    loss: Callable[..., Loss]
    grid: Sequence[Setting]
    one_setting: bool = False

    def by_loss(self) -> list[tuple[Setting, list[float]]]:
        """The settings of the loss, with the learning rates to try for each."""
        found: list[tuple[Setting, list[float]]] = []
        for setting in self.grid:
            rest = {key: value for key, value in setting.items() if key != "lr"}
            rates = next((rates for seen, rates in found if seen == rest), None)
            if rates is None:
                found.append((rest, [setting["lr"]]))
            else:
                rates.append(setting["lr"])
        return found


def grid(rates: Iterable[float], **choices: Iterable[float]) -> list[Setting]:
    """All combinations of learning rates and of the loss's settings."""
    settings: list[Setting] = [{"lr": rate} for rate in rates]
    for name, values in choices.items():
        settings = [{**setting, name: value} for value in values for setting in settings]
    return settings


@dataclass(frozen=True)
class Record:
    """One run's outcome."""

    arm: str
    condition: str
    setting: Setting
    seed: int
    metrics: Mapping[str, float]


def named(arms: Sequence[Arm], name: str) -> Arm:
    return next(arm for arm in arms if arm.name == name)


def tune_and_report(
    arm: Arm, scale: Scale, metric: str, run: Callable[[Setting, int], Record]
) -> list[Record]:
    """All settings on the tuning seed, then the one of the highest `metric` on the others."""
    tuned = [run(setting, TUNING_SEED) for setting in arm.grid]
    best = max(tuned, key=lambda record: record.metrics[metric]).setting
    return tuned + [run(best, seed) for seed in scale.seeds]


def under(part: str, records: Iterable[Record]) -> list[Record]:
    """The records of a part of an experiment, their conditions marked by its name."""
    return [replace(record, condition=f"{part}: {record.condition}") for record in records]


def of_part(mark: str, records: Iterable[Record]) -> list[Record]:
    """Those whose condition begins with `mark`, without it."""
    return [
        replace(record, condition=record.condition.removeprefix(mark))
        for record in records
        if record.condition.startswith(mark)
    ]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float
    seeds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        mean = statistics.fmean(values)
        if len(values) < 2 or not math.isfinite(mean):
            return cls(mean, mean, mean, list(values))
        quantile = _T975[len(values) - 2] if len(values) - 2 < len(_T975) else 1.96
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, list(values))


def summarise(
    arms: Sequence[Arm], records: Sequence[Record], metric: str, *, highest: bool = False
) -> list[dict[str, Any]]:
    """For each arm and condition the setting that was best on the tuning seed, and its metrics on the others.

    Args:
        arms: in the order of the result.
        records: of all of them, the tuning seed's and those of the reported seeds.
        metric: what is tuned; smallest is best.
        highest: largest is best.

    Returns:
        Rows of plain values: arm, label, condition, setting, tried (how many settings), and for every metric
        an `Interval` as a dictionary.
    """
    rows = []
    for arm in arms:
        mine = [r for r in records if r.arm == arm.name]
        conditions = list(dict.fromkeys(r.condition for r in mine))
        shared = _best(mine, metric, highest, joint=True) if arm.one_setting else None
        for condition in conditions:
            here = [r for r in mine if r.condition == condition]
            setting = shared or _best(here, metric, highest)
            final = sorted(
                (r for r in here if r.setting == setting and r.seed != TUNING_SEED), key=lambda r: r.seed
            )
            names = final[0].metrics
            rows.append(
                {
                    "arm": arm.name,
                    "label": arm.label,
                    "condition": condition,
                    "setting": setting,
                    "tried": len({tuple(sorted(r.setting.items())) for r in here if r.seed == TUNING_SEED}),
                    **{name: vars(Interval.of([float(r.metrics[name]) for r in final])) for name in names},
                }
            )
    return rows


def _best(records: Sequence[Record], metric: str, highest: bool, joint: bool = False) -> Setting:
    """By the tuning seed; over several conditions by the mean logarithm, for they differ in magnitude."""
    scores: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for record in records:
        if record.seed == TUNING_SEED:
            value = float(record.metrics[metric])
            if not math.isfinite(value):
                value = -math.inf if highest else math.inf
            elif joint:
                value = math.log(max(value, 1e-16))
            scores.setdefault(tuple(sorted(record.setting.items())), []).append(value)
    means = {setting: statistics.fmean(values) for setting, values in scores.items()}
    ordered = sorted(means, key=lambda setting: means[setting], reverse=highest)
    return dict(ordered[0])
