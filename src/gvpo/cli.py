"""The `gvpo` command. Exit code 0 when done, 2 with one sentence on bad usage or input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gvpo import __version__
from gvpo.data.command import data
from gvpo.errors import InputError, missing_extra
from gvpo.evaluate.command import evaluate, report
from gvpo.verl.command import verl

app = typer.Typer(
    name="gvpo",
    help="Group Variance Policy Optimization: exact post-training of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# For commands that read their own arguments.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    llm: Annotated[
        bool, typer.Option("--llm", help="A real one: SmolLM2-135M-Instruct, in minutes.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --llm: another chat model, a folder or Hub id.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Without --llm: addition or subtraction.  [default: addition]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="The run directory.  [default: runs/quickstart, or runs/quickstart-llm]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of GVPO.  [default: 100, or 40 with --llm]")
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Temperature of the implicit reward, above 0.  [default: 0.2, or 0.1 with --llm]"),
    ] = None,
) -> None:
    """Watch a language model learn by GVPO on a CPU: a tiny one in a minute, a real one in minutes."""
    import psutil
    import torch

    from gvpo.machine import choose_threads

    if wrong := "--task" if llm and task else "--model" if model and not llm else None:
        raise InputError(f"{wrong} is for a quickstart {'without' if llm else 'with'} --llm: leave it out.")
    given = {"task_name": task, "output": output, "steps": steps, "beta": beta, "model": model}
    given = {name: value for name, value in given.items() if value is not None}
    run: Callable[..., object]
    if llm:
        from gvpo.quickstart_llm import quickstart_llm as run
    else:
        from gvpo.quickstart import quickstart as run

    # More than one cost the tiny model more than they bring. The choice holds for all that follows, which
    # would take the work of what was before it for somebody else's.
    typer.echo(choose_threads(run=output or Path("runs/quickstart-llm")) if llm else choose_threads(most=1))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run(seed=seed, started=psutil.Process().create_time(), **given)


@app.command(
    context_settings=_PASSED_ON,
    help="Train a causal language model: --config recipe.yaml and/or flags. --help lists them all.",
)
def train(context: typer.Context) -> None:
    from gvpo.trl.train import main as run

    run(context.args)


replay = typer.Typer(help="Replay buffers.", no_args_is_help=True, rich_markup_mode=None)


@replay.callback()
def _replay() -> None:
    pass


@replay.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A replay directory, one process's folder, or a saved one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Parquet file.")],
) -> None:
    """Write a replay buffer's groups as Parquet, a row each, which --offline reads too."""
    from gvpo.replay.view import export as run

    typer.echo(f"{run(folder, output)} groups written to {output}")


@app.command()
def doctor() -> None:
    """What is installed, what it can do on this machine, and what would bring what is missing."""
    from rich.console import Console

    from gvpo.doctor import doctor as run

    run(Console())


app.command("eval")(evaluate)
app.command("report")(report)
app.add_typer(data, name="data")
app.add_typer(replay, name="replay")
app.add_typer(verl, name="verl")


@app.command(
    context_settings=_PASSED_ON,
    help="Experiments on problems small enough to be sure: GVPO beside GRPO, RLOO, GSPO, DPO and others.",
)
def lab(context: typer.Context) -> None:
    checkout = Path(__file__).parents[2]
    if not (checkout / "experiments" / "command.py").is_file():
        raise InputError("gvpo lab comes with the repository: clone it, and pip install -e '.[trl]' there.")
    sys.path.insert(0, str(checkout))
    from experiments.command import lab as run

    run(context.args, prog_name="gvpo lab")


def main(args: list[str] | None = None) -> None:
    """Entry point of the `gvpo` command."""
    try:
        try:
            app(args=args, standalone_mode=True)
        except ModuleNotFoundError as error:
            raise missing_extra(error) from error
    except InputError as error:
        if error.details:
            typer.echo(error.details.rstrip(), err=True)
        typer.echo(f"gvpo: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
