"""The house stands: no circle, no arrow upwards, not too large, and drawn as it is."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.house import PAGE, SOURCES, circles, imports, lines, redrawn, rooms, upwards
from tests.trl.common import trainer

MOST_LINES = 18_400  # 11,000 is the aim
PACKAGE = SOURCES / "gvpo"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(imports()) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    # The package itself and its errors are everybody's.
    assert circles({name: others - {"gvpo"} for name, others in rooms(imports()).items()}) == []


def test_nothing_imports_from_a_higher_layer() -> None:
    assert upwards(imports()) == []


def test_the_house_is_not_too_large() -> None:
    count = lines()
    assert sum(count.values()) <= MOST_LINES, count.most_common()


def test_the_picture_is_today_s() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "```mermaid" in page
    assert redrawn(page) == page, "python -m benchmarks.house --write"


def ways() -> dict[str, tuple[str, list[str]]]:
    """The ways through the house that CONTRIBUTING.md names: where each starts, and its files."""
    section = PAGE.read_text(encoding="utf-8").partition("### Three ways")[2].partition("\n## ")[0]
    found = re.findall(r"^\d\. \*\*(.+?)\*\* \(from `(\w+)`\):(.*?)(?=^\d\. |\Z)", section, re.M | re.S)
    return {name: (start, re.findall(r"`([\w/]+\.py)`", text)) for name, start, text in found}


def test_every_way_leads_through_files_that_are_there() -> None:
    assert list(ways()) == ["Reward → gradient", "Stored group → gradient", "verl row → weight"]
    for start, files in ways().values():
        assert [file for file in files if not (PACKAGE / file).is_file()] == []
        assert f"def {start}(" in (PACKAGE / files[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("way", "settings"), [("Reward → gradient", {}), ("Stored group → gradient", {"replay_ratio": 1.0})]
)
def test_a_value_passes_through_the_files_of_its_way_in_order(
    way: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    start, files = ways()[way]
    passed: list[str] = []

    def look(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            if frame.f_code.co_name == start:
                passed.clear()  # what remains at the end is the last step's
            name = str(path.relative_to(PACKAGE))
            if name not in passed:
                passed.append(name)

    learner = trainer(max_steps=3, output_dir=str(tmp_path), **settings)
    sys.setprofile(look)
    try:
        learner.train()
    finally:
        sys.setprofile(None)
    assert [file for file in passed if file in files] == files


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A house with a circle under TYPE_CHECKING and an arrow upwards within a function."""
    for path, text in {
        "__init__.py": "from gvpo.objective import loss",
        "errors.py": "",
        "objective.py": "def loss():\n    from gvpo.trl import config",
        "trl/__init__.py": "",
        "trl/config.py": "from ..errors import InputError\nfrom . import health",
        "trl/health.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gvpo.trl.config",
        "attic.py": "",
    }.items():
        file = tmp_path / "gvpo" / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_what_is_wrong_with_a_house_is_found(sources: Path) -> None:
    graph = imports(sources)
    assert graph["gvpo.trl.config"] == {"gvpo.errors", "gvpo.trl.health"}
    (circle,) = circles(graph)
    assert {"gvpo.trl.config", "gvpo.trl.health"} == set(circle.split(" ← "))
    assert upwards(graph) == ["gvpo.attic is in no layer", "gvpo.objective imports gvpo.trl.config"]
    assert lines(sources)["trl"] == 5
