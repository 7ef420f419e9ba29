"""`gvpo lab`: see what GVPO does, where it wins and where it doesn't."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

lab = typer.Typer(
    help="Experiments on problems small enough to be sure: GVPO beside GRPO, RLOO, GSPO, DPO and others.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Seeds = Annotated[int, typer.Option(help="How many seeds to report over; settings are chosen on another.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer steps and settings: a look, not evidence.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; they change the time, not the numbers.")]
Output = Annotated[Path, typer.Option(help="Results go into a directory in it, named after the experiment.")]

_HERE = Path("runs/lab")


_ABOUT = {
    "optimum": "Where the updates lead, from ten samplers: KL to the optimum, exact.",
    "offline": "Learning from a fixed log of responses where several answers are good.",
    "foreign": "Learning addition from another model's responses, whose probabilities nobody knows.",
    "frontier": "Reward against KL on-policy, beside the exact frontier.",
    "reuse": "Many updates on each rollout of addition: where GVPO loses, and why.",
    "relatives": "Beside other losses that regress log-ratios on rewards: REBEL, OPMD, A*-PO, DRO, FlowRL, …",
    "choices": "How large k, how noisy rewards, how long answers, which β schedule.",
    "staleness": "Responses of a policy 0 to 32 updates old: accuracy and KL by lag.",
}


def _add(command: str, experiments: list[str], about: str) -> None:
    def run(seeds: Seeds = 5, quick: Quick = False, workers: Workers = 2, output: Output = _HERE) -> None:
        from experiments.comparison import Scale
        from experiments.runner import run_experiment
        from gvpo.run import check_writable

        scale = Scale.of(seeds, quick)
        check_writable(output)
        for name in experiments:
            run_experiment(name, scale, output / name, workers=workers)

    lab.command(command, help=about)(run)


for _name, _about in _ABOUT.items():
    _add(_name, [_name], _about)
_add("all", list(_ABOUT), "All of them, one after the other.")


@lab.command()
def language(
    model: Annotated[
        str,
        typer.Option(help="Folder of a transformers model; else SmolLM2-135M-Instruct, if it can be had."),
    ] = "",
    output: Annotated[Path, typer.Option(help="The run directory; what is done there is not done again.")] = (
        _HERE / "language"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side on the device.")] = 1,
    minutes: Annotated[float, typer.Option(min=0, help="Stop by then with what is done; 0: no limit.")] = 0,
    seeds: Annotated[int, typer.Option(min=0, help="Seeds to report over; 0: the tuning alone.")] = 3,
    updates: Annotated[int, typer.Option(min=1, help="Updates of a run, two to a rollout.")] = 20,
    rows: Annotated[int, typer.Option(min=8, help="Completions of an update, in groups of 8.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Of each held-out prompt in an evaluation.")] = 64,
    start_rounds: Annotated[int, typer.Option(min=1, help="Times as many samples of the start.")] = 32,
    tasks: Annotated[str, typer.Option(help="Tasks, comma between.")] = "times,sentence",
    methods: Annotated[str, typer.Option(help="Methods, comma between; all by default.")] = "",
    rates: Annotated[str, typer.Option(help="Learning rates to choose from, comma between.")] = "",
) -> None:
    """A real language model: GVPO beside TRL's trainers, reward against KL and diversity."""
    given = locals()
    from experiments.language.command import main

    main(**given)


@lab.command()
def show(output: Output = _HERE) -> None:
    """Tables, JSON and pictures again, from the runs that are there."""
    from experiments.runner import EXPERIMENTS, show_again
    from gvpo.errors import InputError

    names = [name for name in EXPERIMENTS if (output / name / "metrics.jsonl").exists()]
    jobs = (output / "language" / "jobs").is_dir()
    if not (names or jobs):
        raise InputError(f"There are no runs of the laboratory in {output}.")
    if jobs:
        from experiments.language.run import collect

        collect(output / "language")
    for name in names:
        show_again(name, output / name)


@lab.command()
def check(
    documentation: Annotated[Path, typer.Option(help="The pages to check.")] = Path("docs"),
    results: Annotated[Path, typer.Option(help="What the laboratory found.")] = Path("results"),
    write: Annotated[bool, typer.Option("--write", help="Bring the pages up to date.")] = False,
) -> None:
    """Check every number that the documentation takes from the laboratory against its results."""
    from experiments.check import main

    main(documentation, results, write=write)
