"""Turns a shell script that runs verl's GRPO into one that runs GVPO, and says what it changed and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from gvpo.errors import InputError
from gvpo.verl.settings import DEFAULT_BETA, Companion, companions

_ENTRY = re.compile(r"\bverl\.trainer\.main_ppo\b|\brecipe\.gvpo\.\w+")
# An override: one word of the shell, whose value may be quoted.
_OVERRIDE = re.compile(
    r"""(?<![\w.$/{-])(?P<plus>\+{0,2})(?P<name>[a-z_]\w*(?:\.\w+)+)=(?P<value>"[^"]*"|'[^']*'|[^\s\\)"']*)"""
)
_BETA = "actor_rollout_ref.actor.gvpo_beta"
_CONFIG_FLAG = re.compile(r"""--config-(?P<what>name|path|dir)[= ](?P<value>"[^"]*"|'[^']*'|[^\s\\]+)""")


@dataclass(frozen=True)
class Converted:
    """A converted script.

    Attributes:
        script: with a comment for each change at its top.
        changes: the same comments, a sentence each.
    """

    script: str
    changes: list[str]


def convert_script(text: str, name: str = "the script") -> Converted:
    """Convert a shell script.

    Args:
        text: of the script.
        name: of the script, for messages.

    Raises:
        InputError: it does not run verl's PPO trainer, has a critic or a configuration file of its own.
    """
    if not _ENTRY.search(_without_comments(text)):
        raise InputError(f"{name} does not run verl.trainer.main_ppo: give a script of verl's GRPO.")
    changes: list[str] = []
    text, flags = _convert_config_flags(text, name)
    changes += flags
    found: set[str] = set()
    lines: list[str] = []
    for line in text.splitlines():
        converted = line if line.lstrip().startswith("#") else _convert_line(line, found, changes)
        if converted.strip() in ("", "\\") and line.strip() not in ("", "\\"):
            _close(lines, line)
        else:
            lines.append(converted)
    required, _ = companions()
    added = {name: c for name, c in required.items() if c.add and name not in found}
    words = [f"{name}={_word(companion)}" for name, companion in added.items()]
    changes += [f"{word} added: {c.why}." for word, c in zip(words, added.values(), strict=True)]
    if _BETA not in found:
        words.append(f"{_BETA}={DEFAULT_BETA}")
        changes.append(f"{words[-1]} added: the published temperature.")
    entry = " \\\n    ".join(["gvpo.verl", *words])
    body = _map_code("\n".join(lines), lambda line: _ENTRY.sub(lambda _: entry, line)).splitlines()
    changes.insert(0, "verl.trainer.main_ppo → gvpo.verl: the same Hydra overrides, GVPO's updates.")
    start = 1 if body and body[0].startswith("#!") else 0
    body[start:start] = ["# Converted by `gvpo verl convert`:", *(f"#   {change}" for change in changes)]
    return Converted("\n".join(body) + "\n", changes)


def _convert_line(line: str, found: set[str], changes: list[str]) -> str:
    required, inert = companions()

    def convert(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        found.add(name)
        plain = value.strip("\"'")
        if name == "algorithm.adv_estimator" and plain in ("gae", "remax"):
            raise InputError(
                f"algorithm.adv_estimator={plain} needs more than a group: convert a GRPO script."
            )
        if name in inert:
            changes.append(f"{name}={value} removed: {inert[name]}.")
            return ""
        if name == "actor_rollout_ref.rollout.mode" and plain == "sync":
            changes.append(f"{name}={value} removed: verl 0.9 has rollout servers only.")
            return ""
        if name not in required or required[name].accepts(_value(plain)):
            return match[0]
        target = _word(required[name])
        changes.append(f"{name}: {plain} → {target}: {required[name].why}.")
        return f"{match['plus']}{name}={target}"

    return _tidy(line, _OVERRIDE.sub(convert, line))


def _value(text: str) -> Any:
    """What Hydra makes of the value of an override; of shell variables, their text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _word(companion: Companion) -> str:
    """The value to set, as Hydra takes it."""
    value = companion.allow[0]
    return "null" if value is None else str(value)


def _convert_config_flags(text: str, name: str) -> tuple[str, list[str]]:
    changes = []

    def convert(match: re.Match[str]) -> str:
        value = match["value"].strip("\"'").removesuffix(".yaml")
        if match["what"] == "name" and value == "ppo_megatron_trainer":
            changes.append("--config-name=ppo_megatron_trainer → model_engine=megatron: as verl 0.9 says it.")
            return "model_engine=megatron"
        if match["what"] == "name" and value != "ppo_trainer":
            raise InputError(
                f"{name} uses a configuration file of its own, {value}: write its settings as overrides, "
                "for gvpo.verl has its own primary file."
            )
        changes.append(f"{match[0]} removed: gvpo.verl finds verl's configuration itself.")
        return ""

    return _map_code(text, lambda line: _tidy(line, _CONFIG_FLAG.sub(convert, line))), changes


def _map_code(text: str, convert: Callable[[str], str]) -> str:
    return "\n".join(line if line.lstrip().startswith("#") else convert(line) for line in text.splitlines())


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _tidy(before: str, after: str) -> str:
    """Close the gaps that removed words leave, and nothing else."""
    if before == after:
        return before
    indent = before[: len(before) - len(before.lstrip())]
    return (indent + re.sub(r"(?<=\S)[ \t]{2,}", " ", after.strip())).rstrip()


def _close(lines: list[str], removed: str) -> None:
    """A line has gone whole: if it ended its command, the one before it does so now."""
    if not removed.rstrip().endswith("\\") and lines and lines[-1].rstrip().endswith("\\"):
        lines[-1] = lines[-1].rstrip().removesuffix("\\").rstrip()
