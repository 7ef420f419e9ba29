"""The replay buffer: speed, checkpoints, writers, a million groups, memory, and 200 kills of its writer.

    python -m benchmarks.replay_buffer [--kills 200] [--groups 1000000]

Groups of 8 completions of 256 tokens (about 9 kB), except for the million, which are small. Prints a table
and writes `results/replay_buffer.json`. Takes about five minutes and 1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, clock, in_fresh_process, machine, peak_of
from gvpo.replay import Group, ReplayBuffer

VOCABULARY = 150_000
K, TOKENS = 8, 256


def make_groups(count: int, k: int = K, tokens: int = TOKENS, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [
        Group.of(
            rng.integers(0, VOCABULARY, min(64, tokens)),
            list(rng.integers(0, VOCABULARY, (k, tokens))),
            rng.integers(0, 2, k).astype(float),
            reference="initial",
            reference_logps=-200 * rng.random(k),
            policy_step=i // 32,
            components={"accuracy": rng.random(k)},
        )
        for i in range(count)
    ]


def throughput(folder: Path, groups: int = 8192) -> dict[str, float]:
    """Groups per CPU second of this process."""
    made = make_groups(groups)
    out: dict[str, float] = {}
    for batch in (1, 32, 256):
        with ReplayBuffer(folder / str(batch), vocabulary_size=VOCABULARY, group_size=K, memory=0) as buffer:
            rounds = [made[i : i + batch] for i in range(0, groups // (8 if batch == 1 else 1), batch)]
            started = clock()
            for part in rounds:
                buffer.append(part)
            out[f"in, {batch} at a time"] = len(rounds) * batch / (clock() - started)
    with ReplayBuffer(folder / "256", memory=0) as buffer:
        for sampling in ("uniform", "reward_variance"):
            started = clock()
            drawn = sum(len(buffer.sample(64, sampling=sampling)) for _ in range(128))
            out[f"random out, 64 at a time, {sampling}"] = drawn / (clock() - started)
        buffer.sample(16)
        started = clock()
        for _ in range(256):
            buffer.sample(16)
        out["sample of 16: ms"] = (clock() - started) / 256 * 1000
    return {name: round(value, 2 if "ms" in name else None) for name, value in out.items()}


def checkpoints(folder: Path, groups: int = 2304) -> dict[str, float]:
    """Milliseconds to save and to go back, with about 23 MiB of groups, and bytes of all of it."""
    with ReplayBuffer(folder / "live", checkpoints=folder) as buffer:
        for start in range(0, groups, 32):
            buffer.append(make_groups(32, seed=start))
        started = time.monotonic()
        for i in range(20):
            buffer.save(folder / f"checkpoint-{i}" / "replay")
        saved = (time.monotonic() - started) / 20
        started = time.monotonic()
        for i in range(20):
            buffer.restore(folder / f"checkpoint-{i}" / "replay")
        restored = (time.monotonic() - started) / 20
        content = sum(buffer.index().tokens.tolist()) * 4 / 2**20
    size = sum(path.stat().st_size for path in (folder / "checkpoint-0").rglob("*") if path.is_file())
    return {
        "save into a checkpoint: ms (wall)": round(1000 * saved, 2),
        "go back to a checkpoint: ms (wall)": round(1000 * restored, 2),
        "a checkpoint: bytes": size,
        "tokens: MiB": round(content, 1),
        "the file: MiB": round((folder / "live" / "groups.sqlite").stat().st_size / 2**20, 1),
    }


def writers(folder: Path, count: int = 64) -> dict[str, float]:
    """Two processes that append 32 groups at a time, to a file each and to one: wall seconds."""
    out = {}
    for name, files in (("a file each", ("a", "b")), ("one file", ("c", "c"))):
        for path in set(files):
            with closing(sqlite3.connect(folder / path)) as db:
                db.executescript("PRAGMA journal_mode = WAL; CREATE TABLE contents (arrow BLOB)")
        fork = multiprocessing.get_context("fork")
        started = time.monotonic()
        processes = [fork.Process(target=_fill, args=(folder / path, count)) for path in files]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes)
        out[f"two writers, {name}: seconds for {count} appends each (wall)"] = time.monotonic() - started
    return {name: round(value, 2) for name, value in out.items()}


def _fill(path: Path, count: int) -> None:
    with closing(sqlite3.connect(path, timeout=60)) as db:
        for _ in range(count):
            rows = [(os.urandom(10_000),) for _ in range(32)]
            with db:
                db.executemany("INSERT INTO contents VALUES (?)", rows)


def memory(folder: Path) -> dict[str, float]:
    """MiB that a process grows by while it writes and reads 4,096 groups (36 MiB) under a limit."""
    limits = (0, 8, 64)
    return {
        f"memory limit of {limit} MiB: growth in MiB": in_fresh_process(growth, str(folder), limit)
        for limit in limits
    }


def growth(folder: str, limit: int) -> float:
    with ReplayBuffer(f"{folder}/memory-{limit}", memory=limit * 2**20) as buffer:
        buffer.append(make_groups(64))
        buffer.sample(64)

        def write_and_read() -> None:
            for i in range(1, 64):
                buffer.append(make_groups(64, seed=i))
            for _ in range(128):
                buffer.sample(64)

        return round(peak_of(write_and_read), 1)


def million(folder: Path, groups: int) -> dict[str, float]:
    """CPU seconds to open a buffer of many groups, and to sample from it."""
    made = make_groups(1000, k=2, tokens=4)
    with ReplayBuffer(folder / "million", capacity=groups) as buffer:
        for _ in range(groups // len(made)):
            buffer.append(made)
    started = clock()
    with ReplayBuffer(folder / "million", capacity=groups) as buffer:
        opened = clock() - started
        assert len(buffer) == groups // len(made) * len(made)
        started = clock()
        buffer.sample(64, sampling="recent", step=10**6)
        sampled = clock() - started
    return {
        f"opening {groups:,} groups: seconds": round(opened, 2),
        f"64 of {groups:,} by age: seconds": round(sampled, 2),
    }


def kills(folder: Path, count: int) -> dict[str, float]:
    """Kill a writing process at random moments, and compare all that is left with what was written."""
    rng = random.Random(0)
    committed = lost = corrupt = read = 0
    for kill in range(count):
        told, process = _writer(folder / "killed", committed)
        # Some die while they start, the others once they write.
        said = b"" if kill % 5 == 0 else os.read(told, 8)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with os.fdopen(told, "rb") as pipe:
            said += pipe.read()
        acknowledged = int.from_bytes(said[-8:], "little") if said else committed
        before = committed
        with ReplayBuffer(folder / "killed") as buffer:
            committed = buffer.next_number
            lost += max(0, acknowledged - committed)
            for number, group in zip(
                range(before, committed), buffer.read(range(before, committed)), strict=True
            ):
                corrupt += not _is(group, number)
                read += 1
    return {"kills": count, "groups committed": read, "groups lost": lost, "groups corrupt": corrupt}


def _writer(folder: Path, start: int) -> tuple[int, Any]:
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_write, args=(folder, writer, start))
    process.start()
    os.close(writer)
    return reader, process


def _numbered(number: int) -> Group:
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, TOKENS, K)
    return Group.of(
        rng.integers(0, VOCABULARY, 20),
        [rng.integers(0, VOCABULARY, n) for n in lengths],
        rng.random(K),
        reference="initial",
        reference_logps=-rng.random(K),
        policy_step=number,
    )


def _is(group: Group, number: int) -> bool:
    wanted = _numbered(number)
    pairs = [
        (getattr(group, n), getattr(wanted, n)) for n in ("prompt_ids", "token_ids", "lengths", "rewards")
    ]
    return group.policy_step == number and all(np.array_equal(a, b) for a, b in pairs)


def _write(folder: Path, report: int, start: int) -> None:
    buffer = ReplayBuffer(folder)
    rng, number = np.random.default_rng(start), start
    while True:
        count = int(rng.integers(1, 33))
        buffer.append([_numbered(n) for n in range(number, number + count)])
        number += count
        os.write(report, number.to_bytes(8, "little"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS / "replay_buffer.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = throughput(folder)
        results |= checkpoints(folder / "checkpoints")
        results |= writers(folder)
        results |= memory(folder)
        results |= kills(folder, arguments.kills)
        results |= million(folder, arguments.groups)
    table = Table(title="Replay buffer, k = 8, 256 tokens", show_header=False)
    for key, value in results.items():
        table.add_row(key, f"{value:,}")
    Console().print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results | {"machine": machine()}, indent=1) + "\n")
    if results["groups lost"] or results["groups corrupt"]:
        sys.exit("Committed groups were lost or corrupt.")


if __name__ == "__main__":
    main()
