"""Turns a shell script that runs verl's GRPO into one that runs GVPO, and says what it changed and why."""

from __future__ import annotations

import re
from typing import Any

import yaml

from gvpo.errors import InputError
from gvpo.verl.settings import DEFAULT_BETA, companions, rules

_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s\\)"']*)"""
_WORD = re.compile(
    rf"""(?P<comment>^[ \t]*\#.*$)
    |(?P<entry>\bverl\.trainer\.main_ppo\b|\brecipe\.gvpo\.\w+)
    |--config-(?P<flag>name|path|dir)[= ](?P<file>{_VALUE})
    |(?<![\w.$/{{-])(?P<quote>["']?)(?P<plus>\+{{0,2}})(?P<name>[a-z_]\w*(?:\.\w+)+)=(?P<value>{_VALUE})(?P=quote)""",
    re.MULTILINE | re.VERBOSE,
)
_BETA = "actor_rollout_ref.actor.gvpo_beta"
_GONE, _ENTRY = "\0", "\1"  # in the place of a removed word, and of verl's entry point


def convert_script(text: str, name: str = "the script") -> str:
    """Convert the shell script `text`; `name` is for messages.

    Returns:
        The converted script, with a comment for each change at its top.

    Raises:
        InputError: it does not run verl's PPO trainer, has a critic or a configuration file of its own.
    """
    required, inert = companions(), rules("inert")
    changes = ["verl.trainer.main_ppo → gvpo.verl: the same Hydra overrides, GVPO's updates."]
    met: set[str] = set()

    def convert(word: re.Match[str]) -> str:
        if word["comment"]:
            return word[0]
        if word["entry"]:
            return _ENTRY
        if word["flag"]:
            new, why = _config_flag(word["flag"], _unquoted(word["file"]), name)
        else:
            met.add(word["name"])
            value = _unquoted(word["value"])
            new, why = word[0], inert.get(word["name"], "")
            if word["name"] == "algorithm.adv_estimator" and value in ("gae", "remax"):
                raise InputError(f"{word[0]} needs more than a group: convert a GRPO script.")
            if word["name"] == "actor_rollout_ref.rollout.mode" and value == "sync":
                why = "verl 0.9 has rollout servers only"
            companion = required.get(word["name"])
            if why:
                new = _GONE
            elif companion and not companion.accepts(_parsed(value)):
                new, why = f"{word['plus']}{word['name']}={companion.right}", companion.why
        if new != word[0]:
            changes.append(f"{word[0]} {'removed' if new == _GONE else f'→ {new}'}: {why}.")
        return new

    script = _WORD.sub(convert, text)
    if _ENTRY not in script:
        raise InputError(f"{name} does not run verl.trainer.main_ppo: give a script of verl's GRPO.")
    added = {f"{key}={c.right}": c.why for key, c in required.items() if c.add and key not in met}
    if _BETA not in met:
        added[f"{_BETA}={DEFAULT_BETA}"] = "the published temperature"
    changes += [f"{word} added: {why}." for word, why in added.items()]
    script = _without_gaps(script).replace(_ENTRY, " \\\n    ".join(["gvpo.verl", *added]))
    first, rest = re.fullmatch(r"(#![^\n]*\n)?(.*)", script, re.DOTALL).groups("")  # type: ignore[union-attr]
    comments = "".join(f"#   {change}\n" for change in changes)
    return f"{first}# Converted by `gvpo verl convert`:\n{comments}{rest.rstrip()}\n"


def _config_flag(what: str, file: str, script: str) -> tuple[str, str]:
    """What takes the place of `--config-name` and the like, and why."""
    file = file.removesuffix(".yaml")
    if what != "name" or file == "ppo_trainer":
        return _GONE, "gvpo.verl finds verl's configuration itself"
    if file == "ppo_megatron_trainer":
        return "model_engine=megatron", "as verl 0.9 says it"
    raise InputError(
        f"{script} uses a configuration file of its own, {file}: write its settings as overrides, for "
        "gvpo.verl has its own primary file."
    )


def _without_gaps(script: str) -> str:
    """Close what removed words leave, lines that go whole and the end of a command among them."""
    line = rf"[ \t{_GONE}]*{_GONE}[ \t]*"
    for gap in (rf"^{line}\\\n", rf"[ \t]*\\\n{line}$", rf"^{line}\n", rf"[ \t]*{_GONE}"):
        script = re.sub(gap, "", script, flags=re.MULTILINE)
    return script


def _unquoted(word: str) -> str:
    return word.strip("\"'")


def _parsed(value: str) -> Any:
    """What Hydra makes of the value of an override; of shell variables, their text."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
