"""Where asynchrony pays, on paper: `docs/scale.md`. A simulation from stated assumptions, not a measurement.

python -m benchmarks.scale                                     # all tables and the picture of the page
python -m benchmarks.scale --list                              # the assumptions
python -m benchmarks.scale --set mfu=0.4 --set gpus=128 …      # one cluster with other assumptions
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.lengths import drawer, quantiles_of
from benchmarks.measure import RESULTS, Row, show
from benchmarks.pools import Outcome, Pools, simulate
from gvpo.run import new_figure, save_figure

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "scale.png"


def _given(value: float | str, source: str) -> Any:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class Assumptions:
    """Everything that the tables rest on; `--set name=value` changes any of it."""

    model: str = _given("7B", "7B: Qwen2.5-7B's shape; 70B: Llama-3-70B's")
    gpus: int = _given(32, "of a 7B model; the tables give 70B four times as many")
    rollout: float = _given(0.5, "share of the GPUs that generate; the tables try several")
    groups: int = _given(128, "prompts of an update; chosen")
    k: int = _given(8, "responses of a prompt; as docs/gpu.md")
    prompt: int = _given(150, "tokens of a prompt; as docs/cost.py")
    lengths: str = _given("math500", "measured: solutions of MATH-500 in SmolLM2's tokens")
    mean: float = _given(4000, "tokens to which these lengths are stretched; 0: as they are")
    cap: int = _given(16384, "longest response, tokens; chosen")
    within: float = _given(0.5, "share of the lengths' variance within a group; assumed")
    peak: float = _given(989e12, "bfloat16 operations a second, dense: NVIDIA's H100 SXM data sheet")
    bandwidth: float = _given(3.35e12, "bytes a second of its memory: the same")
    memory: float = _given(72e9, "bytes for weights and cache, of 80e9: vLLM's default of 0.9")
    mfu: float = _given(0.229, "share of the peak in training: measured at 7B on one H100, docs/gpu.md")
    forward: float = _given(0.25, "a scoring pass over a training pass: 2 of 8 operations, checkpointed")
    read: float = _given(0.7, "share of the bandwidth that decoding reaches; assumed")
    stride: float = _given(0.0015, "seconds a decoding step costs besides; assumed")
    row: float = _given(3e-5, "seconds that each row adds to it (sampling, scheduling); assumed")
    slots: int = _given(256, "rows of an engine at most, if its cache has room for their mean")
    network: float = _given(50e9, "bytes a second of new weights into an engine: 400 Gb/s")
    load: float = _given(1.0, "seconds that new weights cost besides; assumed")
    host: float = _given(25e9, "bytes a second between GPU and host; PCIe 5 ×16 has 64e9; assumed")
    seed: int = _given(0, "of the lengths")


@dataclass(frozen=True)
class Model:
    """Bytes are of bfloat16. Weights that multiply leave the input embedding out."""

    weights: float
    multiplying: float
    cache: float  # bytes a token of context: layers × key-value heads × 128 × 2 × 2
    engine: int  # GPUs of an engine (tensor parallel)


MODELS = {
    "7B": Model(7.62e9, 7.07e9, 28 * 4 * 128 * 4, 1),
    "70B": Model(70.6e9, 69.5e9, 80 * 8 * 128 * 4, 8),
}

MAY_BE_ZERO = ("mean", "within", "forward", "stride", "row", "load", "prompt", "seed")

# What is scored before the gradient: forward passes, copies of the parameters between GPU and host.
SCORING = {
    "GVPO, rollout reference, no lag": (0, 0),
    "PPO or GRPO, the engine's probabilities": (0, 0),
    "decoupled PPO or GRPO": (1, 3),
    "decoupled PPO or GRPO, with KL": (2, 3),
    "GVPO, initial reference scored before": (1, 0),
    "GVPO, initial reference": (2, 0),
    "GVPO, the sampler's version as reference": (2, 3),
}
WITHOUT = (0, 0)
USUAL = SCORING["GVPO, initial reference"]


def pools(a: Assumptions, *, ahead: int, way: str = "separate", scoring: tuple[int, int] = USUAL) -> Pools:
    """The cluster that the assumptions describe; `way` is "separate" or "shared" (all GPUs do both)."""
    model = MODELS[a.model]
    rolling = a.gpus if way == "shared" else min(max(round(a.gpus * a.rollout), model.engine), a.gpus - 1)
    engines = rolling // model.engine
    training = a.gpus if way == "shared" else a.gpus - engines * model.engine
    mean = a.mean or float(quantiles_of(a.lengths).mean())
    room = (a.memory * model.engine - 2 * model.weights) / (model.cache * (a.prompt + mean))
    passes, copies = scoring

    def decode(rows: int, context: float) -> float:
        reading = (2 * model.weights + context * model.cache) / (a.bandwidth * a.read)
        multiplying = 2 * model.multiplying * rows / (a.peak * a.read)
        return a.stride + a.row * rows + max(reading, multiplying) / model.engine

    def train(tokens: float) -> float:
        computing = tokens * (1 + a.forward * passes) * 6 * model.multiplying / (a.peak * a.mfu)
        return (computing + copies * 2 * model.weights / a.host) / training

    return Pools(
        engines=engines,
        slots=max(1, min(a.slots, int(room))),
        groups=a.groups,
        k=a.k,
        ahead=ahead,
        decode=decode,
        prefill=lambda tokens: tokens * 2 * model.multiplying / (a.peak * a.read * model.engine),
        train=train,
        load=a.load + 2 * model.weights / a.network,
        prompt=a.prompt,
        shared=way == "shared",
    )


def run(a: Assumptions, *, updates: int = 20, **how: Any) -> Outcome:
    """Simulate the cluster; the same lengths are drawn whatever its pools are."""
    draw = drawer(quantiles_of(a.lengths), k=a.k, within=a.within, cap=a.cap, mean=a.mean, seed=a.seed)
    return simulate(pools(a, **how), draw, updates=updates)


def best(a: Assumptions, shares: tuple[float, ...], **how: Any) -> tuple[float, Outcome]:
    """The rollout share of `shares` with the most updates an hour."""
    outcomes = {share: run(replace(a, rollout=share), **how) for share in shares}
    share = min(outcomes, key=lambda share: outcomes[share].seconds)
    return share, outcomes[share]


SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
WORK: dict[str, dict[str, Any]] = {
    "all alike, 1,000": {"lengths": "lognormal:1000:0", "mean": 0},
    "GSM8K's answers": {"lengths": "gsm8k", "mean": 0},
    "MATH-500's, stretched to 1,000": {"mean": 1000},
    "MATH-500's, stretched to 4,000": {"mean": 4000},
    "log-normal, 8,000 (σ 0.8)": {"lengths": "lognormal:8000:0.8", "mean": 0, "cap": 32768},
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "as assumed": {},
    "training twice as fast": {"mfu": 0.458},
    "half as fast": {"mfu": 0.1145},
    "decoding at half the bandwidth": {"read": 0.35},
    "a row costs no time of its own": {"row": 0},
    "cut off at 8,192 tokens": {"cap": 8192},
    "half the prompts an update": {"groups": 64},
    "twice": {"groups": 256},
    "a group's lengths alike": {"within": 0},
    "unlike": {"within": 1},
    "8 GPUs": {"gpus": 8},
    "128": {"gpus": 128},
}


def _gpus(a: Assumptions, model: str) -> int:
    return a.gpus * (4 if model == "70B" else 1)


def _cells(outcome: Outcome) -> Row:
    return {
        "s": outcome.seconds,
        "tokens/s": outcome.tokens / outcome.seconds,
        "trainer busy": outcome.trainer,
        "engines busy": outcome.rollout,
        "lag": outcome.lag,
        "lag_max": outcome.lag_max,
        "mixed": outcome.mixed,
        "spanning": outcome.spanning,
    }


def compared(a: Assumptions, ahead: int) -> Row:
    """Synchronous on all GPUs, asynchronous on all, and in pools of the best split."""
    together = run(a, ahead=0, way="shared")
    shared = run(a, ahead=1, way="shared")
    one = best(a, SHARES, ahead=1)[1]
    share, apart = best(a, SHARES, ahead=ahead)
    return {
        "synchronous s": together.seconds,
        "synchronous engines": together.rollout,
        "shared": together.seconds / shared.seconds,
        "one": together.seconds / one.seconds,
        "apart": together.seconds / apart.seconds,
        "share": share,
        "lag": apart.lag,
        "lag_max": apart.lag_max,
        "mixed": apart.mixed,
    }


def where_it_pays(a: Assumptions, ahead: int) -> Iterator[Row]:
    for model in MODELS:
        for name, work in WORK.items():
            here = replace(a, model=model, gpus=_gpus(a, model), **work)
            yield {"model": model, "lengths": name, **compared(here, ahead)}


def otherwise(a: Assumptions, ahead: int) -> Iterator[Row]:
    """What the answer depends on: one assumption changed at a time."""
    for name, change in OTHERWISE.items():
        yield {"assumption": name, **compared(replace(a, **change), ahead)}


def splits(a: Assumptions, farthest: int) -> Iterator[Row]:
    """Throughput and staleness against the pools' sizes and how far generation may run ahead."""
    yield {"way": "synchronous, all GPUs", "ahead": 0, "share": None, **_cells(run(a, ahead=0, way="shared"))}
    for ahead in sorted({1, 2, farthest, 2 * farthest}):
        yield {
            "way": "shared GPUs",
            "ahead": ahead,
            "share": None,
            **_cells(run(a, ahead=ahead, way="shared")),
        }
        for share in SHARES:
            outcome = run(replace(a, rollout=share), ahead=ahead)
            yield {"way": "pools", "ahead": ahead, "share": share, **_cells(outcome)}


