"""How many threads are chosen, and what is known of the machine."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gvpo import machine
from gvpo.machine import choose_threads, memory, usable_cores

Machine = Callable[..., None]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine of so many cores and such load, whose threads are counted and not changed."""
    threads = [8]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(cores: int = 8, usable: int = 8, load: float = 0.0, quota: str = "max 100000") -> None:
        threads[0] = cores
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        (tmp_path / "cpu.max").write_text(f"{quota}\n")

    return make


@pytest.mark.parametrize(
    ("machine_of", "processes", "threads"),
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 16, 1),
        ({"load": 5.4}, 1, 3),
        ({"load": 40.0}, 1, 1),
        ({"usable": 4, "load": 2.0}, 1, 4),
        ({"cores": 64, "usable": 64, "quota": "250000 100000"}, 1, 2),
        ({"cores": 64, "usable": 64, "quota": "50000 100000"}, 1, 1),
    ],
)
def test_as_many_threads_as_free_cores(
    machine_of: dict, processes: int, threads: int, made: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(**machine_of)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    said = choose_threads()
    assert torch.get_num_threads() == threads
    assert said.startswith(f"Threads: {threads} (")
    assert (f"for {processes} processes" in said) is (processes > 1)
    assert ("busy" in said) is bool(machine_of.get("load"))


def test_what_the_user_said_comes_first_and_then_how_a_run_began(
    made: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made()
    assert (
        choose_threads(most=1)
        == "Threads: 1 (8 cores; more would not help here; OMP_NUM_THREADS sets another number)."
    )
    made()
    assert choose_threads(run=tmp_path) == "Threads: 8 (8 cores; OMP_NUM_THREADS sets another number)."
    (tmp_path / "config.yaml").write_text("model: m\nthreads: 3\n")
    assert choose_threads(run=tmp_path) == "Threads: 3 (as this run began with)."
    made(cores=5)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert choose_threads(run=tmp_path, most=1) == "Threads: 5 (as OMP_NUM_THREADS says)."
    assert choose_threads(7, run=tmp_path) == "Threads: 7 (as you say)."
    assert torch.get_num_threads() == 7


def test_memory_and_cores_of_this_machine(made: Machine, tmp_path: Path) -> None:
    made(usable=3)
    assert usable_cores() == 3
    peak, total = memory()
    assert 2**26 < peak < total
    (tmp_path / "memory.max").write_text(f"{total // 2}\n")
    assert memory()[1] == total // 2
