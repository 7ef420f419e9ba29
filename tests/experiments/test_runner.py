"""`gvpo lab` as it is used: files written, the same numbers with any number of workers, bad usage refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gvpo
from experiments import frontier
from gvpo.cli import main


def stops(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("command", ["optimum", "offline", "foreign", "frontier", "reuse", "all"])
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
