"""`gvpo doctor` on an environment with a package missing, one of another version, and one that is broken."""

import io

import pytest
from rich.console import Console

from gvpo import doctor as module
from gvpo.doctor import doctor

NEEDS = {
    "gvpo": [
        "torch>=2",
        'trl[peft]<0.5; extra == "trl"',
        'no-such-package>=1; extra == "verl"',
        'rich>=13; extra == "reasoning-gym"',
        'sqlite3; extra == "reasoning-gym"',  # a module, of no distribution of that name
    ],
    "trl": ['another-missing>=2; extra == "peft"'],
}


@pytest.mark.slow
def test_it_says_what_is_missing_and_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "requires", NEEDS.__getitem__)
    extras = module._EXTRAS | {"vllm": ("samples", "tests.no_such_module")}
    monkeypatch.setattr(module, "_EXTRAS", extras)
    out = io.StringIO()
    doctor(Console(file=out, width=200))
    rows = {row.split("│")[1].strip(): row for row in out.getvalue().splitlines() if "│" in row}
    assert "not <0.5; another-missing is missing; pip install 'gvpo[trl]'" in rows["gvpo[trl]"]
    assert "no-such-package is missing; pip install 'gvpo[verl]'" in rows["gvpo[verl]"]
    assert "it does not import: No module named 'tests.no_such_module'" in rows["gvpo[vllm]"]
    assert rows["gvpo[reasoning-gym]"].split("│")[3].strip() == "ready"
    assert "cores for this process" in rows["CPU"]
