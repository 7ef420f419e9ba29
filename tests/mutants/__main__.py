"""Do the tests notice mistakes? Makes each one of `list.toml` in a copy of the tree and runs its tests.

    python -m tests.mutants                   all of them: results/mutants.json
    python -m tests.mutants --only trust      those with "trust" in file or name; other results stay

Each runs in a process of its own, forked from one that has the libraries already. A mutant is killed when a
test fails; tests that end otherwise, or that fail without any mistake, are an error of the list.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import conftest
from tests.mutants.mutants import ROOT, Mutant, listed

SECONDS = 300  # for the tests of a mutant; more is a kill too, if of another kind
FORK = multiprocessing.get_context("fork")


class FirstFailure:
    """A plugin of pytest that writes down which test failed first."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid, encoding="utf-8")


def child(tree: Path, mutant: Mutant | None, tests: str) -> None:
    """Run the tests in the tree, as a process group that can be killed at once."""
    os.setpgrp()
    log = os.open(tree / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if mutant is not None:
        mutant.apply(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "gvpo")]:
        del sys.modules[name]
    sys.path[:0] = [str(tree), str(tree / "src")]
    os.environ["PYTHONPATH"] = f"{tree / 'src'}:{tree}"
    os.chdir(tree)

    import pytest

    words = shlex.split(f"-x -q -p no:cacheprovider -p no:xdist --hypothesis-seed=0 {tests}")
    code = pytest.main(words, plugins=[FirstFailure(tree / "failed.txt")])
    os._exit(int(code))


def copied(source: Path) -> Path:
    """What tests need of a tree."""
    target = Path(tempfile.mkdtemp())
    for name in ("src", "tests"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", target)
    return target


class Job:
    """The tests of one mutant (or of none) in a tree of their own, a copy of `source`."""

    def __init__(self, source: Path, mutant: Mutant | None, tests: str) -> None:
        self.mutant, self.tests, self.started = mutant, tests, time.monotonic()
        self.tree = copied(source)
        self.process = FORK.Process(target=child, args=(self.tree, mutant, tests))
        self.process.start()

    def outcome(self) -> tuple[str, str] | None:
        """Killed, survived, time limit or error, with the test or what was printed; None: still at it."""
        late = time.monotonic() - self.started > SECONDS
        if self.process.is_alive() and not late:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # whatever the tests have started, too
        self.process.join()
        failed, log = self.tree / "failed.txt", self.tree / "log.txt"
        found: tuple[str, str]
        if late:
            found = "time limit", ""
        elif self.process.exitcode == 1 and failed.exists():
            found = "killed", failed.read_text(encoding="utf-8")
        elif self.process.exitcode == 0:
            found = "survived", ""
        else:
            found = "error", log.read_text(encoding="utf-8", errors="replace")[-3000:]
        shutil.rmtree(self.tree, ignore_errors=True)
        return found


def run_all(
    work: list[tuple[Mutant | None, str]], workers: int, output: Path | None = None
) -> list[dict[str, Any]]:
    """The outcome of each, as many at a time as there are workers; written to `output` as they come."""
    source = copied(ROOT)  # whoever goes on working meanwhile does not change what is tested
    waiting, running, done = list(work), [], []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Job(source, *waiting.pop(0)))
        time.sleep(0.1)
        for job in list(running):
            if (found := job.outcome()) is None:
                continue
            running.remove(job)
            seconds = round(time.monotonic() - job.started, 1)
            name = job.mutant.name if job.mutant else f"no mistake: {job.tests}"
            file = job.mutant.file if job.mutant else ""
            print(
                f"{len(done) + 1:3d}/{len(work)} {found[0]:10s} {seconds:5.0f} s  {file}  {name}", flush=True
            )
            if found[0] == "error":
                print(found[1])
            done.append(
                {
                    "file": file,
                    "mutant": name,
                    "outcome": found[0],
                    "by": found[1],
                    "seconds": seconds,
                    "equivalent": job.mutant.equivalent if job.mutant else "",
                }
            )
            if output is not None:
                write(output, done)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of files or names of the wanted mutants"
    )
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "mutants.json", help="the results")
    arguments = parser.parse_args()
    # Their libraries; `child` imports all that is ours again.
    import tests.test_objective
    import tests.trl.oracle  # noqa: F401

    chosen = [m for m in listed() if any(part in m.file or part in m.name for part in arguments.only)]
    plain = run_all([(None, tests) for tests in dict.fromkeys(m.tests for m in chosen)], arguments.workers)
    if any(entry["outcome"] != "survived" for entry in plain):
        print("Some tests do not pass without any mistake: nothing can be told from them.")
        return 1
    done = run_all([(m, m.tests) for m in chosen], arguments.workers, arguments.output)
    alive = [entry for entry in done if entry["outcome"] in ("survived", "error") and not entry["equivalent"]]
    print(f"{len(done) - len(alive)} of {len(done)} as they should be.")
    return int(bool(alive))


def write(path: Path, done: list[dict[str, Any]]) -> None:
    """Put outcomes into the results, beside those of mutants that were not run."""
    known = json.loads(path.read_text(encoding="utf-8"))["each"] if path.exists() else []
    entries = {entry["mutant"]: entry for entry in [*known, *done]}
    each = [entries[mutant.name] for mutant in listed() if mutant.name in entries]
    files = {}
    for entry in each:
        counts = files.setdefault(entry["file"], {"mutants": 0, "killed": 0, "equivalent": 0})
        counts["mutants"] += 1
        counts["killed"] += entry["outcome"] in ("killed", "time limit")
        counts["equivalent"] += entry["outcome"] == "survived" and bool(entry["equivalent"])
    total = {
        name: sum(counts[name] for counts in files.values()) for name in ("mutants", "killed", "equivalent")
    }
    path.write_text(json.dumps({**total, "files": files, "each": each}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    code = main()
    shutil.rmtree(conftest.TEMPORARY, ignore_errors=True)
    sys.exit(code)
