"""Keeps the tables of the documentation to `benchmarks/results/`.

    python -m benchmarks.page            # says which tables differ, and ends with 1
    python -m benchmarks.page --write    # brings them up to date

A table stands between `<!--bench:NAME|column=Heading;column=Heading-->` and `<!--/bench-->`; NAME is that of
the JSON file, `file#key` a part of it. `<!--bench-made:NAME-->` … is the line that says when and where.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.__main__ import NAMES
from benchmarks.measure import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"<!--bench(?P<made>-made)?:(?P<path>[^>]+?)-->\n.*?<!--/bench-->", re.DOTALL)


def text(value: Any) -> str:
    """A cell: three significant digits for fractions, a list's numbers one after the other."""
    if isinstance(value, list):
        return " / ".join(map(text, value))
    if value is None:
        return "–"
    if isinstance(value, float):
        return (
            f"{value:.0e}"
            if 0 < abs(value) < 1e-3
            else f"{value:,.0f}"
            if abs(value) >= 100
            else f"{value:.3g}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def _record(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(path: str) -> str:
    name, _, columns = path.partition("|")
    file, _, key = name.partition("#")
    rows = _record(file)["rows"]
    rows = rows[key] if key else rows
    heads = dict(c.partition("=")[::2] for c in columns.split(";"))
    lines = [[heading or column for column, heading in heads.items()]]
    lines += [["---" if isinstance(rows[0].get(column), str) else "---:" for column in heads]]
    lines += [[text(row.get(column)) for column in heads] for row in rows]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def _made(name: str) -> str:
    record = _record(name)
    machine, versions = record["machine"], record["versions"]
    kept = ", ".join(f"{n} {versions[n]}" for n in ("torch", "trl", "transformers") if n in versions)
    command = f"python -m benchmarks{' ' if name in NAMES else '.'}{name}"
    return (
        f"`{command}`: {record['date']}, {machine['cores']} cores ({machine['architecture']}, "
        f"{machine['cpu_capability']}), {machine['memory_gib']} GiB, no GPU, one thread; {kept}.\n"
    )


def renew(page: str) -> str:
    """The page with every table as the results have it."""

    def block(match: re.Match[str]) -> str:
        made, path = match["made"] or "", match["path"]
        return f"<!--bench{made}:{path}-->\n{_made(path) if made else _table(path)}<!--/bench-->"

    return _BLOCK.sub(block, page)


def main() -> None:
    wrong = []
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if page.count("<!--bench") != len(_BLOCK.findall(page)):
            sys.exit(f"{path.relative_to(DOCS.parent)}: a bench comment has no end.")
        new = renew(page)
        if new != page:
            wrong.append(str(path.relative_to(DOCS.parent)))
            if "--write" in sys.argv:
                path.write_text(new, encoding="utf-8")
    if wrong and "--write" not in sys.argv:
        sys.exit(
            f"Tables differ from benchmarks/results in {', '.join(wrong)}: python -m benchmarks.page --write"
        )


if __name__ == "__main__":
    main()
