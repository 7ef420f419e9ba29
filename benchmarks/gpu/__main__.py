"""`python -m benchmarks.gpu [parts…]`: see `benchmarks.gpu`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import typer
from rich.console import Console

from benchmarks.gpu import LIMITS, Part
from benchmarks.measure import RESULTS, show

HERE = "benchmarks.gpu.__main__"


class Child:
    """A part in a process of its own, which imports at once and then waits to be let go."""

    def __init__(self, name: str, device: str, tiny: bool, output: Path, model: Path | None) -> None:
        self.name, self.file = name, output / f"{name}.json"
        self.file.unlink(missing_ok=True)
        told = json.dumps({"name": name, "device": device, "tiny": tiny, "output": str(output)})
        words = [sys.executable, "-m", HERE, "--child", told, *(["--model", str(model)] if model else [])]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, text=True)

    def run(self, limit: float) -> str:
        """Let it go, and wait; how it ended."""
        try:
            self.process.communicate("go\n", timeout=limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"cut off after {limit:.0f} s"
        code = self.process.returncode
        return "done" if code == 0 else f"failed, exit code {code}"

    def found(self, status: str) -> dict[str, Any]:
        """What it wrote, with how it ended."""
        if not self.file.exists():
            Part(self.name, "", "cpu", False, self.file.parent).save(status)
        record = json.loads(self.file.read_text())
        if not (status.startswith("failed") and record["status"].startswith("failed")):
            record["status"] = status
        self.file.write_text(json.dumps(record, indent=1) + "\n")
        return record  # type: ignore[no-any-return]


def child(told: str, model: Path | None) -> None:
    """One part, in this process."""
    values = json.loads(told)
    module = importlib.import_module(f"benchmarks.gpu.{values['name']}")
    if not sys.stdin.readline():  # nobody waits for it any more
        return
    values["output"] = Path(values["output"])
    part = Part(about=module.ABOUT, model=model, **values)
    part.save("running")
    try:
        module.run(part)
    except Exception as error:
        part.save(f"failed: {type(error).__name__}: {error}"[:500])
        raise
    part.save("done")


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(LIMITS)}; all if none.")] = None,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu to see with --tiny that all of it runs.")
    ] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Sizes whose figures mean nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the JSON files.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a chat model to train.")] = None,
    told: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> None:
    """Do all that needs a GPU, in ten minutes at most."""
    if told is not None:
        child(told, model)
        return
    names = parts or list(LIMITS)
    if unknown := sorted(set(names) - set(LIMITS)):
        raise typer.BadParameter(f"no part is called {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    if (tiny or device != "cuda") and output is None:
        raise typer.BadParameter(
            "figures of --tiny and of a CPU mean nothing and must replace none: --output"
        )
    if device != "cuda" and not tiny:
        raise typer.BadParameter("the sizes are a GPU's: --tiny with --device cpu")
    if model is not None and not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} is no folder of a model: config.json is not there")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here; --device cpu --tiny shows that everything runs")
    folder = output or RESULTS / "gpu"
    console = Console(width=None if Console().is_terminal else 180)
    found = {}
    children = [Child(names[0], device, tiny, folder, model)]
    for index, name in enumerate(names):
        if index + 1 < len(names):  # it imports meanwhile
            children.append(Child(names[index + 1], device, tiny, folder, model))
        limit = LIMITS[name] if device == "cuda" else 600
        found[name] = children[index].found(children[index].run(limit))
    for name, record in found.items():
        title = f"{name} ({record['status']}): {record['about']}"
        if record["rows"]:
            show(console, title, record["rows"])
        else:
            console.print(title)
    if wrong := [name for name, record in found.items() if record["status"] != "done"]:
        console.print(f"Not done: {', '.join(wrong)}.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
