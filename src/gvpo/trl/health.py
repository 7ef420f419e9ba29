"""Numbers that go wrong: steps that are skipped, kept for study, and reason to stop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.trl.checkpoint import Stateful
from gvpo.trl.rollouts import Slice, save_rollouts


class Health(Stateful):
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
