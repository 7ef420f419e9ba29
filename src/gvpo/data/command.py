"""`gvpo data`: write a prompt data set for training."""

from pathlib import Path
from typing import Annotated

import typer

from gvpo.errors import InputError


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


def data(
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
