"""No public name, option or default changes unnoticed."""

import json

from tests.public_names import TABLE, collect


def test_public_names_and_defaults_are_those_of_the_table() -> None:
    now, before = collect(), json.loads(TABLE.read_text(encoding="utf-8"))
    changed = {name: (before.get(name), now.get(name)) for name in sorted({*now, *before})}
    assert {name: pair for name, pair in changed.items() if pair[0] != pair[1]} == {}, (
        "If you mean it, say it in CHANGELOG.md and run python -m tests.public_names."
    )
