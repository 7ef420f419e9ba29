"""The terminal and the report of a run, as pictures for the documentation.

    gvpo quickstart --llm
    python -m benchmarks.pictures [RUN]    # runs/quickstart-llm by default; needs chromium

Writes docs/assets/terminal.svg (what is shown three quarters through the run), report.html and report.png.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.terminal_theme import MONOKAI

from gvpo.evaluate.report import write_report
from gvpo.progress import Ticker
from gvpo.run import read_metrics
from gvpo.samples import read_samples, sample_of

ASSETS = Path(__file__).parents[1] / "docs" / "assets"


def terminal(run: Path, share: float = 0.75) -> str:
    """The live table with that share of the steps made, as SVG without fonts from elsewhere."""
    metrics = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]
    total, last = int(metrics[-1]["step"]), metrics[round(share * len(metrics)) - 1]
    console = Console(file=StringIO(), force_terminal=True, record=True, width=92)
    now = [0.0]
    with patch("time.monotonic", lambda: now[0]):
        ticker = Ticker(console, "GVPO", total)
        ticker.running()
        for entry in metrics[: metrics.index(last) + 1]:
            now[0] += entry["step_time"]
            ticker.advance(int(entry["step"]), metrics=entry)
        shown = [line for line in read_samples(run) if line["step"] < last["step"] and not line["held_out"]][
            -1
        ]
        ticker.sample = sample_of(shown["samples"][-1])
        console.print(ticker)
    drawn = console.export_svg(title="gvpo train", theme=MONOKAI, unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)


def picture(page: Path, output: Path, width: int = 1180, height: int = 1500) -> None:
    """A page's upper part, as a browser shows it."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        shot = f"--screenshot={output}"
        command = ["chromium", *options, shot, f"--window-size={width},{height}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart-llm")
    (ASSETS / "terminal.svg").write_text(terminal(run), encoding="utf-8")
    exams = [run / name for name in ("before", "after") if (run / name).is_dir()]
    write_report([run, *exams], ASSETS / "report.html", title=f"GVPO: {run.name}")
    picture(ASSETS / "report.html", ASSETS / "report.png")
    for name in ("terminal.svg", "report.html", "report.png"):
        print(f"{name}: {(ASSETS / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
