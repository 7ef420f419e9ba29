"""GVPO on verl 0.6.0, the version that the published recipe names, with the same updates.

What differs from verl's own trainer: `update_actor` of its worker group is called once for each mini-batch of
whole prompts (`gvpo.verl.updates`), with weights as advantages. The workers run verl's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
import verl.trainer.main_ppo as main_ppo
from omegaconf import DictConfig, open_dict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

from gvpo.errors import InputError
from gvpo.verl.reward import default_reward
from gvpo.verl.rollouts import Rollouts, rows_short
from gvpo.verl.settings import read_settings
from gvpo.verl.updates import Updates, count_updates

_Runner: Any = main_ppo.TaskRunner.__ray_metadata__.modified_class
_missing = [name for name in ("_create_dataloader", "init_workers") if not hasattr(RayPPOTrainer, name)]
if _missing or not hasattr(_Runner, "run"):
    raise ImportError(
        "gvpo.verl.v060 works with verl 0.6.0, and this verl is not built like it: install verl==0.6.0."
    )


class GVPORayTrainer(RayPPOTrainer):
    """verl's trainer with GVPO's updates."""

    def __init__(self, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        self.settings = read_settings(config)
        self.updates = Updates(self.settings)
        super().__init__(config, *args, **kwargs)

    def _create_dataloader(self, *args: Any, **kwargs: Any) -> None:
        super()._create_dataloader(*args, **kwargs)
        count_updates(self.config, self.settings, self.total_training_steps)

    def init_workers(self) -> None:
        super().init_workers()
        update_actor = self.actor_rollout_wg.update_actor

        def update(batch: DataProto) -> DataProto:
            workers = _Batch(self, batch, update_actor)
            prompts: dict[str, list[int]] = {}
            for i, prompt in enumerate(workers.rollouts.prompts):
                prompts.setdefault(prompt, []).append(i)
            metrics = self.updates.run(self.global_steps, prompts, workers)
            return DataProto(meta_info={"metrics": {name: [value] for name, value in metrics.items()}})

        self.actor_rollout_wg.update_actor = update


class _Batch:
    """A rollout of verl 0.6.0, as `gvpo.verl.updates.Workers`."""

    def __init__(self, trainer: GVPORayTrainer, batch: DataProto, update_actor: Callable[..., Any]) -> None:
        self.batch, self.group, self.update_actor = batch, trainer.actor_rollout_wg, update_actor
        config = trainer.config.actor_rollout_ref
        self.ranks = self.group.world_size // config.actor.get("ulysses_sequence_parallel_size", 1)
        # verl 0.6.0 divides by this number of rows, whatever the mini-batch holds.
        self.rows = trainer.settings.mini_batch * config.rollout.n
        reference = "ref_log_prob" if trainer.settings.reference == "initial" else "old_log_probs"
        data, prompts = batch.batch, batch.non_tensor_batch["uid"]
        self.rollouts = Rollouts(
            sessions=[(str(prompt), str(i)) for i, prompt in enumerate(prompts)],
            reference=_sums(data[reference], data["response_mask"]),
            start=_sums(data["old_log_probs"], data["response_mask"]),
            rewards=data["token_level_rewards"].double().sum(-1),
            valid=data["response_mask"].bool().any(-1),
            ages=torch.zeros(len(prompts), dtype=torch.long),
        )

    def score(self, rows: Sequence[int]) -> Tensor:
        part = self._part([*rows, *[rows[0]] * rows_short(len(rows), self.ranks)])
        scored = self.group.compute_log_prob(part).batch["old_log_probs"]
        return _sums(scored, part.batch["response_mask"])[: len(rows)]

    def update(self, rows: Sequence[int], weights: Tensor) -> dict[str, float]:
        short = self.rows - len(rows)
        taken = [*rows, *[rows[0]] * short]  # a row of weight 0 stands in for each that is missing
        weights = torch.cat([weights, weights.new_zeros(short)])
        lengths = self.batch.batch["attention_mask"].sum(-1)[taken].tolist()
        parts = get_seqlen_balanced_partitions(lengths, k_partitions=self.ranks, equal_size=True)
        order = [i for part in parts for i in part]
        part = self._part([taken[i] for i in order])
        part.meta_info["global_token_num"] = [lengths[i] for i in order]
        advantages = weights[order, None] * self.rows * part.batch["response_mask"]
        part.batch["advantages"] = advantages.float()
        metrics = self.update_actor(part).meta_info["metrics"]
        return {name: float(np.mean(value)) for name, value in metrics.items()}

    def record(self, rows: Sequence[int]) -> dict[str, list[Tensor]]:
        data = self._part(rows).batch
        real = data["attention_mask"].bool()
        return {
            name: [row[keep[-row.shape[0] :]] for row, keep in zip(data[name], real, strict=True)]
            for name in ("input_ids", "responses", "response_mask")
        }

    def _part(self, rows: Sequence[int]) -> DataProto:
        return self.batch.select_idxs(np.array(rows))


def _sums(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), values.double(), 0.0).sum(-1)


class GVPOTaskRunner(_Runner):
    """verl's task runner with our trainer in the place of verl's."""

    def run(self, config: DictConfig) -> None:
        main_ppo.RayPPOTrainer = GVPORayTrainer
        super().run(config)


def train(config: DictConfig) -> None:
    """Run verl 0.6.0 with a configuration that `gvpo.verl.settings.prepare` has been through.

    Raises:
        InputError: sizes that verl 0.6.0 cannot split, or a reference that it has no copies for.
    """
    if config.gvpo.reference == "moving":
        raise InputError("gvpo.reference=moving needs verl 0.9: set gvpo.reference=initial or rollout.")
    if config.gvpo.replay_ratio or config.gvpo.demonstrations_per_group:
        raise InputError(
            "gvpo.replay_ratio and gvpo.demonstrations_per_group need verl 0.9: leave them at 0."
        )
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    ranks = workers // actor.get("ulysses_sequence_parallel_size", 1)
    multiple = ranks * (1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu)
    micro_batches = "workers × ppo_micro_batch_size_per_gpu"
    for name, prompts, divisor, what in (
        ("ppo_mini_batch_size", actor.ppo_mini_batch_size, multiple, micro_batches),
        ("train_batch_size", config.data.train_batch_size, ranks, "the number of workers"),
    ):
        if prompts * n % divisor:
            raise InputError(
                f"verl 0.6.0 needs {name} × rollout.n = {prompts * n} rows to be a multiple of {divisor}, "
                f"which is {what}: change one, or use verl 0.9, which fills up."
            )
    default_reward(config)
    with open_dict(config):
        # The driver repeats, and the workers don't.
        config.gvpo.epochs, actor.ppo_epochs = actor.ppo_epochs, 1
    main_ppo.TaskRunner = ray.remote(num_cpus=1)(GVPOTaskRunner)
    main_ppo.run_ppo(config)
