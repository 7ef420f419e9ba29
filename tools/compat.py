"""Which versions GVPO works with: an environment and the same tests for each combination, and a table.

    python -m tools.compat                    # each combination that has not passed today
    python -m tools.compat lowest newest      # these
    python -m tools.compat --here NAME        # the environment that runs this, filed under NAME

uv makes the environments, in `.compat`; results are in `benchmarks/results/compat.json`, the table is in
`docs/compatibility.md`. Killed, the same command goes on. Torch is a build for CPUs: where the indexes have
none, that is the result (`--torch 2.14.1` takes that release, be it a build for GPUs: gigabytes).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".compat"
RESULTS = ROOT / "benchmarks" / "results" / "compat.json"
PAGE = ROOT / "docs" / "compatibility.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

SHOWN = ["torch", "trl", "transformers", "datasets", "accelerate", "peft", "verl"]
TESTERS = [
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.120",
    "tensorboard>=2.18",
]
# The core and the trainer, but what starts, kills or hangs processes: slow, and the same with every version.
TESTS = (
    "tests/test_objective.py", "tests/test_packing.py", "tests/test_step.py", "tests/test_trust.py",
    "tests/model/test_head.py", "tests/model/test_shared_prompts.py", "tests/trl",
    "-k", "not two_processes and not hang and not killed and not rank and not in_any_epoch",
    "-n", "2", "--dist", "loadfile",
)  # fmt: skip
# Where an hour is too long: the formula, the head, and the trainer's updates against the oracle.
QUICK = (
    "tests/test_objective.py", "tests/model/test_head.py", "tests/trl/test_compat.py",
    "tests/trl/test_trainer.py", "tests/trl/test_exactness.py",
    "-k", "not False and not two_processes and not micro_batches",
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """An environment of its own for `requirements`, or an `overlay` of them on `environment`."""

    about: str
    requirements: tuple[str, ...] = ()
    python: str = "3.11"
    torch: str = "newest"
    lowest: bool = False
    overlay: bool = False
    environment: str = ".venv"
    tests: tuple[str, ...] = ()


class Unavailable(Exception):
    """The environment cannot be made here, for the reason given."""


def asked(*extras: str) -> list[Requirement]:
    """What `gvpo` with these extras asks for in `pyproject.toml`."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return [r for r in map(Requirement, texts) if r.name != "gvpo"]


def lowest(name: str) -> str:
    """The lowest version of the package `name` that `pyproject.toml` allows."""
    wanted = next(r for r in asked("trl", "verl") if r.name == name)
    return next(s.version for s in wanted.specifier if s.operator == ">=")


def lower_bounds() -> list[str]:
    """Pins of all lower bounds, but of torch and of sympy, which some releases of torch pin higher."""
    bounded = [r for r in asked("trl") if ">=" in str(r.specifier) and r.name not in ("torch", "sympy")]
    return [f"{r.name}=={lowest(r.name)}" for r in bounded]


def combinations() -> dict[str, Combination]:
    """All that is tried, by name."""
    trl, transformers, torch = (lowest(name) for name in ("trl", "transformers", "torch"))
    ours = (".[trl]",)
    overlay = [
        Combination(f"the lowest {p}", (f"{p}=={lowest(p)}",), overlay=True) for p in ("trl", "transformers")
    ]
    return {
        "pinned": Combination("constraints.txt, as `make test`"),
        f"TRL {trl}": overlay[0],
        f"transformers {transformers}": overlay[1],
        "lowest": Combination("every lower bound but torch's and sympy's", ours, lowest=True),
        f"lowest, torch {torch}": Combination("every lower bound", ours, lowest=True, torch=torch),
        "newest": Combination("the newest of everything", ours),
        "Python 3.12": Combination("the newest of everything", ours, python="3.12"),
        "Python 3.13": Combination("the newest of everything", ours, python="3.13"),
        "verl 0.9.1": Combination("verl's tests", tests=("tests/verl",)),
        "verl 0.6.0": Combination(
            "verl's run", environment=".venv-verl060", tests=("tests/verl060/end_to_end.py",)
        ),
    }  # fmt: skip


