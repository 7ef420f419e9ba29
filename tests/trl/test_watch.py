"""What a run shows and keeps of itself while it trains."""

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from gvpo.run import RunDirectory
from gvpo.samples import read_samples
from gvpo.trl.watch import RunCallback
from tests.trl.common import dataset, digit_reward, trainer


def trained(folder: Path, console: Console | None = None, **changes: Any) -> RunDirectory:
    run = RunDirectory(folder)
    callback = RunCallback(run, console or Console(quiet=True))
    made = trainer(output_dir=str(folder), **changes)
    callback.attach(made)
    try:
        made.train()
    finally:
        callback.close()
    return run


def test_a_terminal_shows_curves_and_the_last_sample(tmp_path: Path) -> None:
    out = io.StringIO()
    run = trained(tmp_path, Console(file=out, force_terminal=True, color_system=None, width=100))
    last = out.getvalue().rpartition("GVPO ")[2]
    metrics, lines = run.metrics(), read_samples(tmp_path)
    assert "3/3" in last
    rewards = [entry["reward"] for entry in metrics if "reward" in entry]
    assert f"{rewards[-1]:.3g}" in next(line for line in last.splitlines() if line.startswith("reward"))
    assert "█" in last
    assert "s a step (" in last
    assert any(line.startswith("completion  ") for line in last.splitlines())
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is there again
    # What is kept is what was logged.
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [fmean(line["rewards"].values()) for line in lines] == pytest.approx(rewards, abs=1e-4)
    for one in (one for line in lines for one in line["samples"]):
        assert one["reward"] == pytest.approx(digit_reward([one["completion"]])[0], abs=1e-4)


def test_evaluations_larger_than_a_generation_keep_what_trl_keeps_of_them(tmp_path: Path) -> None:
    trained(
        tmp_path,
        eval_dataset=dataset(16),
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=64,
        max_steps=3,
    )
    (line,) = [line for line in read_samples(tmp_path) if line["held_out"]]
    assert line["step"] == 3
    assert len(line["rewards"]) == 8  # the last 32 of 64 completions, four for each prompt


def test_every_round_of_resampling_is_kept(tmp_path: Path) -> None:
    run = trained(tmp_path, dynamic_sampling="resample", max_steps=2)
    rounds = [int(entry["dynamic/rounds"]) for entry in run.metrics() if "dynamic/rounds" in entry]
    steps = [line["step"] for line in read_samples(tmp_path)]
    assert steps == [step for step, count in enumerate(rounds) for _ in range(count)]


def test_rows_without_a_reward_have_none(tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 4 == 0 else 1.0 for i in range(len(completions))]

    trained(tmp_path, rewards=reward, max_steps=1)
    (line,) = read_samples(tmp_path)
    assert set(line["rewards"].values()) == {1.0}
    assert {one["reward"] for one in line["samples"]} == {None}


def test_a_terminal_is_given_back_when_training_fails(tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        raise KeyboardInterrupt

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Console(file=out, force_terminal=True, width=80), rewards=reward)
    assert out.getvalue().endswith("\x1b[?25h")
