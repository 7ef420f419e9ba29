"""The house stands: no circle, no arrow upwards, not too large, and drawn as it is."""

from pathlib import Path

import pytest

from benchmarks.house import PAGE, circles, imports, lines, redrawn, rooms, upwards

MOST_LINES = 11_000


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
    assert redrawn(page) == page, "python -m benchmarks.house --write"


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
