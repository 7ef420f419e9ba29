"""The list of mutants is true of the source as it is: a change of the source must bring its mutants along."""

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
