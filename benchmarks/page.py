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
    if isinstance(value, bool):
        return "yes" if value else "no"
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
    """What a benchmark found; of one for a GPU, which not everybody has, maybe nothing."""
    path = RESULTS / f"{name}.json"
    return None if name.startswith("gpu/") and not path.exists() else json.loads(path.read_text())


def _table(path: str) -> str:
    name, _, columns = path.partition("|")
    file, _, key = name.partition("#")
    if (record := _record(file)) is None:
        return "\nNot run yet.\n\n"
    rows = record["rows"][key] if key else record["rows"]
    heads = dict(c.partition("=")[::2] for c in columns.split(";"))
    lines = [[heading or column for column, heading in heads.items()]]
    lines += [["---" if isinstance(rows[0].get(column), str) else "---:" for column in heads]]
    lines += [[text(row.get(column)) for column in heads] for row in rows]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def _made(name: str) -> str:
    if (record := _record(name)) is None:
        return "`make gpu`: not run yet.\n"
    machine, versions = record["machine"], record["versions"]
    kept = ", ".join(f"{n} {versions[n]}" for n in ("torch", "trl", "transformers") if n in versions)
    if name.startswith("gpu/"):
        return (
            f"`python -m benchmarks.gpu {name[4:]}`: {record['status']}, {record['date']}, {machine['gpu']} "
            f"({machine['gpu_memory_gib']} GiB, driver {machine['driver']}, CUDA {machine['cuda']}), "
            f"{machine['cores']} cores, {kept}.\n"
        )
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
