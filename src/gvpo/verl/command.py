"""`gvpo verl`: convert a verl GRPO script, and see GVPO on verl on a laptop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gvpo.verl import TRAINERS

verl = typer.Typer(
    help="GVPO on verl. Training itself is `python -m gvpo.verl <Hydra overrides>`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@verl.command()
def convert(
    script: Annotated[
        Path, typer.Argument(help="A shell script that runs verl's GRPO; - for standard input.")
    ],
) -> None:
    """Print the GVPO script for a verl GRPO script; comments at its top say what was changed and why."""
    from gvpo.errors import refused
    from gvpo.verl.convert import convert_script

    with refused(f"{script} cannot be read", "give a shell script", (OSError, UnicodeDecodeError)):
        text = sys.stdin.read() if str(script) == "-" else script.read_text(encoding="utf-8")
    typer.echo(convert_script(text, str(script)), nl=False)


@verl.command()
def quickstart(
    task: Annotated[str, typer.Option(help="What to learn: addition or subtraction.")] = "addition",
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/quickstart-verl"),
    steps: Annotated[int, typer.Option(min=1, help="Rollouts; each feeds four updates.")] = 10,
    beta: Annotated[float, typer.Option(help="Temperature of the implicit reward, above 0.")] = 0.2,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers that train.")] = 2,
    trainer_mode: Annotated[str, typer.Option(help=f"verl's trainer: {', '.join(TRAINERS)}.")] = TRAINERS[0],
) -> None:
    """Train the quickstart's tiny model through verl's whole Ray pipeline, on a CPU."""
    import time

    started = time.time()
    from gvpo.machine import choose_threads
    from gvpo.verl.quickstart import quickstart as run

    typer.echo(choose_threads(most=1))
    try:
        run(
            task,
            seed,
            output,
            steps=steps,
            beta=beta,
            workers=workers,
            trainer_mode=trainer_mode,
            started=started,
        )
    except RuntimeError as error:
        typer.echo(f"gvpo: {error}", err=True)
        raise typer.Exit(1) from None
