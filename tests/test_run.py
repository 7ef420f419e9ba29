"""A run directory's records are whole, plain, and never mixed with an earlier run's."""

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from gvpo.errors import InputError
from gvpo.run import RunDirectory, Ticker, check_writable, duration, plot_curves


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


def test_ticker_prints_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    ticker = Ticker(Console(file=out, force_terminal=False), "Work", 8)
    for done in (*range(1, 9), 8):
        ticker.advance(done)
    assert out.getvalue().splitlines() == ["Work 2/8", "Work 4/8", "Work 6/8", "Work 8/8"]


def test_ticker_tells_how_long_the_rest_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("gvpo.run.time.monotonic", lambda: now[0])
    ticker = Ticker(Console(file=out, width=40), "Work", 100)
    ticker.advance(20)  # resumed there, at no cost
    assert ticker.seconds_left(20) is None
    with ticker.running():
        for done, seconds in ((21, 9), (30, 91), (100, 7000)):
            now[0] += seconds
            ticker.advance(done, "so far", "fast")
    assert out.getvalue().splitlines() == [
        "Work 21/100  so far  fast  12 min left",
        "Work 30/100  so far  fast  12 min left",
        "Work 100/100  so far  fast",
    ]
    assert ticker.seconds_left(60) == 7100


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.4, 99, 100, 3599, 12_000)] == [
        "0 s",
        "99 s",
        "2 min",
        "1 h 00 min",
        "3 h 20 min",
    ]


def test_ticker_draws_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    ticker = Ticker(Console(file=out, force_terminal=True, width=120), "Work", 8)
    with ticker.running():
        ticker.advance(7, "loss 0.1", "3 tokens/s")
        ticker.advance(8)
    for shown in ("8/8", "loss 0.1", "3 tokens/s"):
        assert shown in out.getvalue()


def test_pictures_are_pngs(tmp_path: Path) -> None:
    plot_curves(tmp_path / "p.png", [("a", [("x", [1, 2], [3, 4])]), ("b", [])], title="t", x="step")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
