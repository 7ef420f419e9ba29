"""`gvpo eval` and `gvpo report`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gvpo.data.command import FILE, KNOWN, Column, Instruction, SystemPrompt, parse_columns
from gvpo.errors import InputError


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of the model.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help=f"{KNOWN} (also as NAME:FILE), arithmetic, reasoning_gym:TASK, a {FILE} or a Hub id.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The run directory; an unfinished one goes on.")
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", "-n", min=1, help="Completions a prompt.  [default: 32 for aime24, else 1]"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 for greedy decoding.  [default: 0 for one sample, 1 for several]"),
    ] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
    backend: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What samples; vllm needs the extra gvpo[vllm].")
    ] = "transformers",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Precision; vLLM makes half precision of a float32 model unless told."),
    ] = "auto",
    reward: Annotated[
        str, typer.Option(help="What is right, as in training: accuracy, exact, module:function …")
    ] = "accuracy",
    keep_column: Annotated[
        list[str] | None, typer.Option(help="A further column that a reward of your own reads; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or test; files are taken as they are.")] = "test",
    size: Annotated[int | None, typer.Option(min=1, help="So many prompts, drawn at random.")] = None,
    column: Column = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template and no instruction.")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file, for the tokenizer's own.")] = None,
    system_prompt: SystemPrompt = None,
    instruction: Instruction = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions sampled at a time.")] = 32,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier run, for a paired test against it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the intervals.")] = 0,
) -> None:
    """Evaluate a model: pass@1, avg@n, pass@k, maj@k, truncation and unparsable rates, with intervals.

    An evaluation that was cut off goes on where it was when the same command is given again.
    """
    from gvpo.evaluate.evaluation import Settings
    from gvpo.evaluate.sampling import SamplingOptions
    from gvpo.model.tokenizer import read_template

    number = samples or (32 if data.partition(":")[0] == "aime24" else 1)
    if temperature is None:
        temperature = 0.0 if number == 1 else 1.0
    if number > 1 and temperature == 0:
        raise InputError(
            f"{number} greedy samples are all alike: give --temperature (say, 1), or one sample."
        )
    settings = Settings(
        model=model,
        data=data,
        split=split,
        size=size,
        reward=reward,
        samples=number,
        sampling=SamplingOptions(temperature, top_p, max_tokens),
        batch_size=batch_size,
        chat=not plain,
        system_prompt=system_prompt,
        instruction=instruction,
        chat_template=read_template(chat_template),
        backend=backend,
        dtype=dtype,
        seed=seed,
    )
    _evaluate(settings, parse_columns(column or []), keep_column or [], output, compare)


def _evaluate(
    settings: Any, columns: dict[str, str], keep: list[str], output: Path, other: Path | None
) -> None:
    import torch
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from gvpo.data import load_prompts
    from gvpo.evaluate.evaluation import compare, finish, grade, sample_all
    from gvpo.evaluate.sampling import TransformersSampler, VLLMSampler
    from gvpo.machine import choose_threads
    from gvpo.model.tokenizer import load_tokenizer
    from gvpo.progress import Ticker
    from gvpo.rewards.registry import load_reward, needs_answers
    from gvpo.run import RunDirectory

    console = Console(highlight=False)
    transformers_logging.disable_progress_bar()
    reward = load_reward(settings.reward)
    prompts = load_prompts(
        settings.data,
        split=settings.split,
        seed=0,  # the prompts are the same whatever the seed of the sampling, so that runs can be compared
        size=settings.size,
        columns=columns,
        system_prompt=settings.system_prompt,
        instruction=settings.instruction,
        chat=settings.chat,
        keep=keep,
        answers=needs_answers(settings.reward),
    )
    chat = not isinstance(prompts[0]["prompt"], str)
    tokenizer = load_tokenizer(
        settings.model, settings.chat_template, needs_template=chat, advice="--chat-template FILE, or --plain"
    )
    kind = VLLMSampler if settings.backend == "vllm" else TransformersSampler
    make_sampler = partial(
        kind, settings.model, tokenizer, settings.sampling, chat=chat, dtype=settings.dtype
    )
    if settings.backend == "transformers" and not torch.cuda.is_available():
        console.print(choose_threads(run=output), soft_wrap=True)
    run = RunDirectory(output)
    ticker = Ticker(console, "sampling", len(prompts) * settings.samples)
    with ticker.running():
        rows = sample_all(settings, prompts, run, make_sampler, ticker.advance)
    grade(rows, prompts, run, settings.reward, reward)
    summary = finish(run, settings, rows)
    _show(console, summary)
    if other is not None:
        result = compare(output, other, settings.seed)
        run.finish(summary | {"comparison": result})
        difference = result["difference"]
        console.print(
            f"against {other}: {difference['mean']:+.1%} (95 % interval {difference['low']:+.1%} to "
            f"{difference['high']:+.1%}), better on {result['better']} and worse on {result['worse']} of "
            f"{result['prompts']} prompts, p = {result['p_value']:.2g}",
            soft_wrap=True,
        )
    console.print(f"written to {output}", soft_wrap=True)


def _show(console: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{summary['data']}: {summary['prompts']} prompts, {summary['samples']} samples each")
    for heading, side in (("", "left"), ("mean", "right"), ("95 % interval", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for name, figures in summary["metrics"].items():
        style = "{:.1f}" if name == "tokens" else "{:.1%}"
        mean, low, high = (style.format(figures[key]) for key in ("mean", "low", "high"))
        table.add_row(name, mean, f"{low} – {high}")
    console.print(table)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of training or evaluation.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "GVPO runs",
) -> None:
    """Write one self-contained HTML page: curves of the runs overlaid, summaries, sample completions."""
    from rich.console import Console

    from gvpo.evaluate.report import write_report

    size = write_report(runs, output, title=title)
    Console(highlight=False).print(f"written to {output} ({size / 1024:.0f} KiB)", soft_wrap=True)
