"""Shares of metrics, brought together; and the split of a step's time."""

import itertools
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gvpo.trl import GVPOTrainer
from gvpo.trl.metrics import PARTS, Share, Timing, gathered
from tests.trl.common import dataset, trainer


def test_shares_of_two_processes_are_the_metric_of_all() -> None:
    other = torch.tensor([[[6.0, 2.0], [4.0, 0.0], [9.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    shares = {
        "mean": Share(3.0, 1.0),
        "sum": Share(1.5),
        "largest": Share(7.0, 2.0, largest=True),
        "of nothing": Share(0.0, 0.0),
    }
    found = gathered(shares, lambda mine: torch.cat([mine, other]), torch.device("cpu"))
    assert found == {"mean": 3.0, "sum": 5.5, "largest": 9.0}
    assert gathered({}, lambda mine: mine, torch.device("cpu")) == {}


class Clock:
    """Goes on by what the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> None:
        self.now += seconds


def timing() -> tuple[Timing, Clock, dict[str, list[float]]]:
    metrics: dict[str, list[float]] = defaultdict(list)
    clock = Clock()
    times = Timing(metrics, torch.device("cpu"))
    times.clock = clock
    return times, clock, metrics


def test_time_belongs_to_the_innermost_part() -> None:
    times, clock, metrics = timing()
    with times.during("generation"):  # an evaluation, between steps
        clock.takes(100)
    times.on_step_begin()
    clock.takes(1)
    with times.during("generation"):
        clock.takes(2)
    with times.during("update"):
        clock.takes(4)
        with suppress(ValueError), times.during("scoring"):
            clock.takes(8)
            raise ValueError
        clock.takes(16)
    clock.takes(32)
    times.on_pre_optimizer_step()
    clock.takes(64)
    times.on_optimizer_step()
    metrics["gvpo/tokens"].append(635.0)
    times.on_step_end()
    clock.takes(100)
    assert {part: metrics[f"profiling/{part}"] for part in PARTS} == {
        "generation": [2], "rewards": [0], "reference": [0], "scoring": [8], "update": [84], "other": [33],
    }  # fmt: skip
    assert metrics["step_time"] == [127]
    assert metrics["tokens_per_second"] == [5]


def test_tokens_per_second_are_those_of_all_steps_since_the_last_log() -> None:
    times, clock, metrics = timing()
    for seconds, tokens in ((1, 10.0), (3, 20.0), (6, None)):  # the last step was skipped
        times.on_step_begin()
        clock.takes(seconds)
        if tokens is not None:
            metrics["gvpo/tokens"].append(tokens)
        times.on_step_end()
    assert metrics["tokens_per_second"] == [3]
    metrics.clear()
    times.on_step_begin()
    clock.takes(2)
    times.on_step_end()
    assert metrics["tokens_per_second"] == [0]
    assert "gvpo/tokens" not in metrics


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logging_steps": 2, "max_steps": 4, "steps_per_generation": 8},  # two updates a rollout
        {"reference": "initial", "replay_ratio": 1.0},
        {"reference": "initial", "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": dataset(8)},
    ],
)
def test_the_parts_of_a_trainer_s_step_add_up(changes: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(GVPOTrainer, output_dir=str(tmp_path), **changes)
    ticks = itertools.count()
    made.timing.clock = lambda: float(next(ticks))  # a second each time that it is asked
    made.train()
    entries = [entry for entry in made.state.log_history if "step_time" in entry]
    assert len(entries) == made.args.max_steps / made.args.logging_steps
    for entry in entries:
        parts = {part: entry[f"profiling/{part}"] for part in PARTS}
        assert sum(parts.values()) == pytest.approx(entry["step_time"])
        assert all(parts[part] > 0 for part in ("generation", "rewards", "scoring", "update", "other"))
        assert (parts["reference"] > 1) is (changes.get("reference") == "initial" or len(entries) == 2)
        assert entry["tokens_per_second"] == pytest.approx(entry["gvpo/tokens"] / entry["step_time"])
        assert 0 < entry["memory/peak_fraction"] < 1
        assert entry["memory/peak_gib"] > 0.1
    # Steps are made of what was sampled, each row once; and of what is replayed.
    made_of = sum(entry["gvpo/tokens"] * made.args.logging_steps for entry in entries)
    assert (made_of > entries[-1]["num_tokens"]) is ("replay_ratio" in changes)
    assert made_of >= entries[-1]["num_tokens"]
