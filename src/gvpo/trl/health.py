"""Numbers that go wrong: steps that are skipped, kept for study, and reason to stop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.trl.health_config import Rule
from gvpo.trl.rollouts import Slice, save_rollouts

if TYPE_CHECKING:
    from jaxtyping import Bool

    from gvpo.trl.guard import Incidents
    from gvpo.trl.trainer import GVPOTrainer


class Health:
    """Counts a trainer's bad steps, all processes together.

    Attributes:
        bad_steps: steps in a row whose numbers were not finite.
    """

    def __init__(self, trainer: GVPOTrainer) -> None:
        self.trainer = trainer
        self.bad_steps = 0

    def settle_rewards(self, incidents: Incidents, rows: int) -> Bool[Tensor, "all_rows"]:
        """Count and keep the failures of reward functions on this process's `rows`.

        Returns:
            The rows, over all processes, that have no reward to trust.

        Raises:
            InputError: they are more than the settings tolerate, on all processes alike.
        """
        trainer, args = self.trainer, self.trainer.args
        rank, step = trainer.accelerator.process_index, trainer.state.global_step
        path = Path(args.output_dir) / "incidents" / f"rewards-rank-{rank}.jsonl"
        mine, first = incidents.drain(path, step)
        failed = torch.zeros(rows, dtype=torch.bool, device=trainer.accelerator.device)
        failed[sorted(mine)] = True
        failed = trainer.accelerator.gather(failed)
        count = int(failed.sum())
        if count:
            mode = "train" if trainer.model.training else "eval"
            trainer._metrics[mode]["gvpo/reward_incidents"].append(float(count))
        tolerated = 0.0 if args.on_reward_error == "error" else args.reward_error_tolerance
        if count > tolerated * len(failed):
            raise InputError(
                f"{first[0] or 'A reward function failed on another process'}: {count} of {len(failed)} "
                f"completions of step {step}, where reward_error_tolerance={tolerated:g}; they are kept in "
                f"{path.parent}.",
                details=first[1],
            )
        return failed

    def gradients_are_finite(self, model: nn.Module) -> bool:
        """Whether all are, on all processes. Where a loss scaler or DeepSpeed looks after that: True."""
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        bad = (~norm.isfinite()).to(accelerator.device, torch.int32)
        bad = bad.full_tensor() if hasattr(bad, "full_tensor") else bad
        if accelerator.num_processes > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bad.item()

    def good_step(self) -> None:
        self.bad_steps = 0

    def bad_step(self, batch: GroupBatch, why: str) -> None:
        """Keep the step's inputs and leave parameters as they are.

        Raises:
            InputError: it was one too many in a row.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        self.bad_steps += 1
        trainer.model.zero_grad(set_to_none=True)
        trainer._metrics["train"]["gvpo/steps_skipped"].append(1.0)
        path = self._keep(batch, why)
        if self.bad_steps < trainer.args.max_bad_steps:
            warnings.warn(f"Step {step} is skipped: {why} Its inputs are kept in {path}.", stacklevel=3)
            return
        raise InputError(
            f"{self.bad_steps} steps in a row, the last at step {step}, had numbers that are not finite "
            f"({why}): lower learning_rate or raise beta, and look at gvpo/kl and entropy before that; "
            f"inputs are kept in {path.parent}."
        )

    def _keep(self, batch: GroupBatch, why: str) -> Path:
        trainer = self.trainer
        name = f"step-{trainer.state.global_step}-rank-{trainer.accelerator.process_index}.safetensors"
        path = Path(trainer.args.output_dir) / "incidents" / name
        try:
            save_rollouts(path, [Slice(batch, trainer.state.global_step)], {"why": why})
        except OSError as error:  # of two evils the smaller
            warnings.warn(f"The inputs of a bad step cannot be kept ({error}).", stacklevel=4)
        return path


class Watch(TrainerCallback):
    """Applies `warn_when` and `stop_when` to what the trainer logs."""

    def __init__(self, warn_when: list[str], stop_when: list[str]) -> None:
        self.warn_when = [Rule.parse(text) for text in warn_when]
        self.stop_when = [Rule.parse(text) for text in stop_when]
        self.stopped_by: Rule | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for rule in [rule for rule in self.warn_when if rule.holds(logs or {})]:
            self.warn_when.remove(rule)  # once is enough
            warnings.warn(
                f"Step {state.global_step}: {rule.metric} is {logs[rule.metric]:.4g}, and {rule} is a sign "
                "of divergence (warn_when).",
                stacklevel=2,
            )
        for rule in self.stop_when:
            if rule.holds(logs or {}) and self.stopped_by is None:
                self.stopped_by = rule
                control.should_save = True
                control.should_training_stop = True
                warnings.warn(
                    f"Training stops at step {state.global_step}: {rule.metric} is "
                    f"{logs[rule.metric]:.4g}, and stop_when has {rule}.",
                    stacklevel=2,
                )


def tolerate_loggers(callbacks: list[TrainerCallback]) -> None:
    """Let trackers (tensorboard, wandb, …) fail without stopping training: each is warned about once."""
    for callback in callbacks:
        if not type(callback).__module__.startswith("transformers.integrations"):
            continue
        for name in dir(callback):
            if name.startswith("on_"):
                setattr(callback, name, _tolerant(callback, getattr(callback, name)))


def _tolerant(callback: TrainerCallback, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # whatever a tracker's client raises when its server or disk is away
            if not getattr(callback, "gvpo_warned", False):
                callback.gvpo_warned = True
                warnings.warn(
                    f"{type(callback).__name__} failed ({type(error).__name__}: {error}): training goes on "
                    "without what it would have recorded.",
                    stacklevel=2,
                )
            return None

    return call
