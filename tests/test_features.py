"""The table of features: each of GVPO's ✔ stands beside tests, and these are there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "features.md"
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def flaws(page: str) -> list[str]:
    """What is wrong with the tables of a page."""
    found = []
    for line in page.splitlines():
        if not line.startswith("| ") or line.startswith(("| Feature", "| ---")):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5:
            found.append(f"{cells[0]}: {len(cells)} cells")
        for cell in cells[2::2]:
            named = _TEST.findall(cell)
            found += [
                f"{cells[0]}: {path}::{name}" for path, name in named if name not in functions(TESTS / path)
            ]
            if "✔" in cell and not named:
                found.append(f"{cells[0]}: a ✔ without a test")
    return found


def test_every_tick_of_ours_names_tests_that_are_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("\n| ") > 30
    assert flaws(page) == []


def test_a_tick_without_its_test_is_found() -> None:
    assert flaws("| a | ✔ | ✔ | ✔ | — |") == ["a: a ✔ without a test"]
    gone, lone = "`test_step.py::test_gone`", "`nowhere.py::test_it`"
    assert flaws(f"| b | ✔ | ✔ {gone} | ✔ | refused: {lone} |") == [
        "b: test_step.py::test_gone", "b: nowhere.py::test_it",
    ]  # fmt: skip
    assert flaws("| c | ✔ |") == ["c: 2 cells"]
