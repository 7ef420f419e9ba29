"""The benchmarks run, at sizes whose times mean nothing; what they compare makes the same gradients."""

import importlib
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.__main__ import NAMES
from benchmarks.gpu import LIMITS, Part
from benchmarks.measure import Laps, in_fresh_process, minima, peak_of, write


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_runs_and_compares_like_with_like(name, tmp_path):
    module = importlib.import_module(f"benchmarks.{name}")
    rows = module.run(True)
    assert rows
    for row in rows:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        assert numbers or name == "families"  # its cells are words
        assert all(math.isfinite(value) for value in numbers.values()), row
        assert all(value > 0 for key, value in numbers.items() if key.endswith(" s")), row
        for key in ("gradient difference", "gradient vs floor", "tokens that differ"):
            assert row.get(key, 0) < 1e-5, row
    write(tmp_path, name, module.ABOUT, rows)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["rows"] == rows
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LIMITS if name != "tests"])
def test_each_part_of_make_gpu_runs_on_a_cpu(name, tmp_path, monkeypatch):
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    if name == "exactness":
        monkeypatch.setattr(module, "CASES", module.CASES[1:8:3])
    part = Part(name, module.ABOUT, "cpu", True, tmp_path)
    module.run(part)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["rows"] == json.loads(json.dumps(part.rows))
    for row in part.rows:
        assert "note" not in row or name in ("vllm", "train"), row
        assert row.get("difference", 0) < 0.02, row
        assert all(value > 0 for key, value in row.items() if key in ("s", "whole s", "shared s")), row


def test_a_part_of_make_gpu_keeps_going(tmp_path):
    part = Part("head", "", "cpu", True, tmp_path)
    part.attempt({"what": "first"}, lambda: {"s": 1 / 0})
    part.attempt({"what": "second"}, lambda: {"s": 1.0})
    rows = json.loads((tmp_path / "head.json").read_text())["rows"]
    assert rows == [
        {"what": "first", "note": "ZeroDivisionError: division by zero"},
        {"what": "second", "s": 1.0},
    ]


@pytest.mark.slow
def test_make_gpu_reports_what_fails_and_goes_on(tmp_path):
    """A model without a tokenizer fails one part; the other, which wants vLLM, says so."""
    (tmp_path / "config.json").write_text("{}")
    options = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--model", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "train", "vllm", *options], capture_output=True, text=True
    )
    train, vllm = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "vllm"))
    assert done.returncode == 0
    assert train["status"] == vllm["status"] == "done"
    assert "note" in train["rows"][0]
    assert "vllm is not installed" in vllm["rows"][0]["note"]


def test_minima_take_parts_apart_and_leave_the_first_round_out():
    rounds = iter([[0.0, 0.0], [3.0, 1.0], [1.0, 5.0]])
    once = iter([7.0])
    best = minima({"parts": lambda: next(rounds), "once": lambda: next(once)}, 2, seldom={"once": 0})
    assert best == {"parts": 2.0, "once": 7.0}


def test_laps_measure_this_process_only():
    laps = Laps()
    time.sleep(0.2)
    laps()
    assert laps.seconds[0] < 0.1


def allocate(mib):
    return peak_of(lambda: bytearray(mib << 20))


@pytest.mark.slow
def test_peak_memory_in_a_fresh_process():
    assert 99 < in_fresh_process(allocate, 100) < 110


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "no benchmark is called nonsense"), (["--tiny"], "needs --output")],
)
def test_bad_usage_exits_with_two(arguments, message):
    done = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
