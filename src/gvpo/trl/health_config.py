"""What to do when the numbers of a run go wrong: the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gvpo.errors import InputError
from gvpo.run import Rule


@dataclass
class HealthConfig:
    """Failing reward functions, non-finite numbers and divergence; see docs/reliability.md.

    Args:
        on_reward_error: what a reward function's failure on a completion (an exception, a hang, a dead
            process, a value that is no finite number) costs: "drop_row" and "drop_group" take the row, or its
            whole group, out of the step; "error" stops training.
        reward_error_tolerance: share of a generation's rows that may fail before training stops all the same.
        reward_timeout: seconds for a call of a reward function, which then runs in a worker process.
        reward_worker: run each reward function in a worker process, with or without a limit of time.
        tool_timeout: seconds for a call of a tool or of an environment's method, which then ends with an
            error: a tool's is what the model reads, a reset's or a reward's costs the row. Default: no limit.
        max_bad_steps: a step with a log-probability, weight or gradient that is not finite is skipped and its
            inputs are kept in output_dir/incidents; training stops after so many in a row.
        warn_when: rules on logged metrics such as "gvpo/kl > 100"; each warns when it first holds.
        stop_when: rules that save a checkpoint and stop training.
    """

    on_reward_error: Literal["error", "drop_row", "drop_group"] = "drop_row"
    reward_error_tolerance: float = 0.01
    reward_timeout: float | None = None
    reward_worker: bool = False
    tool_timeout: float | None = None
    max_bad_steps: int = 3
    warn_when: list[str] = field(
        default_factory=lambda: ["gvpo/kl > 100", "gvpo/explained_variance < -4", "entropy < 0.001"]
    )
    stop_when: list[str] = field(default_factory=list)


def check_health(config: HealthConfig) -> None:
    """Raise an InputError for settings that cannot be."""
    if config.on_reward_error not in ("error", "drop_row", "drop_group"):
        raise InputError(
            f"on_reward_error={config.on_reward_error!r} is unknown: use 'error', 'drop_row' or 'drop_group'."
        )
    if not 0 <= config.reward_error_tolerance <= 1:
        raise InputError(f"reward_error_tolerance={config.reward_error_tolerance} must be from 0 to 1.")
    for name in ("reward_timeout", "tool_timeout"):
        seconds = getattr(config, name)
        if seconds is not None and not seconds > 0:
            raise InputError(f"{name}={seconds} must be above 0 seconds.")
    if config.max_bad_steps < 1:
        raise InputError(f"max_bad_steps={config.max_bad_steps} must be at least 1.")
    for text in (*config.warn_when, *config.stop_when):
        Rule.parse(text)
