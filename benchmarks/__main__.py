"""`python -m benchmarks [names…]`: run benchmarks, print their tables, write `benchmarks/results/`."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import typer
from rich.console import Console

from benchmarks.measure import RESULTS, show, write

NAMES = (
    "head",
    "statistics",
    "step",
    "memory",
    "tricks",
    "twopass",
    "generation",
    "scaling",
    "threads",
    "long",
    "dynamic",
    "ahead",
    "prefix",
    "quickstart",
    "families",
)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(NAMES)}; all if none.")
    ] = None,
    tiny: Annotated[bool, typer.Option(help="Sizes that only show that everything runs.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the JSON files.")] = None,
) -> None:
    """Measure GVPO's step beside TRL's and beside fine-tuning, on a CPU and one thread."""
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if tiny and output is None:
        raise typer.BadParameter("--tiny needs --output: its figures mean nothing and must replace none")
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 200)
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.run(tiny)
        show(console, f"{name}: {module.ABOUT}", rows)
        write(output or RESULTS, name, module.ABOUT, rows)


if __name__ == "__main__":
    typer.run(main)
