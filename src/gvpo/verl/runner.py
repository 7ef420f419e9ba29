"""The Ray actor that drives a run: verl's own, which gets to know GVPO's trainer first."""

from __future__ import annotations

from typing import Any

import ray
from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1

# verl decorates its class in place; this is the class itself.
_Runner: Any = TaskRunnerV1.__ray_metadata__.modified_class


class GVPOTaskRunner(_Runner):
    """verl's V1 task runner."""

    def run(self, config: DictConfig) -> None:
        """Train; `trainer.v1.trainer_mode` names the trainer."""
        import gvpo.verl.trainer  # noqa: F401 - registers "gvpo"

        super().run(config)


def task_runner() -> Any:
    """The actor class that `verl.trainer.main_ppo.run_ppo` takes."""
    return ray.remote(GVPOTaskRunner)
