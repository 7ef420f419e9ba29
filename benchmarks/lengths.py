"""Lengths in tokens of answers that are there: what the simulation of `benchmarks.scale` draws from.

    python -m benchmarks.lengths answers.jsonl --field solution --tokenizer FOLDER   # one number a line

`benchmarks/lengths.json` keeps the quantiles of two public data sets' answers, counted this way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy as np
import typer

KEPT = Path(__file__).with_suffix(".json")
_NORMAL = NormalDist()


def quantiles_of(name: str) -> np.ndarray:
    """Quantiles in tokens at even steps from 0 to 1: kept ones, `lognormal:MEAN:SIGMA`, or those of a file.

    Raises:
        typer.BadParameter: there is nothing of that name, or something in it is no length.
    """
    kept = json.loads(KEPT.read_text())
    if name in kept:
        return np.array(kept[name]["quantiles"], float)
    if name.startswith("lognormal:"):
        try:
            mean, sigma = map(float, name.split(":")[1:])
        except ValueError:
            raise typer.BadParameter(f"{name}: write lognormal:MEAN:SIGMA, as lognormal:4000:0.8") from None
        at = (np.arange(1000) + 0.5) / 1000
        return mean * np.exp(sigma * np.array([_NORMAL.inv_cdf(p) for p in at]) - sigma**2 / 2)
    path = Path(name)
    if not path.is_file():
        raise typer.BadParameter(
            f"{name} is neither a file nor one of {', '.join(kept)}, lognormal:MEAN:SIGMA"
        )
    try:
        found = np.array([int(line) for line in path.read_text().split()])
    except ValueError as error:
        raise typer.BadParameter(f"{path} should have one number of tokens a line: {error}") from None
    if len(found) == 0 or found.min() < 1:
        raise typer.BadParameter(f"{path} has no lengths, or one below 1")
    return np.quantile(found, np.linspace(0, 1, 1001))


def drawer(
    quantiles: np.ndarray, *, k: int, within: float, cap: int, mean: float = 0, seed: int = 0
) -> Callable[[], list[int]]:
    """Draws the lengths of a group's k rows.

    Args:
        quantiles: as above; linear between them.
        within: share of the variance (of the normal scores) that is within a group; the rest is the prompt's.
        cap: longest length; what is longer is cut off there, as generation cuts it.
        mean: stretch all to this mean before they are cut off; 0: as they are.
    """
    stretch = mean / float(np.mean(quantiles)) if mean else 1.0
    at = np.linspace(0, 1, len(quantiles))
    random = np.random.default_rng(seed)

    def draw() -> list[int]:
        score = math.sqrt(1 - within) * random.standard_normal() + math.sqrt(within) * random.standard_normal(
            k
        )
        drawn = np.interp([_NORMAL.cdf(s) for s in score], at, quantiles) * stretch
        return [int(length) for length in np.clip(np.rint(drawn), 1, cap)]

    return draw


def main(
    file: Annotated[Path, typer.Argument(help="JSONL with a text in each line.")],
    field: Annotated[str, typer.Option(help="The text's field.")] = "answer",
    tokenizer: Annotated[
        str, typer.Option(help="Folder or Hub id of a tokenizer.")
    ] = "HuggingFaceTB/SmolLM2-135M",
    keep: Annotated[str, typer.Option(help="Keep quantiles under this name, rather than print.")] = "",
) -> None:
    """Count the tokens of each line's text."""
    from transformers import AutoTokenizer

    count = AutoTokenizer.from_pretrained(tokenizer)
    texts = [json.loads(line)[field] for line in file.read_text(encoding="utf-8").splitlines()]
    found = [max(len(ids), 1) for ids in count(texts)["input_ids"]]
    if not keep:
        print(*found, sep="\n")
        return
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    quantiles = np.quantile(found, np.linspace(0, 1, 201)).round(1).tolist()
    kept[keep] = {"rows": len(found), "mean": round(float(np.mean(found)), 1), "quantiles": quantiles}
    KEPT.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    typer.run(main)
