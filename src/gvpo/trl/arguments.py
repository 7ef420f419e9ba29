"""What `gvpo train` reads: flags and a YAML recipe, in TRL's own way."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import ModelConfig, TrlParser

from gvpo.errors import InputError, refused
from gvpo.trl.config import REFUSED, GVPOConfig


@dataclass
class GVPOScriptArguments:
    """Prompts and rewards of `gvpo train`.

    Args:
        dataset_name: gsm8k, math, arithmetic, reasoning_gym:TASK, a .jsonl or .parquet file, or a Hub id;
            several are put together.
        dataset_source: file or Hub id to read instead of the data set's own.
        dataset_revision: commit, branch or tag of the data set on the Hub.
        dataset_train_split: split to train on.
        dataset_size: how many prompts, drawn with the seed. Default: all.
        eval_dataset_name: data set for evaluation (with eval_strategy). Default: dataset_name's test split.
        eval_dataset_split: split to evaluate on.
        eval_dataset_size: how many prompts of it, drawn with the seed. Default: all.
        prompt_column: column of the prompt or question.
        answer_column: column of the ground truth; '' if rewards need none.
        image_column: column with the image of each prompt, or a list of them: files, or as `datasets` keeps
            images. It takes a vision-language model.
        system_prompt: first message of each conversation.
        instruction: text after each question; '' for none. Default: the data set's own.
        chat: send prompts through the chat template; --no_chat sends them as plain text.
        chat_template: a Jinja file to use in place of the tokenizer's chat template.
        keep_columns: further columns of the data set, for reward functions of your own and environments.
        reward_funcs: accuracy, exact, format, length, length:512, reasoning_gym, module:function, or weighted
            sums such as 'accuracy + 0.2*format'. Default: accuracy, or with an environment none but its own.
        tools: functions that the model may call, each as module:function.
        environment: what makes the environment of an episode, as module:class.
        rollout_func: what samples in place of TRL, as module:function.
        resume: 'auto' goes on from the last checkpoint in output_dir, if any; or a checkpoint.
        plan: only tell how much memory each phase will need, and the largest micro-batch that fits.
        threads: of each process on a CPU. Default: OMP_NUM_THREADS, or the cores that are free.
    """

    dataset_name: list[str] = field(default_factory=list)
    dataset_source: str | None = None
    dataset_revision: str | None = None
    dataset_train_split: str = "train"
    dataset_size: int | None = None
    eval_dataset_name: list[str] = field(default_factory=list)
    eval_dataset_split: str = "test"
    eval_dataset_size: int | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    image_column: str | None = None
    system_prompt: str | None = None
    instruction: str | None = None
    chat: bool = True
    chat_template: str | None = None
    keep_columns: list[str] = field(default_factory=list)
    reward_funcs: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    environment: str | None = None
    rollout_func: str | None = None
    resume: str | None = None
    plan: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("dataset_name", "eval_dataset_name", "reward_funcs", "tools", "keep_columns"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))
        if self.image_column is not None and not self.chat:
            raise InputError(
                "image_column needs conversations, which say where images stand: leave no_chat out."
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads={self.threads}: give 1 or more.")
        if not self.reward_funcs and self.environment is None:
            self.reward_funcs = ["accuracy"]


@dataclass
class TrainArguments:
    """All that `gvpo train` was told; `given` is what differs from the defaults, as it was written."""

    script: GVPOScriptArguments
    training: GVPOConfig
    model: ModelConfig
    given: dict[str, Any]


class _Parser(TrlParser):
    """Bad usage is an `InputError` of one sentence in place of two pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}.")


def parse_arguments(argv: Sequence[str]) -> TrainArguments:
    """Flags, over a recipe given by `--config recipe.yaml`, over the defaults.

    Raises:
        InputError: unknown options (with the nearest name), values of a wrong type or out of range.
        SystemExit: code 0, after `--help`.
    """
    argv = list(argv)
    parser = _Parser((GVPOScriptArguments, GVPOConfig, ModelConfig), prog="gvpo train", allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="A YAML file with any of these options.")
    defaults: dict[str, Any] = {}
    explained = _explained(GVPOScriptArguments, *GVPOConfig.__mro__)
    for action in parser._actions:
        defaults.setdefault(action.dest, action.default)  # the first: --no_flag has the same destination
        if action.dest in REFUSED:  # still known, so that using it gets the reason
            action.help = argparse.SUPPRESS
        elif action.dest in explained:
            action.help = explained[action.dest].replace("%", "%%")
    recipe = _recipe(parser.parse_known_args(argv)[0].config, defaults)
    parser.set_defaults_with_config(**recipe)
    namespace, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")] or rest
    if unknown:
        raise InputError(_unknown(unknown[0].split("=")[0], defaults, "There is no option"))
    given = {key: v for key, v in vars(namespace).items() if key != "config" and v != defaults[key]}
    if not torch.cuda.is_available() and not torch.backends.mps.is_available() and "fp16" not in given:
        parser.set_defaults(**{"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | recipe)
    try:
        script, training, model, *_ = parser.parse_args_into_dataclasses(argv)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(" ".join(str(error).split()) or type(error).__name__) from error
    return TrainArguments(script, training, model, given)


def _explained(*configs: type) -> dict[str, str]:
    """What the docstrings of configurations say of each option."""
    found: dict[str, str] = {}
    for config in configs:
        arguments = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _recipe(path: str | None, known: dict[str, Any]) -> dict[str, Any]:
    """The mapping in the file of `--config`."""
    if path is None:
        return {}
    try:
        with refused(f"The recipe {path} cannot be read", "check --config", OSError):
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise InputError(f"The recipe {path} is no valid YAML{line}: correct it.") from error
    if not isinstance(recipe, dict):
        raise InputError(f"The recipe {path} must be a YAML mapping of options to values.")
    environment = recipe.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise InputError(f"env in the recipe {path} must be a mapping of variables to values.")
    variables = {str(key): str(value) for key, value in environment.items()}
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name + value:
            raise InputError(
                f"env in the recipe {path} sets {name!r}, which cannot be an environment variable."
            )
    for key in recipe:
        if key not in known:
            raise InputError(_unknown(str(key), known, f"The recipe {path} has an unknown option"))
        if isinstance(recipe[key], list) and not isinstance(known[key], list) and known[key] is not None:
            raise InputError(f"{key} in the recipe {path} must be one value, not a list.")
    os.environ.update(variables)
    return recipe


def _unknown(name: str, known: dict[str, Any], what: str) -> str:
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else "gvpo train --help lists them all."
    return f"{what} {name}: {hint}"
