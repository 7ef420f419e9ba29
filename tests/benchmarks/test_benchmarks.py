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
from benchmarks.gpu import SHAPES, compare_heads, compare_steps
from benchmarks.gpu import tiny as tiny_shape
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
@pytest.mark.parametrize("name", list(SHAPES))
def test_the_gpu_benchmark_runs_on_a_cpu(name):
    shape = tiny_shape(SHAPES[name], "cpu")
    rows = compare_heads(name, shape, 16, 1) + compare_steps(name, shape, 1)
    assert [row["what"] for row in rows][-3:] == ["step: gvpo", "step: floor", "step: trl"]
    assert all(row["tokens/s"] > 0 for row in rows)


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
