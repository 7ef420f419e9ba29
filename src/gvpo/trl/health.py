"""Numbers that go wrong: steps that are skipped, kept for study, and reason to stop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.trl.rollouts import Slice, save_rollouts


def check_failures(
    failed: Bool[Tensor, "all_rows"], first: tuple[str, str], *, tolerance: float, step: int, folder: Path
) -> None:
    """Raise an InputError if reward functions failed on more rows of a generation than may fail.

    Args:
        failed: the rows of all processes that have no reward to trust, so that all decide alike.
        first: this process's first failure in words, and its traceback.
        tolerance: share of the rows that may fail.
        step: for the message.
        folder: where the failures are kept.
    """
    count = int(failed.sum())
    if count > tolerance * len(failed):
        raise InputError(
            f"{first[0] or 'A reward function failed on another process'}: {count} of {len(failed)} "
            f"completions of step {step}, where reward_error_tolerance={tolerance:g}; they are kept in "
            f"{folder}.",
            details=first[1],
        )


def total_rewards(
    per_function: Float[Tensor, "all_rows functions"],
    weights: Float[Tensor, "functions"],
    names: Sequence[str],
    step: int,
    *,
    may_lack: bool = False,
) -> tuple[Float[Tensor, "all_rows"], Bool[Tensor, "all_rows"]]:
    """Weighted sum per row, and which rows some reward function could score.

    Raises:
        InputError: there are none, which only a part of a generation may lack.
    """
    valid = ~per_function.isnan().all(1)
    if len(valid) and not valid.any() and not may_lack:
        raise InputError(
            f"Every reward function ({', '.join(names)}) returned None or NaN for all {len(valid)} "
            f"completions of a generation at step {step}: nothing can be learnt from them. Check that the "
            "reward can read the model's answers."
        )
    return (per_function * weights.to(per_function.device)).nansum(1), valid


class Health:
    """Counts optimizer steps whose numbers were not finite, all processes alike.

    Attributes:
        bad_steps: so many in a row.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps, self.bad_steps = max_bad_steps, 0

    def good_step(self) -> None:
        self.bad_steps = 0

    def bad_step(self, batch: GroupBatch, why: str, *, step: int, path: Path) -> None:
        """Keep the inputs of a step that is not made.

        Raises:
            InputError: it was one too many in a row.
        """
        self.bad_steps += 1
        kept = f"its inputs are kept in {path}"
        try:
            save_rollouts(path, [Slice(batch, step)], {"why": why})
        except (OSError, SafetensorError) as error:  # of two evils the smaller
            kept = f"its inputs cannot be kept ({error})"
        if self.bad_steps >= self.max_bad_steps:
            raise InputError(
                f"{self.bad_steps} steps in a row, the last at step {step}, had numbers that are not finite "
                f"({why}): lower learning_rate or raise beta, and look at gvpo/kl and entropy before that; "
                f"{kept}."
            )
        warnings.warn(f"Step {step} is skipped: {why} ({kept}).", stacklevel=3)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        return {"bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        self.bad_steps = state.get("bad_steps", 0)
