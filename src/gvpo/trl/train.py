"""`gvpo train`: a causal language model, a prompt data set, rewards, and `GVPOTrainer`.

Everything that can be checked is checked before the model is loaded, and nothing is written before that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from transformers import logging as transformers_logging
from trl import get_peft_config, get_quantization_config

from gvpo.data import load_prompts
from gvpo.errors import InputError, first_line
from gvpo.machine import choose_threads
from gvpo.model.tokenizer import load_tokenizer, read_template
from gvpo.rewards import load_reward
from gvpo.rewards.registry import load_function, needs_answers
from gvpo.run import RunDirectory, check_writable, plot_curves
from gvpo.trl.arguments import TrainArguments, parse_arguments
from gvpo.trl.checkpoint import flaw, last_checkpoint
from gvpo.trl.images import named
from gvpo.trl.plan import show_plan
from gvpo.trl.trainer import GVPOTrainer
from gvpo.trl.watch import RunCallback, StopOnSignal

Datasets = tuple[Dataset | None, Dataset | None]  # to train on, and held out

_CURVES = [
    ("reward", [("sampled, training", "reward"), ("held out", "eval_reward")]),
    ("explained variance of the reward", [("", "gvpo/explained_variance")]),
    ("KL to the reference (nats)", [("", "gvpo/kl")]),
    ("completion length (tokens)", [("", "completions/mean_length")]),
]


def main(argv: Sequence[str]) -> None:
    """Train as the flags and the recipe say, and write the run directory.

    Raises:
        InputError: anything about the arguments, the data, the rewards or the model that cannot work.
    """
    started = time.time()
    arguments = parse_arguments(argv)
    script, training = arguments.script, arguments.training
    if arguments.model.model_name_or_path is None:
        raise InputError("model_name_or_path is missing: give a folder with a model, or a Hub id.")
    if script.plan:
        show_plan(arguments, Console(highlight=False))
        return
    rewards = [load_reward(spec) for spec in script.reward_funcs]
    if training.reward_weights is not None and len(training.reward_weights) != len(rewards):
        raise InputError(
            f"There are {len(rewards)} reward_funcs and {len(training.reward_weights)} reward_weights: "
            "give one weight each."
        )
    agents = {
        "tools": [load_function(spec, "tool") for spec in script.tools] or None,
        "environment_factory": script.environment and load_function(script.environment, "environment"),
        "rollout_func": script.rollout_func and load_function(script.rollout_func, "rollout_func"),
    }
    checkpoint = _checkpoint(arguments)
    check_writable(training.output_dir)
    datasets = _datasets(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    record = arguments.given | {"beta": training.beta, "reference": training.reference}
    threads = ""
    if training.device.type == "cpu":
        beside = int(training.generate_ahead > 0)
        begun = Path(training.output_dir) if checkpoint else None
        threads = choose_threads(script.threads, run=begun, beside=beside)
        record["threads"] = torch.get_num_threads()
    trainer = _trainer(arguments, rewards, agents, datasets)
    run = RunDirectory(training.output_dir)
    if trainer.accelerator.is_main_process:
        console.print(threads, end="\n" * bool(threads), soft_wrap=True)
        state = checkpoint and json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        run.start(record, resumed_at=state["global_step"] if state else None)
        _announce(console, arguments, len(trainer.train_dataset), checkpoint)
    callback, stop = RunCallback(run, console), StopOnSignal()
    callback.attach(trainer)
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        callback.close()
        stop.restore()
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        if trainer.accelerator.is_main_process:
            console.print(
                f"Stopped by {stop.received.name} at step {trainer.state.global_step}, with a checkpoint. "
                "Go on with the same command and --resume auto.",
                soft_wrap=True,
            )
        return
    trainer.save_model(training.output_dir)
    if trainer.accelerator.is_main_process:
        _finish(run, console, arguments, trainer, time.time() - started)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name[0] if len(script.dataset_name) == 1 else None)
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.end_training()


def _checkpoint(arguments: TrainArguments) -> str | None:
    """The checkpoint to go on from, if any."""
    folder = Path(arguments.training.output_dir)
    wanted = arguments.script.resume or arguments.training.resume_from_checkpoint
    if wanted is None:
        if any(folder.glob("checkpoint-*")):
            raise InputError(
                f"{folder} already has checkpoints: go on from the last with --resume auto, or choose "
                "another --output_dir."
            )
        return None
    if wanted.lower() in ("auto", "true"):
        return last_checkpoint(folder)
    if why := flaw(Path(wanted)):
        raise InputError(f"{wanted} is not a whole checkpoint: {why}; give another, or auto.")
    return wanted


def _datasets(arguments: TrainArguments) -> Datasets:
    script, training = arguments.script, arguments.training
    if training.offline is not None:
        if script.dataset_name:
            raise InputError(
                f"offline={training.offline} is the training data, and so is dataset_name: give one of them."
            )
        return None, None
    if not script.dataset_name:
        raise InputError("dataset_name is missing: give a name (gsm8k, math, …), a file or a Hub id.")
    if len(script.dataset_name) > 1 and script.dataset_source is not None:
        raise InputError(
            "dataset_source is one source, but dataset_name has several: give NAME:FILE instead."
        )
    train = _load(
        arguments,
        script.dataset_name,
        script.dataset_size,
        [training.demonstration_column] if training.demonstrations_per_group else [],
        split=script.dataset_train_split,
        source=script.dataset_source,
        revision=script.dataset_revision,
    )
    if str(getattr(training.eval_strategy, "value", training.eval_strategy)) == "no":
        return train, None
    if not script.eval_dataset_name and script.dataset_source is not None:
        raise InputError(
            "eval_strategy is set, but dataset_source is for training: give eval_dataset_name too."
        )
    names = script.eval_dataset_name or script.dataset_name
    return train, _load(arguments, names, script.eval_dataset_size, [], split=script.eval_dataset_split)


def _load(
    arguments: TrainArguments, names: list[str], size: int | None, keep: list[str], **own: Any
) -> Dataset:
    script, seed = arguments.script, arguments.training.seed
    images = [] if script.image_column is None else [script.image_column]
    columns = {"prompt": script.prompt_column, "answer": script.answer_column}
    parts = [
        load_prompts(
            name,
            seed=seed,
            size=size if len(names) == 1 else None,
            columns={key: column for key, column in columns.items() if column is not None},
            system_prompt=script.system_prompt,
            instruction=script.instruction,
            chat=script.chat,
            keep=[*script.keep_columns, *keep, *images],
            answers=any(map(needs_answers, script.reward_funcs)),
            **own,
        )
        for name in names
    ]
    for column in images:
        parts = [named(part, column) for part in parts]
    if len(parts) == 1:
        return parts[0]
    if len({type(part[0]["prompt"]) for part in parts}) > 1:
        raise InputError(
            f"{' and '.join(names)} do not go together: one has conversations, the other plain text; "
            "--no_chat makes all plain."
        )
    whole = concatenate_datasets(parts)
    return whole if size is None else whole.shuffle(seed=seed).select(range(min(size, len(whole))))


def _trainer(
    arguments: TrainArguments, rewards: list[Any], agents: dict[str, Any], datasets: Datasets
) -> GVPOTrainer:
    training, model, (train, held_out) = arguments.training, arguments.model, datasets
    trust = bool(getattr(training, "trust_remote_code", False))
    assert model.model_name_or_path is not None
    tokenizer = load_tokenizer(
        model.model_name_or_path,
        read_template(arguments.script.chat_template),
        needs_template=train is not None and not isinstance(train[0]["prompt"], str),
        advice="--chat_template FILE, or --no_chat",
        images=arguments.script.image_column is not None,
        revision=model.model_revision,
        trust_remote_code=trust,
    )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": trust,
    } | dict(training.model_init_kwargs or {})
    try:
        return GVPOTrainer(
            model.model_name_or_path,
            (rewards or None) if train is not None else None,
            training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
            **{name: given for name, given in agents.items() if given is not None},
        )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{model.model_name_or_path} cannot be trained: {first_line(error)}") from error


def _announce(console: Console, arguments: TrainArguments, prompts: int, checkpoint: str | None) -> None:
    training = arguments.training
    assert training.num_generations is not None
    per_step = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    ahead = f", generated {training.generate_ahead} rollout(s) ahead" * (training.generate_ahead > 0)
    lines = [
        f"GVPO on {arguments.model.model_name_or_path}: {prompts:,} prompts, "
        f"{per_step // training.num_generations} groups of {training.num_generations} a step, "
        f"reference={training.reference}{ahead}.",
        f"beta={training.beta:g} asks for a log-ratio of {1 / training.beta:.3g} nats between a response of "
        "reward 1 and one of reward 0.",
    ]
    if checkpoint is not None:
        lines.append(f"Going on from {checkpoint}.")
    console.print("\n".join(lines), soft_wrap=True)


def _finish(
    run: RunDirectory, console: Console, arguments: TrainArguments, trainer: GVPOTrainer, seconds: float
) -> None:
    last = {key: value for entry in run.metrics() for key, value in entry.items()}
    run.finish(
        {
            "steps": trainer.state.global_step,
            "seconds_total": round(seconds, 1),
            "model": arguments.model.model_name_or_path,
            "dataset": arguments.script.dataset_name,
            "beta": arguments.training.beta,
            "reference": arguments.training.reference,
            "seed": arguments.training.seed,
            "processes": trainer.accelerator.num_processes,
            "last": {key: value for key, value in last.items() if isinstance(value, int | float)},
        }
    )
    plot_curves(
        run.path / "curves.png",
        [
            (label, [(name, *points) for name, key in curves if (points := run.curve(key))[0]])
            for label, curves in _CURVES
        ],
        title=f"GVPO: {run.path.name}",
        x="optimizer step",
    )
    console.print(
        f"{trainer.state.global_step} steps in {seconds:.0f} s. The model, metrics.jsonl, summary.json and "
        f"curves.png are in {run.path}. Look at it:\n  gvpo report {run.path} --output report.html",
        soft_wrap=True,
    )
