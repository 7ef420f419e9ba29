"""`python -m benchmarks.calculator`: examples/calculator.py with three seeds, for docs/guide/agents.md."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import RESULTS, Row, in_fresh_process, write

ROOT = Path(__file__).parents[1]
ABOUT = (
    "shares of right answers and calls an episode on held-out problems, before and after GVPO; CPU seconds."
)


def once(seed: int, folder: Path) -> Row:
    main = runpy.run_path(str(ROOT / "examples" / "calculator.py"))["main"]
    return main(seed, folder)  # type: ignore[no-any-return]


def main(
    runs: Annotated[
        Path, typer.Option(help="Where the runs are; one that is there is not made again.")
    ] = Path("runs/calculator"),
) -> None:
    """Run three seeds, keep their figures, and the picture of the first."""
    torch.set_num_threads(1)
    rows = []
    for seed in (0, 1, 2):
        summary = runs / str(seed) / "summary.json"
        if not summary.exists():
            in_fresh_process(once, seed, summary.parent)
        rows.append(json.loads(summary.read_text()))
    write(RESULTS, "calculator", ABOUT, rows)
    shutil.copy(runs / "0" / "calculator.png", ROOT / "docs" / "assets" / "calculator.png")


if __name__ == "__main__":
    typer.run(main)
