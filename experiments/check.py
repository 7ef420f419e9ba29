"""Keeps the documentation's numbers to what the laboratory found.

In a page, a number is followed by a comment that says where it comes from, and what is made from the results
as a whole stands between two comments:

    0.023<!--lab:offline|rows|gvpo|other model|kl_optimum-->
    <!--lab-table:offline|rows|kl_optimum--> … <!--/lab-->
    <!--lab-made:offline--> … <!--/lab-->

Behind the experiment's name comes a path into its `summary.json`: a key of a mapping, or any value that tells
one entry of a list from the others. An interval stands for its mean, unless `low`, `high` or `worst` (of the
seeds) follows. Pictures stand in `assets/lab` alone and carry the fingerprint of the summary that they were
drawn from. `gvpo lab check` compares; with `--write` it brings all up to date.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import fingerprint, interval, number
from gvpo.errors import InputError

_INLINE = re.compile(r"(?P<old>[<>−\-–0-9.e]+(?:×10⁻\d+)?)<!--lab:(?P<path>[^>]+?)-->")
_BLOCK = re.compile(r"<!--lab-(?P<kind>table|made):(?P<path>[^>]+?)-->\n(?P<old>.*?)<!--/lab-->", re.DOTALL)
_PICTURE = re.compile(r"assets/lab/(\w+)\.png")


class Results:
    """The summaries in a directory of results, read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[str, Any] = {}

    def __getitem__(self, experiment: str) -> Any:
        if experiment not in self._read:
            path = self.directory / experiment / "summary.json"
            if not path.exists():
                raise InputError(f"{path} is not there: run gvpo lab {experiment} --output {self.directory}.")
            self._read[experiment] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[experiment]

    def find(self, path: str) -> Any:
        """What `experiment|key|key…` points to.

        Raises:
            InputError: nothing, or more than one thing.
        """
        experiment, *keys = path.split("|")
        here = self[experiment]
        for key in keys:
            here = _step(here, key, path)
        if isinstance(here, list) and len(here) == 1:
            here = here[0]
        return here


def _step(here: Any, key: str, path: str) -> Any:
    if isinstance(here, list):
        if len(here) == 1 and isinstance(here[0], dict) and key in here[0]:
            return here[0][key]
        chosen = [item for item in here if isinstance(item, dict) and key in map(str, item.values())]
        if chosen:
            return chosen
    elif isinstance(here, dict):
        if key == "worst" and "seeds" in here:
            return max(here["seeds"])
        if key in here:
            return here[key]
    raise InputError(f"The results have nothing at {path} ({key}).")


def _text(value: Any, path: str) -> str:
    if isinstance(value, Mapping) and "mean" in value:
        value = value["mean"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path} is no number in the results.")
    return str(value) if isinstance(value, int) else number(value)


def _table(results: Results, path: str) -> str:
    *keys, metrics = path.split("|")
    rows = results.find("|".join(keys))
    if rows and "curve" in rows[0]:
        rows = [
            {**point, "label": arm["label"], "condition": _epochs(point["epochs"])}
            for arm in rows
            for point in arm["curve"]
        ]
    names = {name.partition("=")[0]: name.partition("=")[2] or name for name in metrics.split(",")}
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    if len(names) > 1:
        several = len(conditions) > 1
        head = ["", *(["strength"] if several else []), *names.values()]
        body = [
            [row["label"], *([row["condition"]] if several else []), *(interval(row[m]) for m in names)]
            for row in rows
        ]
    else:
        (metric,) = names
        cells = {(row["label"], row["condition"]): interval(row[metric]) for row in rows}
        downwards, sidewards = (labels, conditions) if len(conditions) < 8 else (conditions, labels)
        head = ["", *sidewards]
        body = [[d, *(cells.get((d, s), cells.get((s, d), "")) for s in sidewards)] for d in downwards]
    return _markdown(head, body)


def _epochs(count: float) -> str:
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def _made(results: Results, experiment: str) -> str:
    found = results[experiment]
    made, seeds = found["made"], found["seeds"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "trl", "transformers"))
    spent = f"{made['cpu_seconds']} CPU seconds" if "cpu_seconds" in made else f"{made['seconds']} s"
    tuning = found["tuning_seed"]
    tuning = f"seeds {tuning[0]}–{tuning[-1]}" if isinstance(tuning, list) else f"seed {tuning}"
    chosen = f"seeds {seeds[0]}–{seeds[-1]}, settings chosen on {tuning}" if seeds else f"{tuning} alone"
    return f"`{found['command']}`: {made['date']}, {chosen}; {made['machine']}, {spent}; {versions}.\n"


def renew(text: str, results: Results) -> str:
    """The page with every number and table as the results have them."""

    def inline(match: re.Match[str]) -> str:
        path = match["path"]
        return f"{_text(results.find(path), path)}<!--lab:{path}-->"

    def block(match: re.Match[str]) -> str:
        path = match["path"]
        new = _table(results, path) if match["kind"] == "table" else _made(results, path)
        return f"<!--lab-{match['kind']}:{path}-->\n{new}<!--/lab-->"

    return _INLINE.sub(inline, _BLOCK.sub(block, text))


def problems(pages: Sequence[Path], results: Results) -> list[str]:
    """One line for each line of a page that the results contradict, and for each mark that is malformed."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        read = len(_INLINE.findall(text)) + len(_BLOCK.findall(text))
        if read != len(re.findall(r"<!--lab", text)):
            found.append(f"{page}: a lab comment has no number before it, or no end.")
        new = renew(text, results)
        for at, (old_line, new_line) in enumerate(
            zip(text.splitlines(), new.splitlines(), strict=False), start=1
        ):
            if old_line != new_line:
                found.append(f"{page}:{at}: {old_line.strip()!r} should be {new_line.strip()!r}")
        if len(text.splitlines()) != len(new.splitlines()):
            found.append(f"{page}: a table has other rows than the results.")
    return found


def _picture(documentation: Path, experiment: str) -> Path:
    return documentation / "assets" / "lab" / f"{experiment}.png"


def _source(picture: Path) -> str | None:
    """The fingerprint in a picture."""
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as opened:
        return opened.info.get("Source")


def pages_of(documentation: Path) -> list[Path]:
    """All Markdown pages of the documentation, and the README beside it."""
    readme = documentation.parent / "README.md"
    return [*sorted(documentation.rglob("*.md")), *([readme] if readme.exists() else [])]


def main(documentation: Path, results: Path, *, write: bool = False) -> None:
    """Check, or bring up to date, and say how many marks there are.

    Raises:
        InputError: a number in the pages is not what the results say.
    """
    if not documentation.is_dir():
        raise InputError(f"There is no documentation in {documentation}.")
    pages, found = pages_of(documentation), Results(results)
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    marked = [page for page, text in texts.items() if "<!--lab" in text]
    pictures = sorted({name for text in texts.values() for name in _PICTURE.findall(text)})
    if write:
        for page in marked:
            page.write_text(renew(texts[page], found), encoding="utf-8")
        for name in pictures:
            module = importlib.import_module(f"experiments.{found[name]['experiment']}")
            module.draw(found[name], _picture(documentation, name))
    wrong = problems(marked, found) + [
        f"{_picture(documentation, name)} was not drawn from {results / name / 'summary.json'}."
        for name in pictures
        if _source(_picture(documentation, name)) != fingerprint(found[name])
    ]
    if wrong:
        raise InputError("the documentation is not what the results say:\n  " + "\n  ".join(wrong))
    marks = sum(texts[page].count("<!--lab") for page in marked)
    print(f"{marks} numbers and tables in {len(marked)} pages agree with {results}.")
