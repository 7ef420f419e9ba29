"""The terminal and the report, as pictures for the documentation.

    python -m benchmarks.pictures    # a minute on a CPU; needs chromium

The quickstart's model, warmed up, is trained twice on 64 of its sums, and asked 64 others every ten steps.
Writes docs/assets/terminal.svg (three quarters through the first run), report.html and report.png.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI

from gvpo.evaluate.report import write_report
from gvpo.progress import Ticker
from gvpo.run import read_metrics
from gvpo.samples import read_samples, sample_of

QUICKSTART = "quickstart --steps 1"
TRAIN = """
    train --model_name_or_path runs/quickstart/warmed-up-model --no_chat
    --reward_funcs exact --reference initial --dataset_name sums.jsonl
    --eval_dataset_name others.jsonl --eval_strategy steps --eval_steps 10 --eval_on_start
    --learning_rate 7e-4 --num_generations 8 --max_completion_length 4 --max_steps 40 --logging_steps 1
    --per_device_train_batch_size 128 --per_device_eval_batch_size 128 --save_strategy no --report_to none
"""
BETAS = (0.2, 0.05)
ASSETS = Path(__file__).parents[1] / "docs" / "assets"


def terminal(run: Path, share: float = 0.75) -> str:
    """The live table with that share of the steps made, as SVG without fonts from elsewhere."""
    metrics = read_metrics(run / "metrics.jsonl")
    total = int(metrics[-1]["step"])
    last = round(share * total)
    console = Console(file=StringIO(), force_terminal=True, record=True, width=92)
    now = [0.0]
    with patch("time.monotonic", lambda: now[0]):
        ticker = Ticker(console, "GVPO", total)
        ticker.running()
        for entry in metrics:
            if entry["step"] <= last:
                now[0] += entry.get("step_time", 0.0)
                ticker.advance(int(entry["step"]), metrics=entry)
        shown = [line for line in read_samples(run) if line["step"] < last and not line["held_out"]][-1]
        ticker.sample = sample_of(shown["samples"][-1])
        console.print(ticker)
    drawn = console.export_svg(title="gvpo train", theme=MONOKAI, unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)


def picture(page: Path, output: Path, width: int = 1180, height: int = 1150) -> None:
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
    Image.open(output).quantize(48).save(output, optimize=True)


def trained(folder: Path) -> list[Path]:
    """The runs, made below a folder."""

    def gvpo(words: str) -> None:
        subprocess.run([sys.executable, "-m", "gvpo", *words.split()], cwd=folder, check=True)

    gvpo(QUICKSTART)
    sums = (folder / "runs/quickstart/held_out.jsonl").read_text().splitlines(keepends=True)
    (folder / "sums.jsonl").write_text("".join(sums[:64]))
    (folder / "others.jsonl").write_text("".join(sums[64:128]))
    for beta in BETAS:
        gvpo(f"{TRAIN} --beta {beta} --output_dir runs/beta-{beta}")
    return [folder / f"runs/beta-{beta}" for beta in BETAS]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = trained(Path(folder))
        (ASSETS / "terminal.svg").write_text(terminal(runs[0]), encoding="utf-8")
        write_report(runs, ASSETS / "report.html", title="Sums, at two temperatures")
    picture(ASSETS / "report.html", ASSETS / "report.png")
    for name in ("terminal.svg", "report.html", "report.png"):
        print(f"{name}: {(ASSETS / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
