"""The list of mutants is true of the source as it is: a change of the source must bring its mutants along."""

import json
import shutil

from tests.mutants.mutants import ROOT, listed


def test_every_mistake_can_be_made(tmp_path):
    for mutant in listed():
        path = tmp_path / "src" / "gvpo" / mutant.file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "src" / "gvpo" / mutant.file, path)
        mutant.apply(tmp_path)
        compile(path.read_text(), mutant.file, "exec")
        assert path.read_text() != (ROOT / "src" / "gvpo" / mutant.file).read_text()


def test_there_are_enough_of_different_names():
    names = [mutant.name for mutant in listed()]
    assert len(set(names)) == len(names) >= 80


def test_the_page_on_exactness_has_the_results():
    results = json.loads((ROOT / "results" / "mutants.json").read_text())
    page = (ROOT / "docs" / "exactness.md").read_text()
    for file, counts in [*results["files"].items(), ("all", results)]:
        shown = f"`{file}`" if file in results["files"] else file
        assert f"| {shown} | {counts['mutants']} | {counts['killed']} | {counts['equivalent']} |" in page
    assert results["killed"] >= 0.95 * results["mutants"]
    assert results["killed"] + results["equivalent"] == results["mutants"]
