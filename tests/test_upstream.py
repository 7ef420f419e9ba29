"""The reports of others' defects: whole, named where we steer around them, and still true."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "upstream"
REPORTS = sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")
RUN_HERE = ["accelerate-cpu-ranks.md", "transformers-finished-run.md", "trl-fused-forward-copy.md"]


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_report_is_whole_and_named_by_the_tests_that_it_names(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for part in ("**To**", "**What.**", "**Where.**", "**Case", "**Patch.**", "**Here.**"):
        assert part in text
    tests = re.findall(r"`(tests/[\w/]+\.py)`", text.partition("**Here.**")[2])
    assert tests
    for test in tests:
        assert f"docs/upstream/{report.name}" in (ROOT / test).read_text(encoding="utf-8")
    assert f"]({report.name})" in (FOLDER / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_defect_is_still_there(name: str) -> None:
    """Where this fails, the way around can go."""
    case = re.search(r"```python\n(.*?)```", (FOLDER / name).read_text(encoding="utf-8"), re.DOTALL)
    assert case is not None
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(case[1], name, "exec"), {"__name__": "case"})
