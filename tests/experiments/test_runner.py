"""`gvpo lab` as it is used: files written, the same numbers with any number of workers, bad usage refused."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gvpo
from experiments import frontier
from experiments.comparison import Record, Scale
from experiments.runner import EXPERIMENTS, run_experiment
from gvpo.cli import main


def stops(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("command", [*EXPERIMENTS, "all"])
def test_each_experiment_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stops(["lab", command, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--seeds", "--quick", "--workers", "--output"))


def test_bad_usage_is_refused_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stops(["lab", "optimum", "--seeds", "1", "--output", str(tmp_path / "a")]) == 2
    assert "needs at least 2" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert stops(["lab", "optimum", "--output", str(tmp_path / "file" / "b")]) == 2
    assert stops(["lab", "show", "--output", str(tmp_path)]) == 2
    assert stops(["lab", "check", "--documentation", str(tmp_path / "docs")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_without_the_repository_one_sentence_says_where_it_is(tmp_path: Path) -> None:
    shutil.copytree(
        Path(gvpo.__file__).parent, tmp_path / "gvpo", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = subprocess.run(
        [sys.executable, "-m", "gvpo", "lab", "all"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gvpo: gvpo lab comes with the repository")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_leaves_its_records_and_can_be_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families = {name: frontier.FAMILIES[name] for name in ("gvpo", "grpo_k3")}
    monkeypatch.setattr(frontier, "FAMILIES", families)
    argv = ["lab", "frontier", "--quick", "--seeds", "2", "--workers", "1", "--output", str(tmp_path)]
    assert stops(argv) == 0
    run = tmp_path / "frontier"
    found = json.loads((run / "summary.json").read_text())
    assert {"config.yaml", "metrics.jsonl", "summary.json", "frontier.png"} <= {p.name for p in run.iterdir()}
    assert found["quick"]
    assert found["made"]["versions"]["trl"]
    assert len(found["rows"]) == 10
    for row in found["rows"]:
        assert -1e-3 < row["gap"]["mean"] < 0.5
        assert len(row["gap"]["seeds"]) == 2
    text = capsys.readouterr().out
    assert "GVPO, β 0.2" in text
    assert stops(["lab", "show", "--output", str(tmp_path)]) == 0
    assert json.loads((run / "summary.json").read_text()) == found


def test_an_interrupted_run_goes_on_where_it_was_and_only_if_its_settings_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    interrupts = iter((True, False, True, False))

    def run_job(name: str, scale: Scale, directory: Path) -> list[Record]:
        if name == "third" and next(interrupts):
            raise KeyboardInterrupt
        done.append(name)
        return [Record(name, "all", {"lr": 0.1}, seed, {"score": math.inf}) for seed in scale.all_seeds]

    fake = SimpleNamespace(
        jobs=lambda scale: ["first", "second", "third"],
        run_job=run_job,
        summary=lambda records, scale, directory: {"rows": [[r.arm, r.metrics["score"]] for r in records]},
        tables=lambda found: [],
        draw=lambda found, path: None,
    )
    monkeypatch.setitem(sys.modules, "experiments.fake", fake)
    scale = Scale.of(2, quick=True)
    with pytest.raises(KeyboardInterrupt):
        run_experiment("fake", scale, tmp_path)
    found = run_experiment("fake", scale, tmp_path)
    assert done == ["first", "second", "third"]
    assert [arm for arm, _ in found["rows"]] == ["first"] * 3 + ["second"] * 3 + ["third"] * 3
    assert not (tmp_path / "jobs.jsonl").exists()
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        run_experiment("fake", scale, tmp_path)
    run_experiment("fake", Scale.of(3, quick=True), tmp_path)
    assert done == ["first", "second", "first", "second", "third"]
