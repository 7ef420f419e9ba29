"""What to do when the numbers of a run go wrong: the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
