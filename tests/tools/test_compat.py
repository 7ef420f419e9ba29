"""What is claimed has run: the table, its results and `pyproject.toml` agree."""

import json
from pathlib import Path

import pytest
from packaging.version import Version

from tools import compat
from tools.compat import PAGE, PROJECT, combinations, counted, lower_bounds, lowest, redrawn, results

PASSED = {
    name: record for name, record in results().items() if record.get("failed") == [] and record["passed"]
}


def test_the_table_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert redrawn(page) == page, "python -m tools.compat draws it"


def test_nothing_that_was_tried_failed() -> None:
    assert {name: r["failed"] for name, r in results().items() if r.get("failed")} == {}


@pytest.mark.parametrize("package", ["torch", "trl", "transformers"])
def test_the_lowest_version_that_is_claimed_has_passed(package: str) -> None:
    ran = {Version(r["versions"][package]) for r in PASSED.values() if package in r["versions"]}
    claimed = Version(lowest(package))
    assert any(version.release[: len(claimed.release)] == claimed.release for version in ran), ran


def test_every_lower_bound_is_one_that_has_passed() -> None:
    """Of what stands in `dependencies` and the extra `trl`."""
    versions = PASSED["lowest"]["versions"]
    bounds = lower_bounds()
    assert len(bounds) > 20
    for name, bound in (pin.split("==") for pin in bounds):
        assert Version(versions[name.lower()]) == Version(bound), name


def test_the_pythons_that_are_claimed_have_passed() -> None:
    claimed = {
        c.split(" :: ")[-1]
        for c in PROJECT["classifiers"]
        if c.startswith("Programming Language :: Python :: 3.")
    }
    ran = {".".join(r["versions"]["python"].split(".")[:2]) for r in PASSED.values()}
    assert claimed <= ran


def test_results_are_counted_filed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told.xml"
    told.write_text(
        "<testsuites><testsuite><testcase classname='tests.a' name='b'/>"
        "<testcase classname='tests.a' name='c'><failure message='no'/></testcase>"
        "<testcase classname='tests.a' name='d'><skipped/></testcase></testsuite></testsuites>"
    )
    assert counted(told) == {"passed": 1, "skipped": 1, "failed": ["tests.a::c"]}
    page = tmp_path / "page.md"
    page.write_text("Above\n\n<!--compat-->\nold\n<!--/compat-->\n\nBelow\n")
    monkeypatch.setattr(compat, "RESULTS", tmp_path / "compat.json")
    monkeypatch.setattr(compat, "PAGE", page)
    compat.file_result("elsewhere", {"note": "not to be had: no wheel"})
    compat.file_result("newest", {"versions": {"python": "3.11.7", "trl": "1.16.0"}, **counted(told)})
    assert list(json.loads((tmp_path / "compat.json").read_text())) == ["newest", "elsewhere"]
    text = page.read_text()
    assert text.startswith("Above\n\n<!--compat-->")
    assert text.endswith("<!--/compat-->\n\nBelow\n")
    assert "old" not in text
    assert (
        "| newest | 3.11.7 | – | 1.16.0 | – | – | – | – | – | 1 passed, 1 skipped, 1 **failed** | 20" in text
    )
    assert "| elsewhere | – | – | – | – | – | – | – | – | not to be had: no wheel | 20" in text


def test_an_unknown_combination_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compat", "newer"])
    with pytest.raises(SystemExit) as ended:
        compat.main()
    assert ended.value.code == 2
    assert "no combination is called newer" in capsys.readouterr().err


def test_combinations_are_made_of_the_claims() -> None:
    assert f"TRL {lowest('trl')}" in combinations()
    assert combinations()["lowest"].lowest
