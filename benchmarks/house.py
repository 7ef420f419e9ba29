"""The house: the folders of src/gvpo and what they import from each other, read from the sources.

    python -m benchmarks.house            # prints rooms, lines of code, circles and arrows upwards
    python -m benchmarks.house --write    # draws the picture in CONTRIBUTING.md anew

Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
PAGE = ROOT / "CONTRIBUTING.md"
Graph = dict[str, set[str]]

# From the ground up: a room (a folder, or a file alone) imports from its own layer and those below.
LAYERS: dict[str, tuple[str, ...]] = {
    "ground": ("errors", "_version"),
    "core": ("objective", "images", "batch", "packing", "trust", "scoring", "step", "model"),
    "parts": ("machine", "run", "samples", "progress", "sums", "replay", "rewards", "data", "evaluate"),
    "engines": ("trl", "verl", "vllm"),
    "entrance": ("quickstart", "quickstart_llm", "doctor", "cli", "__main__"),
}
LEVEL = {room: level for level, rooms in enumerate(LAYERS.values()) for room in rooms}
_MARKS = re.compile(r"(<!--house-->\n).*?(<!--/house-->)", re.DOTALL)


def modules(sources: Path = SOURCES) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(sources.glob("gvpo/**/*.py")):
        parts = path.relative_to(sources).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(sources: Path = SOURCES) -> Graph:
    """Module → the package's modules that it imports."""
    known = modules(sources)
    graph: Graph = {}
    for name, path in known.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                # What is taken from a package is a module of it, or stands in its __init__.
                named |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
        graph[name] = (named & known.keys()) - {name}
    return graph


def room(module: str) -> str:
    """The folder or file below src/gvpo that a module belongs to; "gvpo" for the package itself."""
    return [*module.split("."), "gvpo"][1 if "." in module else 0]


def circles(graph: Graph) -> list[str]:
    """Circles of imports; cut one after the other, so that every tangle is named at least once."""
    graph = {name: set(others) for name, others in graph.items()}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            found.append(" ← ".join(circle))
            graph[circle[1]].discard(circle[0])
        else:
            return found


def upwards(graph: Graph) -> list[str]:
    """Imports from a higher layer, and modules in no layer."""
    inside = [name for name in graph if name != "gvpo"]
    strangers = [f"{name} is in no layer" for name in inside if room(name) not in LEVEL]
    return strangers + [
        f"{name} imports {other}"
        for name in inside
        for other in sorted(graph[name] - {"gvpo"})
        if LEVEL.get(room(other), 0) > LEVEL.get(room(name), 99)
    ]


def rooms(graph: Graph) -> Graph:
    """The same between rooms."""
    between: Graph = {}
    for name, others in graph.items():
        between.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return between


def lines(sources: Path = SOURCES) -> Counter[str]:
    """Lines of Python, and of templates, in each room."""
    count: Counter[str] = Counter()
    for path in (*sources.glob("gvpo/**/*.py"), *sources.glob("gvpo/**/*.jinja")):
        parts = path.relative_to(sources / "gvpo").with_suffix("").parts
        count[parts[0].replace("__init__", "gvpo")] += len(path.read_text(encoding="utf-8").splitlines())
    return count


def picture(graph: Graph) -> str:
    """The rooms as a Mermaid flowchart, an arrow from who imports to what is imported.

    Left out: `errors` and the version, which all may import, and files that only start something.
    """
    shown = dict(list(LAYERS.items())[:0:-1])
    text = "```mermaid\nflowchart TD\n"
    for layer, names in shown.items():
        present = [name for name in names if name in rooms(graph) and name != "__main__"]
        labels = (f'{name}["{name}{_ending(name)}"]' for name in present)
        text += f"  subgraph {layer}\n" + "".join(f"    {label}\n" for label in labels) + "  end\n"
    drawn = {name for names in shown.values() for name in names} - {"__main__"}
    for name, others in sorted(rooms(graph).items()):
        for other in sorted(others & drawn if name in drawn else ()):
            text += f"  {name} --> {other}\n"
    return text + "```\n"


def _ending(name: str) -> str:
    return "/" if (SOURCES / "gvpo" / name).is_dir() else ".py"


def redrawn(page: str) -> str:
    """The page with today's picture between its marks."""
    return _MARKS.sub(lambda match: match[1] + picture(imports()) + match[2], page)


def main() -> None:
    graph, count = imports(), lines()
    if "--write" in sys.argv:
        PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for layer, names in LAYERS.items():
        print(f"{layer}: " + ", ".join(f"{name} {count[name]:,}" for name in names if count[name]))
    print(f"{sum(count.values()):,} lines")
    print("\n".join([*(f"circle: {c}" for c in circles(graph)), *(f"upwards: {u}" for u in upwards(graph))]))


if __name__ == "__main__":
    main()
