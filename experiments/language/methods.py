"""The trainers that are compared: TRL's own, rejection-sampling fine-tuning on TRL's rollouts, and GVPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from experiments.language.sources import UPDATES_PER_ROLLOUT, Logs, rollout
from experiments.language.tasks import Task
from gvpo.trl import GVPOConfig, GVPOTrainer

K = 8  # completions a prompt


class RejectionSampling(GRPOTrainer):
    """Fine-tuning on the right completions of GRPO's rollouts: their tokens' negative log-likelihood."""

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._right = super()._calculate_rewards(*args, **kwargs)[:, 0] > 0
        return self._right[:, None].float()

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        out = super()._generate_and_score_completions(inputs)
        return out | {"advantages": self._right.to(out["advantages"])}

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        kept = inputs["completion_ids"].shape[1]
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, kept)
        learnt = inputs["completion_mask"] * inputs["advantages"][:, None]
        return -(logps * learnt).sum() / learnt.sum().clamp(min=1)


class Weighted(GRPOTrainer):
    """GRPO whose clipped ratio is to the log-probabilities that the completions were sampled with.

    TRL's own is to the policy at the time of the rollout, whoever sampled.
    """

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        out = super()._generate_and_score_completions(inputs)
        return out | {"old_per_token_logps": out["sampling_per_token_logps"]}


@dataclass(frozen=True)
class Method:
    """A trainer and its settings.

    Attributes:
        trainer, config: their classes.
        strengths: values of `beta` to run, each with a learning rate of its own; the first is run most.
        settings: of the config, beside what all have in common.
        sources: of completions that it is run with; see `sources.py`.
    """

    trainer: type[GRPOTrainer | RLOOTrainer]
    config: type[GRPOConfig | RLOOConfig]
    strengths: Sequence[float]
    settings: dict[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ("policy",)


_DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none"}
_GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
# A pass that shares prompts this short launches five times as many operations, and it is those that cost.
_ALONE = {"share_prompts": False}
_ALL = tuple(UPDATES_PER_ROLLOUT)
METHODS = {
    "gvpo": Method(GVPOTrainer, GVPOConfig, (0.1, 0.25, 0.5), {"reference": "initial"} | _ALONE, _ALL),
    "gvpo_rollout": Method(GVPOTrainer, GVPOConfig, (0.1,), _ALONE),
    "rloo": Method(RLOOTrainer, RLOOConfig, (0.05, 0.25, 0.5)),
    "grpo_k3": Method(GRPOTrainer, GRPOConfig, (0.04, 0.3, 1.0)),
    "grpo": Method(GRPOTrainer, GRPOConfig, (0.0,), sources=_ALL),
    "dr_grpo": Method(GRPOTrainer, GRPOConfig, (0.0,), _DR_GRPO),
    "gspo": Method(GRPOTrainer, GRPOConfig, (0.0,), _GSPO),
    "rft": Method(RejectionSampling, GRPOConfig, (0.0,), sources=_ALL),
    "grpo_weighted": Method(Weighted, GRPOConfig, (0.0,), sources=("logs",)),
}
RATES = (1e-5, 2e-5, 4e-5)


def make_trainer(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    strength: float,
    rate: float,
    seed: int,
    updates: int,
    output: Path,
    rows: int,
    callbacks: Sequence[Any] = (),
    on_rewards: Callable[[list[float]], None] = lambda rewards: None,
    source: str = "policy",
    logs: Logs | None = None,
) -> GRPOTrainer | RLOOTrainer:
    """The trainer of one job. All have the same prompts, numbers of samples and updates, and optimizer.

    Args:
        source: where completions come from; `logs`, if from there.
    """
    keys = task.trained
    data = Dataset.from_dict({"prompt": [task.prompt(tokenizer, key) for key in keys], "key": list(keys)})
    on_cpu = model.device.type == "cpu"
    args = method.config(
        output_dir=str(output),
        beta=strength,
        learning_rate=rate,
        seed=seed,
        max_steps=updates,
        per_device_train_batch_size=rows,
        steps_per_generation=UPDATES_PER_ROLLOUT[source],
        num_generations=K,
        max_completion_length=task.tokens,
        lr_scheduler_type="constant",
        use_cpu=on_cpu,
        bf16=on_cpu,  # autocast, which a CPU is twice as fast with; on a GPU these sizes wait for launches
        gradient_checkpointing=not on_cpu,  # so that many fit on one device
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **method.settings,
    )

    def reward(**columns: Any) -> list[float]:
        rewards = task.reward(**columns)
        on_rewards(rewards)
        return rewards

    given = rollout(source, task, tokenizer, logs)
    return method.trainer(
        model, reward, args, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks),
        **({"rollout_func": given} if given else {}),
    )  # fmt: skip