def called(*words: str | Path, **settings: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=ROOT, **settings)


def torch_build(python: str, wanted: str) -> str:
    """The newest torch of the `wanted` version that is a build for CPUs."""
    words = ["index", "versions", "torch", "--python-version", python, "--only-binary=:all:"]
    listed = called(sys.executable, "-m", "pip", *words).stdout
    offered = listed.partition("Available versions:")[2].partition("\n")[0].split(",")
    for version in sorted((Version(v.strip()) for v in offered if v.strip()), reverse=True):
        right = wanted == "newest" or version.base_version == Version(f"{wanted}.0").base_version
        if right and version.local == "cpu":
            return f"torch=={version}"
    raise Unavailable(f"no CPU build of torch ({wanted}) for Python {python} in the indexes here")


def uv(*words: str | Path) -> None:
    """Run uv, which knows lower bounds and finds Pythons, with the places that pip was told of."""
    known = {"UV_FIND_LINKS": "PIP_FIND_LINKS", "UV_EXTRA_INDEX_URL": "PIP_EXTRA_INDEX_URL"}
    places = {name: os.environ[pip] for name, pip in known.items() if pip in os.environ}
    done = called(
        sys.executable,
        "-m",
        "uv",
        *words,
        env=os.environ | {"UV_INDEX_STRATEGY": "unsafe-best-match"} | places,
    )
    if done.returncode:
        raise Unavailable(" ".join(done.stderr.split())[-500:])


def prepared(folder: Path, way: Combination, torch: str | None) -> tuple[Path, list[Path]]:
    """The interpreter of the combination, and the folders that lie over its packages; made once."""
    shared = not way.requirements or way.overlay
    python = (ROOT / way.environment if shared else folder) / "bin" / "python"
    recipe = repr(
        (way.requirements, way.python, torch or way.torch, way.lowest, [str(r) for r in asked("trl")])
    )
    made = folder / "made"
    if way.requirements and not (made.is_file() and made.read_text() == recipe):
        shutil.rmtree(folder, ignore_errors=True)
        install = ("pip", "install", "--python", python)
        if way.overlay:
            uv(*install, "--no-deps", "--target", folder, *way.requirements)
        else:
            build = f"torch=={torch}" if torch else torch_build(way.python, way.torch)
            uv("venv", "--python", way.python, folder)
            bounds = folder / "bounds.txt"
            bounds.write_text("\n".join(lower_bounds() if way.lowest else []))
            resolution = (
                "--resolution",
                "lowest-direct" if way.lowest else "highest",
                "--constraint",
                bounds,
            )
            uv(*install, *resolution, build, *TESTERS, "-e", *way.requirements)
        made.write_text(recipe)
    if not python.exists():
        raise Unavailable(f"{python.relative_to(ROOT)} is not there: make it first")
    return python, [folder] if way.overlay else []


VERSIONS = """
import json, platform, sys
from importlib.metadata import distributions
found = {d.name.lower(): d.version for d in reversed(list(distributions())) if d.name}
print(json.dumps({"python": platform.python_version()} | {n: found[n] for n in sys.argv[1:] if n in found}))
"""


