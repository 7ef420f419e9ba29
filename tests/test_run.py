"""A run directory's records are whole, plain, and never mixed with an earlier run's."""

import json
from pathlib import Path

import pytest
import yaml

from gvpo.errors import InputError
from gvpo.run import RunDirectory, check_writable, plot_curves


def test_records_are_plain_json_and_yaml(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new" / "run")
    run.start({"beta": 0.1, "path": Path("x"), "betas": (0.9, 0.99)})
    run.log({"step": 1, "loss": float("nan"), "kl": 0.5})
    run.log({"step": 2, "loss": 0.25})
    run.finish({"accuracy": 1.0, "worst": float("inf")})
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        "beta": 0.1,
        "path": "x",
        "betas": [0.9, 0.99],
    }
    assert run.metrics() == [{"step": 1, "loss": None, "kl": 0.5}, {"step": 2, "loss": 0.25}]
    assert run.curve("loss") == ([2], [0.25])
    assert json.loads((run.path / "summary.json").read_text()) == {"accuracy": 1.0, "worst": None}
    assert not list(run.path.glob(".*"))


def test_new_run_drops_old_records_and_a_resumed_one_keeps_its_past(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.start({})
    for step in (1, 2, 3):
        run.log({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    run.start({}, resumed_at=2)
    run.log({"step": 3, "again": True})
    assert run.metrics() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    run.start({})
    assert run.metrics() == []


def test_lines_of_verl_s_file_logger_are_read_as_metrics(tmp_path: Path) -> None:
    line = {"step": 3, "data": {"critic/score/mean": 0.5, "timing_s/gen": 2.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert RunDirectory(tmp_path).curve("reward", "critic/score/mean") == ([3], [0.5])


def test_directories_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="choose another"):
            check_writable(path)
        with pytest.raises(InputError, match="choose another"):
            RunDirectory(path)
    check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_pictures_are_pngs(tmp_path: Path) -> None:
    plot_curves(tmp_path / "p.png", [("a", [("x", [1, 2], [3, 4])]), ("b", [])], title="t", x="step")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