def old_policies(a: Assumptions, ahead: int) -> Iterator[Row]:
    """What scoring costs: of the trainer's time by the formula, of the cluster's by simulation."""
    tokens = a.groups * a.k * (a.mean + a.prompt)
    for model in MODELS:
        here = replace(a, model=model, gpus=_gpus(a, model))
        plain = pools(here, ahead=ahead, scoring=WITHOUT).train(tokens)
        runs = [best(here, SHARES, ahead=ahead, scoring=(passes, 0))[1].seconds for passes in range(3)]
        for name, scoring in SCORING.items():
            yield {
                "model": model,
                "update": name,
                "passes": scoring[0],
                "copies": scoring[1],
                "scoring s": pools(here, ahead=ahead, scoring=(scoring[0], 0)).train(tokens) - plain,
                "copying s": pools(here, ahead=ahead, scoring=(0, scoring[1])).train(tokens) - plain,
                "trainer": pools(here, ahead=ahead, scoring=scoring).train(tokens) / plain,
                "cluster": runs[scoring[0]] / runs[0],
            }


def assumptions(a: Assumptions) -> list[Row]:
    return [
        {"name": f.name, "value": f"{getattr(a, f.name):g}" if isinstance(f.default, float) else
         str(getattr(a, f.name)), "source": f.metadata["source"]}
        for f in fields(a)
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Updates an hour and mean lag against the share of the GPUs that generate."""
    figure, (left, right) = new_figure(2, width=8.6, height=3.8)
    still = rows[0]
    left.axhline(3600 / still["s"], color="black", linestyle="--", linewidth=1, label="synchronous, all GPUs")
    for ahead in dict.fromkeys(row["ahead"] for row in rows[1:]):
        mine = [row for row in rows if row["way"] == "pools" and row["ahead"] == ahead]
        shares = [row["share"] for row in mine]
        left.plot(shares, [3600 / row["s"] for row in mine], marker="o", markersize=3, label=f"ahead {ahead}")
        right.plot(shares, [row["lag"] for row in mine], marker="o", markersize=3)
    for axis, label in ((left, "updates an hour"), (right, "mean lag, updates")):
        axis.set_xlabel("share of the GPUs that generate")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def changed(settings: list[str]) -> Assumptions:
    """The assumptions with `name=value` set.

    Raises:
        typer.BadParameter: there is no such assumption, or its value is of another kind or out of range.
    """
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Assumptions)}
    new: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in kinds:
            raise typer.BadParameter(f"--set {setting}: write name=value; names are {', '.join(kinds)}")
        try:
            new[name] = kinds[name](float(value)) if kinds[name] is int else kinds[name](value)
        except ValueError:
            raise typer.BadParameter(f"--set {setting}: {value!r} is no {kinds[name].__name__}") from None
        if kinds[name] is not str and not (new[name] > 0 or (name in MAY_BE_ZERO and new[name] == 0)):
            raise typer.BadParameter(f"--set {setting}: {name} must be positive")
    a = Assumptions(**new)
    if a.model not in MODELS:
        raise typer.BadParameter(f"--set model={a.model}: there are {', '.join(MODELS)}")
    if a.within > 1 or a.rollout >= 1:
        raise typer.BadParameter(
            "within is a share, 1 at most; rollout leaves something to the trainer: below 1"
        )
    if a.gpus <= (need := MODELS[a.model].engine):
        raise typer.BadParameter(
            f"--set gpus={a.gpus}: an engine of {a.model} takes {need}, the trainer needs some"
        )
    quantiles_of(a.lengths)
    return a


def one_cluster(a: Assumptions, ahead: int) -> list[Row]:
    return [
        {"way": "synchronous, all GPUs", **_cells(run(a, ahead=0, way="shared"))},
        {"way": f"all GPUs, ahead {ahead}", **_cells(run(a, ahead=ahead, way="shared"))},
        {"way": f"{a.rollout:.0%} generate, ahead {ahead}", **_cells(run(a, ahead=ahead))},
    ]


def main(
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value; see --list.")] = None,
    ahead: Annotated[int, typer.Option(min=0, help="Updates that generation may run ahead.")] = 4,
    listed: Annotated[bool, typer.Option("--list", help="Show the assumptions and stop.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for scale.json of the whole page.")] = RESULTS,
    picture: Annotated[Path, typer.Option(help="The page's picture.")] = PICTURE,
) -> None:
    """Simulate a cluster; without --set all that docs/scale.md shows."""
    a, console = changed(settings or []), Console(width=None if Console().is_terminal else 200)
    if listed:
        show(console, "Assumptions", assumptions(a))
    elif settings:
        show(console, f"{a.model} on {a.gpus} GPUs, {a.lengths} (mean {a.mean:g})", one_cluster(a, ahead))
    else:
        tables = {"assumptions": assumptions(a)}
        parts = {"pays": where_it_pays, "otherwise": otherwise, "splits": splits, "old": old_policies}
        for name, part in parts.items():
            tables[name] = list(part(a, ahead))
            show(console, name, tables[name])
        # No machine, no versions: nothing was measured.
        (output / "scale.json").write_text(
            json.dumps({"benchmark": "scale", "rows": tables}, indent=1) + "\n"
        )
        draw(tables["splits"], picture)


if __name__ == "__main__":
    typer.run(main)