def tried(name: str, tests: tuple[str, ...], python: Path, over: list[Path]) -> dict[str, Any]:
    """Run the tests; what came of them, with the versions that were there."""
    FOLDER.mkdir(exist_ok=True)
    path = os.pathsep.join(map(str, [*over, ROOT / "src"]))
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # verl is told of where it was tried.
    shown = [name for name in SHOWN if name != "verl" or any("verl" in test for test in tests)]
    names = dict.fromkeys([*shown, *(r.name.lower() for r in asked("trl"))])
    versions = json.loads(called(python, "-c", VERSIONS, *names, env=environ).stdout)
    told = FOLDER / f"{folder_name(name)}.xml"
    told.unlink(missing_ok=True)
    words = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={told}", *tests]
    with told.with_suffix(".log").open("w") as log:
        code = subprocess.run(words, cwd=ROOT, env=environ, stdout=log, stderr=log).returncode
    if not told.is_file():
        raise RuntimeError(f"the tests did not start (code {code}): see {log.name}")
    return {"versions": versions, "quick": tests == QUICK, **counted(told)}


def counted(told: Path) -> dict[str, Any]:
    """How many tests passed and were skipped, and which failed, of a JUnit file."""
    cases = list(ElementTree.parse(told).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = [f"{c.get('classname')}::{c.get('name')}" for c in failed]
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": names}


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def sources() -> str:
    """What the tests say something about: `src` and `pyproject.toml`, as git names their contents."""
    return " ".join(called("git", "rev-parse", "HEAD:src", "HEAD:pyproject.toml").stdout.split())


def fresh(record: dict[str, Any]) -> bool:
    """Whether the result is today's, of these sources."""
    return (record["date"], record["sources"]) == (date.today().isoformat(), sources())


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def file_result(name: str, record: dict[str, Any]) -> None:
    """Add a result, and draw the table again."""
    every = results() | {name: {"date": date.today().isoformat(), "sources": sources(), **record}}
    known = list(combinations())
    ordered = sorted(every, key=lambda n: known.index(n) if n in known else len(known))
    RESULTS.write_text(json.dumps({n: every[n] for n in ordered}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def rows() -> Iterator[str]:
    """The table's rows: a combination, its versions, what came of it, when."""
    for name, record in results().items():
        cells = [record.get("versions", {}).get(n, "–") for n in ("python", *SHOWN)]
        outcome = record.get("note") or f"{record['passed']} passed, {record['skipped']} skipped"
        outcome += " (quick)" if record.get("quick") else ""
        outcome += f", {len(record['failed'])} **failed**" if record.get("failed") else ""
        yield f"| {' | '.join([name, *cells, outcome, record['date']])} |"


def redrawn(page: str) -> str:
    """The page with the results' table between its markers."""
    head = ["combination", "Python", *SHOWN, "tests", "date"]
    table = "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows()])
    before, _, rest = page.partition("<!--compat-->")
    return f"{before}<!--compat-->\n\n{table}\n\n<!--/compat-->{rest.partition('<!--/compat-->')[2]}"


def main() -> int:
    """Exit code 1 where tests failed."""
    known = combinations()
    parser = argparse.ArgumentParser(prog="python -m tools.compat", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}")
    parser.add_argument("--here", metavar="NAME", help="try the environment that runs this, filed under NAME")
    parser.add_argument("--torch", metavar="VERSION", help="this torch, be it a build for GPUs (gigabytes)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tests")
    given = parser.parse_args()
    tests = QUICK if given.quick else TESTS
    if unknown := [n for n in given.names if n not in known]:
        parser.error(f"no combination is called {unknown[0]}; there are {', '.join(known)}")
    if given.here:
        file_result(given.here, tried(given.here, tests, Path(sys.executable), []))
        return 0
    for name in given.names or known:
        before = results().get(name, {})
        if not given.names and before.get("failed") == [] and fresh(before):
            continue
        try:
            where = prepared(FOLDER / folder_name(name), known[name], given.torch)
            record = tried(name, known[name].tests or tests, *where)
        except Unavailable as reason:
            record = {"note": f"not to be had: {reason}"}
        file_result(name, {"about": known[name].about, **record})
        print(f"{name}: {json.dumps(record)}", flush=True)
    return int(any(results().get(name, {}).get("failed") for name in given.names or known))


if __name__ == "__main__":
    sys.exit(main())
