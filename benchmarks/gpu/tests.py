"""`pytest tests/gpu`, but for exactness, which has a part of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import Part

ABOUT = "Tests of tests/gpu: training with mixed precision, loss scaling, real shortage of memory, resuming."
FOLDER = Path(__file__).parents[2] / "tests" / "gpu"


class Plugin:
    def __init__(self, part: Part) -> None:
        self.part = part

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = str(report.longrepr).splitlines()[-1:] if report.outcome == "failed" else []
            row = {"test": report.nodeid.rpartition("::")[2], "outcome": report.outcome, "s": report.duration}
            self.part.add(row | {"note": why[0][:160]} if why else row)


def run(part: Part) -> None:
    files = [str(path) for path in sorted(FOLDER.glob("test_*.py")) if path.stem != "test_exactness"]
    code = pytest.main(
        ["-x" if part.tiny else "-q", "--tb=short", "-p", "no:cacheprovider", *files], [Plugin(part)]
    )
    assert code == 0, f"pytest ended with {code}"
