"""`gvpo data`: write a prompt data set, or logs, for training."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from gvpo.errors import InputError, refused


def parse_columns(mappings: list[str]) -> dict[str, str]:
    """`["prompt=question", "answer=solution"]` as a mapping.

    Raises:
        InputError: a part is not NAME=COLUMN.
    """
    columns = {}
    for mapping in mappings:
        ours, equals, theirs = mapping.partition("=")
        if not equals or not ours or not theirs:
            raise InputError(f"the column mapping {mapping!r} is not NAME=COLUMN, as is prompt=question.")
        columns[ours] = theirs
    return columns


FILE = ".jsonl or .parquet file"
KNOWN = "gsm8k, math, math500, aime24, amc, minerva, olympiadbench"
Column = Annotated[
    list[str] | None, typer.Option(help="Other column names: prompt=THEIRS and answer=THEIRS.")
]
SystemPrompt = Annotated[str | None, typer.Option(help="First message of each conversation.")]
Instruction = Annotated[
    str | None, typer.Option(help="Text after each question; '' for none.  [default: the data set's own]")
]


class _PromptsOrLogs(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = not args or args[0] in self.commands or args == ["--help"]
        return super().parse_args(ctx, args if known else ["prompts", *args])


data = typer.Typer(
    cls=_PromptsOrLogs,
    help="Data for training: gvpo data NAME --output FOLDER writes prompts (NAME --help), and so does\n"
    "gvpo data logs FILE --output FOLDER from rated conversations.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@data.command()
def prompts(
    name: Annotated[str, typer.Argument(help=f"{KNOWN}, reasoning_gym:TASK, a {FILE} or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for parquet files and a manifest.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="A file (twice: train and test), a folder with both, or a Hub id, to read instead."
        ),
    ] = None,
    column: Column = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the Hub.")] = None,
    system_prompt: SystemPrompt = None,
    instruction: Instruction = None,
    size: Annotated[int | None, typer.Option(min=1, help="Problems a split, for reasoning_gym.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of reasoning_gym's problems.")] = 0,
) -> None:
    """Write a prompt data set as parquet that both TRL and verl read, with a manifest."""
    from rich.console import Console

    from gvpo.data.writer import write_dataset

    console = Console(highlight=False)
    with console.status("reading") as status:
        manifest = write_dataset(
            name,
            output,
            sources=source or [],
            columns=parse_columns(column or []),
            revision=revision,
            system_prompt=system_prompt,
            instruction=instruction,
            size=size,
            seed=seed,
            progress=lambda split, rows: status.update(f"{split}: {rows} rows"),
        )
    for split, facts in manifest["splits"].items():
        dropped = "".join(f", {count} dropped: {why}" for why, count in facts["rows_dropped"].items())
        console.print(f"{split}: {facts['rows_written']} rows{dropped}", soft_wrap=True)
    console.print(f"written to {output}", soft_wrap=True)


@data.command()
def logs(
    files: Annotated[list[Path], typer.Argument(help=f"Logged conversations with ratings, as {FILE}s.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for train.parquet and a manifest.")],
    rating: Annotated[
        str | None,
        typer.Option(help="Field of the rating; a.b: b in a.  [default: rating, score, reward or feedback]"),
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="WORD=NUMBER for ratings that are words, beyond up and down.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="LOW:HIGH, the ratings that become rewards 0 and 1, such as 1:5.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Field of the ground truth, if reward functions want one.")
    ] = None,
    rewards: Annotated[
        Literal["ratings", "functions", "both"],
        typer.Option(help="Of logged answers: ratings (others are left out), reward functions, or either."),
    ] = "ratings",
) -> None:
    """Write logged answers beside their prompts, each to join a group of fresh ones."""
    from gvpo.data.logs import Logs
    from gvpo.data.writer import write_logs

    with refused("--word takes WORD=NUMBER and --scale LOW:HIGH", "give numbers", ValueError):
        words = {key.lower(): float(value) for key, value in parse_columns(word or []).items()}
        low, high = map(float, scale.split(":")) if scale else (0.0, 1.0)
    if low == high:
        raise InputError(f"--scale {scale} is no scale: give two different numbers.")
    reader = Logs(rating, words, (low, high) if scale else None, answer, rewards)
    facts = write_logs(files, output, reader)
    dropped = "".join(f"; {count} left out: {why}" for why, count in facts["answers_dropped"].items())
    typer.echo(f"{facts['lines']} lines: {facts['answers']} answers to {facts['prompts']} prompts{dropped}")
    if facts["rewards"]:
        spread = ", ".join(f"{name} {value:.3g}" for name, value in facts["rewards"].items())
        typer.echo(f"rewards of {facts['rated']}: {spread}")
    typer.echo(f"written to {output}")
