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


Column = Annotated[
    list[str] | None, typer.Option(help="Other column names: prompt=THEIRS and answer=THEIRS.")
]
SystemPrompt = Annotated[str | None, typer.Option(help="First message of each conversation.")]
Instruction = Annotated[
    str | None,
    typer.Option(
        help="Text after each question; '' for none. "
        "[default: the data set's own, the published recipe's for gsm8k and math]"
    ),
]


def data(
    name: Annotated[
        str,
        typer.Argument(
            help="gsm8k, math, math500, aime24, amc, minerva, olympiadbench, reasoning_gym:TASK, "
            "a .jsonl or .parquet file, or a Hub id."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the parquet files and the manifest.")
    ],
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where to read instead: a file, a folder with train and test files, or a Hub id. "
            "May be given twice, for train and test."
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

        def progress(split: str, rows: int) -> None:
            status.update(f"{split}: {rows} rows")

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
            progress=progress,
        )
    for split, facts in manifest["splits"].items():
        dropped = "".join(f", {count} dropped: {why}" for why, count in facts["rows_dropped"].items())
        console.print(f"{split}: {facts['rows_written']} rows{dropped}", soft_wrap=True)
    console.print(f"written to {output}", soft_wrap=True)
