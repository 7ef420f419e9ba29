"""The list of mutants: `list.toml`, one small mistake each, and the tests that must notice it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file` (below src/gvpo), `was` becomes `now`.

    Attributes:
        name: what the mistake is, in words.
        tests: pytest's arguments, which select the tests that should fail.
        equivalent: why no test can notice it; empty for all that must be noticed.
    """

    name: str
    file: str
    was: str
    now: str
    tests: str
    equivalent: str = ""

    def apply(self, root: Path) -> None:
        """Make the mistake in the tree at `root`.

        Raises:
            ValueError: the text is not there exactly once.
        """
        path = root / "src" / "gvpo" / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.was)) != 1:
            raise ValueError(f"{self.name}: {self.file} has its text {count} times, not once:\n{self.was}")
        path.write_text(text.replace(self.was, self.now), encoding="utf-8")


def listed() -> list[Mutant]:
    """All mutants. A mutant's tests are its own, or those of its file."""
    files = tomllib.loads(Path(__file__).with_name("list.toml").read_text(encoding="utf-8"))
    return [
        Mutant(file=file, **{"tests": section["tests"], **values})
        for file, section in files.items()
        for values in section["mutants"]
    ]
