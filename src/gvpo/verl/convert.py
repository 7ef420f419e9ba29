"""Turns a shell script that runs verl's GRPO into one that runs GVPO, and says what it changed and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gvpo.errors import InputError
from gvpo.verl.settings import DEFAULT_BETA

_ENTRY = re.compile(r"\bverl\.trainer\.main_ppo\b|\brecipe\.gvpo\.\w+")
# An override: one word of the shell, whose value may be quoted.
_OVERRIDE = re.compile(
    r"""(?<![\w.$/{-])(?P<plus>\+{0,2})(?P<name>[a-z_]\w*(?:\.\w+)+)=(?P<value>"[^"]*"|'[^']*'|[^\s\\)"']*)"""
)
_CONFIG_FLAG = re.compile(r"""--config-(?P<what>name|path|dir)[= ](?P<value>"[^"]*"|'[^']*'|[^\s\\]+)""")
_KL = "the KL term is part of GVPO's objective, with beta as its coefficient"
_CLIPPING = "GVPO has no clipping"
_SUMS = "GVPO sums over tokens: its weights are for whole sequences"
_CORRECTION = "GVPO needs no correction for the engine that sampled"

_ACTOR = "actor_rollout_ref.actor"
# name, value, why; these are added where the script does not have them
_SET = (
    ("algorithm.adv_estimator", "grpo", "it is what keeps a prompt's responses together"),
    ("algorithm.norm_adv_by_std_in_grpo", "False", "GVPO's optimum is defined by the reward itself"),
    ("algorithm.use_kl_in_reward", "False", _KL),
    (
        f"{_ACTOR}.use_kl_loss",
        "False",
        _KL + "; gvpo.reference=initial pulls to the initial policy",
    ),
    (f"{_ACTOR}.entropy_coeff", "0", "an entropy bonus moves the optimum; raise beta instead"),
    (f"{_ACTOR}.policy_loss.loss_mode", "gvpo", "the objective"),
    (f"{_ACTOR}.gvpo_beta", str(DEFAULT_BETA), "the published temperature"),
)
_ADD = {
    "algorithm.adv_estimator",
    "algorithm.norm_adv_by_std_in_grpo",
    f"{_ACTOR}.policy_loss.loss_mode",
    f"{_ACTOR}.gvpo_beta",
}
_DROP: dict[str, str] = {
    f"{_ACTOR}.kl_loss_coef": _KL,
    f"{_ACTOR}.kl_loss_type": _KL,
    "algorithm.kl_ctrl.kl_coef": _KL,
    "algorithm.kl_ctrl.type": _KL,
    "algorithm.kl_penalty": _KL,
    f"{_ACTOR}.clip_ratio": _CLIPPING,
    f"{_ACTOR}.clip_ratio_low": _CLIPPING,
    f"{_ACTOR}.clip_ratio_high": _CLIPPING,
    f"{_ACTOR}.clip_ratio_c": _CLIPPING,
    f"{_ACTOR}.loss_agg_mode": _SUMS,
    f"{_ACTOR}.loss_scale_factor": _SUMS,
    f"{_ACTOR}.use_prefix_grouper": "rows of a group are not kept in one micro-batch",
    "algorithm.rollout_is": _CORRECTION,
    "algorithm.rollout_correction.rollout_is": _CORRECTION,
    "algorithm.rollout_correction.rollout_rs": _CORRECTION,
    "algorithm.rollout_correction.bypass_mode": _CORRECTION,
}


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
    added = [(key, value, why) for key, value, why in _SET if key in _ADD and key not in found]
    changes += [f"{key}={value} added: {why}." for key, value, why in added]
    words = "".join(f" \\\n    {key}={value}" for key, value, _ in added)
    body = _map_code(
        "\n".join(lines), lambda line: _ENTRY.sub(lambda _: "gvpo.verl" + words, line)
    ).splitlines()
    changes.insert(0, "verl.trainer.main_ppo → gvpo.verl: the same Hydra overrides, GVPO's updates.")
    start = 1 if body and body[0].startswith("#!") else 0
    body[start:start] = ["# Converted by `gvpo verl convert`:", *(f"#   {change}" for change in changes)]
    return Converted("\n".join(body) + "\n", changes)


def _convert_line(line: str, found: set[str], changes: list[str]) -> str:
    wanted = {key: (value, why) for key, value, why in _SET}

    def convert(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        found.add(name)
        plain = value.strip("\"'")
        if name == "algorithm.adv_estimator" and plain in ("gae", "remax"):
            raise InputError(
                f"algorithm.adv_estimator={plain} needs more than a group: convert a GRPO script."
            )
        if name in _DROP:
            changes.append(f"{name}={value} removed: {_DROP[name]}.")
            return ""
        if name == "actor_rollout_ref.rollout.mode" and plain == "sync":
            changes.append(f"{name}={value} removed: verl 0.9 has rollout servers only.")
            return ""
        if name not in wanted or name.endswith("gvpo_beta"):
            return match[0]
        target, why = wanted[name]
        if plain.lower() == target.lower() or (target == "0" and _is_zero(plain)):
            return match[0]
        changes.append(f"{name}: {plain} → {target}: {why}.")
        return f"{match['plus']}{name}={target}"

    return _tidy(line, _OVERRIDE.sub(convert, line))


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


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False
