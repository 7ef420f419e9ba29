"""Turns a shell script that runs verl's GRPO into one that runs GVPO, and says what it changed and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from gvpo.errors import InputError
from gvpo.verl.settings import DEFAULT_BETA, companions

_ENTRY = re.compile(r"\bverl\.trainer\.main_ppo\b|\brecipe\.gvpo\.\w+")
# An override: one word of the shell, whose value may be quoted.
_OVERRIDE = re.compile(
    r"""(?<![\w.$/{-])(?P<plus>\+{0,2})(?P<name>[a-z_]\w*(?:\.\w+)+)=(?P<value>"[^"]*"|'[^']*'|[^\s\\)"']*)"""
)
_CONFIG_FLAG = re.compile(r"""--config-(?P<what>name|path|dir)[= ](?P<value>"[^"]*"|'[^']*'|[^\s\\]+)""")
_BETA = "actor_rollout_ref.actor.gvpo_beta"


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
    conversion = _Conversion(name)
    lines = conversion.lines(text.splitlines())
    if not any(map(_runs_verl, lines)):
        raise InputError(f"{name} does not run verl.trainer.main_ppo: give a script of verl's GRPO.")
    entry = " \\\n    ".join(["gvpo.verl", *conversion.missing()])
    lines = [_ENTRY.sub(lambda _: entry, line) if _runs_verl(line) else line for line in lines]
    changes = [
        "verl.trainer.main_ppo → gvpo.verl: the same Hydra overrides, GVPO's updates.",
        *conversion.changes,
    ]
    head = 1 if lines[0].startswith("#!") else 0
    lines[head:head] = ["# Converted by `gvpo verl convert`:", *(f"#   {change}" for change in changes)]
    return Converted("\n".join(lines) + "\n", changes)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _runs_verl(line: str) -> bool:
    return not _is_comment(line) and _ENTRY.search(line) is not None


class _Conversion:
    """Collects what it changes, a sentence each, and the names of the overrides that it has met."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.required, self.inert = companions()
        self.changes: list[str] = []
        self.met: set[str] = set()

    def lines(self, given: list[str]) -> list[str]:
        """The lines of a script with the overrides that GVPO wants."""
        done: list[str] = []
        for line in given:
            words = line if _is_comment(line) else self._replace(line, _CONFIG_FLAG, self._flag)
            words = line if _is_comment(line) else self._replace(words, _OVERRIDE, self._override)
            if words.strip() not in ("", "\\") or line.strip() in ("", "\\"):
                done.append(words)
            elif not line.rstrip().endswith("\\") and done:
                # The line has gone whole: if it ended its command, the one before it does so now.
                done[-1] = done[-1].rstrip().removesuffix("\\").rstrip()
        return done

    def missing(self) -> list[str]:
        """The overrides to add."""
        added = {name: c for name, c in self.required.items() if c.add and name not in self.met}
        words = {f"{name}={companion.right}": companion.why for name, companion in added.items()}
        if _BETA not in self.met:
            words[f"{_BETA}={DEFAULT_BETA}"] = "the published temperature"
        self.changes += [f"{word} added: {why}." for word, why in words.items()]
        return list(words)

    def _replace(self, line: str, pattern: re.Pattern[str], new: Callable[[re.Match[str]], str]) -> str:
        """With the gaps closed that removed words leave, and nothing else."""
        after = pattern.sub(new, line)
        if after == line:
            return line
        indent = line[: len(line) - len(line.lstrip())]
        return (indent + re.sub(r"(?<=\S)[ \t]{2,}", " ", after.strip())).rstrip()

    def _flag(self, match: re.Match[str]) -> str:
        value = match["value"].strip("\"'").removesuffix(".yaml")
        if match["what"] == "name" and value == "ppo_megatron_trainer":
            self.changes.append(f"{match[0]} → model_engine=megatron: as verl 0.9 says it.")
            return "model_engine=megatron"
        if match["what"] == "name" and value != "ppo_trainer":
            raise InputError(
                f"{self.script} uses a configuration file of its own, {value}: write its settings as "
                "overrides, for gvpo.verl has its own primary file."
            )
        self.changes.append(f"{match[0]} removed: gvpo.verl finds verl's configuration itself.")
        return ""

    def _override(self, match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        self.met.add(name)
        plain = value.strip("\"'")
        if name == "algorithm.adv_estimator" and plain in ("gae", "remax"):
            raise InputError(f"{name}={plain} needs more than a group: convert a GRPO script.")
        why = self.inert.get(name)
        if name == "actor_rollout_ref.rollout.mode" and plain == "sync":
            why = "verl 0.9 has rollout servers only"
        if why:
            self.changes.append(f"{name}={value} removed: {why}.")
            return ""
        companion = self.required.get(name)
        if companion is None or companion.accepts(_value(plain)):
            return match[0]
        self.changes.append(f"{name}: {plain} → {companion.right}: {companion.why}.")
        return f"{match['plus']}{name}={companion.right}"


def _value(text: str) -> Any:
    """What Hydra makes of the value of an override; of shell variables, their text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
